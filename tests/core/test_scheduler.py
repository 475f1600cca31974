"""The scheduler's decisions, with plans written out by hand, and its invariants under random traffic."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.plan import Bucket, PageUpdate, ScheduledRow, StepPlan
from jaxserve.core.policies.registry import CAPACITIES, COMPOSITIONS, ORDERINGS, VICTIMS
from jaxserve.core.policies.strict_priority import StrictPriority
from jaxserve.core.waiting_queue import WaitingQueue
from jaxserve.errors import DuplicateRequestError, QueueFullError
from jaxserve.request import FinishReason, Request, RequestStatus
from tests.support.engine_parts import ManualClock, make_core, make_request, random_prompt, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens

DEPTHS = (0, 1, 2)


def plans(fake: FakeExecutor) -> list[StepPlan]:
    return [batch.plan for batch in fake.batches]


def assert_right_tokens(requests: list[Request]) -> None:
    for request in requests:
        prompt = list(request.prompt_token_ids)
        assert request.output_token_ids == expected_tokens(
            prompt, request.seed, len(request.output_token_ids)
        )


def test_plans_of_two_requests_by_hand() -> None:
    core, fake = make_core(pipeline_depth=0, token_budget=32, page_size=4)
    core.add(make_request("long", range(40), 3))
    core.add(make_request("short", [5, 6], 2))
    run_to_end(core)
    long_slot, short_slot = 0, 1
    rows = [plan.rows for plan in plans(fake)]
    assert list(rows[0]) == [ScheduledRow("long", long_slot, 0, 32, False)]
    assert list(rows[1]) == [
        ScheduledRow("long", long_slot, 32, 8, True),
        ScheduledRow("short", short_slot, 0, 2, True),
    ]
    assert list(rows[2]) == [
        ScheduledRow("long", long_slot, 40, 1, True),
        ScheduledRow("short", short_slot, 2, 1, True),
    ]
    assert list(rows[3]) == [ScheduledRow("long", long_slot, 41, 1, True)]
    assert len(rows) == 4
    assert [plan.bucket for plan in plans(fake)] == [Bucket(32, 8), Bucket(32, 8), Bucket(2, 2), Bucket(1, 1)]
    admitted = {a.request_id: a for plan in plans(fake) for a in plan.admissions}
    assert admitted["long"].page_ids == tuple(range(1, 11))
    assert admitted["short"].page_ids == (11,)
    assert plans(fake)[2].page_updates == (PageUpdate(long_slot, 10, 12),)


def test_seed_article_trace_refills_at_once() -> None:
    """Outputs 50/200/30/150 on four slots: when request 3 leaves, request 5 takes its slot at once."""
    core, fake = make_core(num_slots=4, num_pages=1000, pipeline_depth=0, token_budget=64)
    for index, length in enumerate([50, 200, 30, 150, 80, 100], start=1):
        core.add(make_request(f"r{index}", [index], length))
    run_to_end(core)
    first_step = {a.request_id: plan.step for plan in plans(fake) for a in plan.admissions}
    last_step = {row.request_id: plan.step for plan in plans(fake) for row in plan.rows}
    assert first_step == {"r1": 0, "r2": 0, "r3": 0, "r4": 0, "r5": 30, "r6": 50}
    assert last_step["r3"] == 29
    assert last_step["r1"] == 49
    slots = {a.request_id: a.slot for plan in plans(fake) for a in plan.admissions}
    assert slots["r5"] == slots["r3"]
    assert slots["r6"] == slots["r1"]


def test_static_batches_wait_for_their_longest() -> None:
    """The same four requests, statically: 370 of 800 slot-steps are waste, the article's 46 %."""
    clock = ManualClock()
    core, fake = make_core(
        num_slots=4, num_pages=1000, pipeline_depth=0, token_budget=64, batching="static", clock=clock
    )
    requests = [make_request(f"r{i}", [i], n) for i, n in enumerate([50, 200, 30, 150, 80], start=1)]
    for request in requests:
        core.add(request)
    ends: dict[str, int] = {}
    while core.has_work:
        clock.now += 0.01
        for request in core.step().ended:
            ends[request.id] = core.stats.steps
    batch = [plan for plan in plans(fake) if plan.step < 200]
    useful = sum(len(plan.rows) for plan in batch)
    held = sum(plan.num_held_slots for plan in batch)
    assert (useful, held) == (430, 370)
    assert all(plan.bucket.rows >= 4 for plan in batch), "finished rows are padded, not given away"
    assert [ends[f"r{i}"] for i in range(1, 5)] == [200] * 4, "everybody waits for the longest"
    assert next(p.step for p in plans(fake) if any(r.request_id == "r5" for r in p.rows)) == 200


@pytest.mark.parametrize("batching", ["static", "dynamic"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_batch_is_not_cut_short_by_the_token_budget(batching: str, depth: int) -> None:
    """Four prompts of 9 tokens under a budget of 12: one batch, computed over three steps."""
    core, fake = make_core(
        num_slots=4, token_budget=12, pipeline_depth=depth, batching=batching, batch_window_s=0.0
    )
    prompts = {f"r{i}": [i, i + 1, 7] * 3 for i in range(4)}
    requests = [make_request(name, prompt, 6, seed=3) for name, prompt in prompts.items()]
    for request in requests:
        core.add(request)
    run_to_end(core)
    first = plans(fake)[0]
    assert [admission.request_id for admission in first.admissions] == list(prompts)
    assert [row.num_tokens for row in first.rows] == [9, 3]
    assert not any(plan.admissions for plan in plans(fake)[1:])
    for request in requests:
        assert request.output_token_ids == expected_tokens(prompts[request.id], 3, 6)


def test_dynamic_batch_starts_when_its_window_is_over() -> None:
    clock = ManualClock()
    core, fake = make_core(num_slots=4, pipeline_depth=0, batching="dynamic", batch_window_s=1.0, clock=clock)
    core.add(make_request("a", [1], 2, arrival=0.0))
    core.step()
    assert not fake.batches, "the window is open"
    clock.now = 0.5
    core.add(make_request("b", [2], 2, arrival=0.5))
    core.step()
    assert not fake.batches
    clock.now = 1.0
    core.step()
    assert [row.request_id for row in plans(fake)[0].rows] == ["a", "b"]
    core.add(make_request("late", [3], 1, arrival=1.0))
    clock.now = 9.0
    core.step()
    assert all(row.request_id != "late" for row in plans(fake)[1].rows), "a running batch takes nobody"
    run_to_end(core)
    assert plans(fake)[-1].rows[0].request_id == "late"


@pytest.mark.parametrize("depth", DEPTHS)
def test_preemption_recomputes_and_loses_no_token(depth: int) -> None:
    core, _ = make_core(num_slots=4, num_pages=13, page_size=4, watermark_pages=0, pipeline_depth=depth)
    requests = [make_request(f"r{i}", [i] * 8, 30, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert sum(request.num_preemptions for request in requests) >= 3, "the test must preempt"
    assert all(len(request.output_token_ids) == 30 for request in requests)
    assert requests[0].num_preemptions == 0, "the oldest always makes progress"
    assert_right_tokens(requests)


def test_same_tokens_at_every_depth_and_budget() -> None:
    outputs: set[tuple[tuple[int, ...], ...]] = set()
    for depth in DEPTHS:
        for budget in (9, 32, 128):
            rng = random.Random(7)
            core, _ = make_core(pipeline_depth=depth, token_budget=budget, num_pages=40)
            requests = [
                make_request(
                    f"r{i}", random_prompt(rng, 50), rng.randint(1, 30), seed=i, stop_token_ids=frozenset({3})
                )
                for i in range(40)
            ]
            for request in requests:
                core.add(request)
            run_to_end(core)
            outputs.add(tuple(tuple(request.output_token_ids) for request in requests))
    assert len(outputs) == 1


def test_pipelining_wastes_no_step_on_a_certain_end() -> None:
    """At depth 2 a request that ends by length is never planned beyond its limit."""
    for depth in DEPTHS:
        core, fake = make_core(pipeline_depth=depth)
        core.add(make_request("r", [1, 2, 3], 5))
        run_to_end(core)
        assert fake.num_computed_tokens == 3 + 4


@pytest.mark.parametrize("depth", DEPTHS)
def test_tokens_after_a_stop_token_are_discarded(depth: int) -> None:
    prompt = [4, 9]
    tokens = expected_tokens(prompt, 0, 10)
    core, _ = make_core(pipeline_depth=depth)
    request = make_request("r", prompt, 10, stop_token_ids=frozenset({tokens[3]}))
    core.add(request)
    run_to_end(core)
    assert request.output_token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, tokens[3])


def test_min_tokens_outlives_a_stop_token() -> None:
    prompt = [4, 9]
    tokens = expected_tokens(prompt, 0, 10)
    core, _ = make_core()
    request = make_request("r", prompt, 10, stop_token_ids=frozenset({tokens[1]}), min_tokens=5)
    core.add(request)
    run_to_end(core)
    assert len(request.output_token_ids) > 5, (
        "the fake executor masks nothing: the scheduler must not stop early"
    )


def test_siblings_share_the_prompt_pages() -> None:
    core, fake = make_core(num_slots=4, page_size=4, pipeline_depth=1)
    prompt = list(range(1, 23))  # 22 tokens: 5 full pages and 2 tokens more
    requests = [make_request(f"r.{i}", prompt, 6, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert_right_tokens(requests)
    admitted = {a.request_id: a.page_ids for plan in plans(fake) for a in plan.admissions}
    assert {pages[:5] for pages in admitted.values()} == {admitted["r.0"][:5]}, "the same physical pages"
    assert len({pages[5] for pages in admitted.values()}) == 4, "the last page is each one's own"
    assert fake.num_computed_tokens == 22 + 3 * 2 + 4 * 5, "20 shared tokens are computed once"


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_siblings_do_not_cut_a_batch_short(batching: str) -> None:
    core, fake = make_core(num_slots=4, pipeline_depth=0, batching=batching, batch_window_s=0.0)
    prompt = list(range(1, 11))
    requests = [make_request(f"r.{i}", prompt, 5, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert len(plans(fake)[0].admissions) == 4
    assert_right_tokens(requests)


def test_abort_frees_everything_at_once() -> None:
    for depth in DEPTHS:
        core, _ = make_core(pipeline_depth=depth)
        core.add(make_request("r", list(range(20)), 50))
        for _ in range(4):
            core.step()
        assert core.scheduler.stats().num_used_pages > 0
        core.end("r", FinishReason.ABORT)
        assert core.scheduler.stats().num_used_pages == 0
        updates = core.step()
        assert [(request.id, request.finish_reason) for request in updates.ended] == [
            ("r", FinishReason.ABORT)
        ]
        run_to_end(core)


def test_id_can_be_used_again_while_old_steps_are_in_flight() -> None:
    core, _ = make_core(pipeline_depth=2)
    first = make_request("same", [1, 2, 3], 50)
    core.add(first)
    for _ in range(4):
        core.step()
    with pytest.raises(DuplicateRequestError):
        core.add(make_request("same", [4], 5))
    core.end("same", FinishReason.ABORT)
    second = make_request("same", [9, 9], 5, seed=3)
    core.add(second)
    run_to_end(core)
    assert second.output_token_ids == expected_tokens([9, 9], 3, 5)
    assert first.output_token_ids == expected_tokens([1, 2, 3], 0, len(first.output_token_ids))


def test_deadline_ends_waiting_and_running_requests() -> None:
    clock = ManualClock()
    core, _ = make_core(num_slots=1, clock=clock)
    running = make_request("running", [1], 500, deadline=2.0)
    waiting = make_request("waiting", [2], 5, deadline=1.0)
    for request in (running, waiting):
        core.add(request)
    core.step()
    clock.now = 1.0
    core.step()
    assert waiting.finish_reason is FinishReason.DEADLINE
    assert running.status is RequestStatus.RUNNING
    clock.now = 2.5
    core.step()
    assert running.finish_reason is FinishReason.DEADLINE
    run_to_end(core)


def test_queue_is_bounded() -> None:
    core, _ = make_core(max_queued_requests=2)
    core.add(make_request("a", [1], 1))
    core.add(make_request("b", [1], 1))
    with pytest.raises(QueueFullError):
        core.add(make_request("c", [1], 1))


def test_a_request_that_waits_long_keeps_no_others_in_memory() -> None:
    queue = WaitingQueue(StrictPriority())
    queue.push(make_request("bulk", [1], 1, priority=5), 0.0)
    for index in range(1000):
        urgent = make_request(f"r{index}", [1], 1, arrival=float(index))
        queue.push(urgent, float(index))
        assert queue.peek() is urgent
        assert queue.oldest_arrival == 0.0
        queue.remove(urgent)
    assert sum(map(len, queue._lanes.values())) + len(queue._heads) + len(queue._by_arrival) < 100 + 64
    last = queue.peek()
    assert last is not None
    assert last.id == "bulk"


def test_priority_order_runs_urgent_requests_first() -> None:
    core, fake = make_core(num_slots=1, ordering="strict_priority", pipeline_depth=0)
    for name, priority in (("bulk", 5), ("urgent", 0), ("normal", 2)):
        core.add(make_request(name, [1], 2, priority=priority))
    run_to_end(core)
    order = list(dict.fromkeys(row.request_id for plan in plans(fake) for row in plan.rows))
    assert order == ["urgent", "normal", "bulk"]


def test_priority_order_preempts_the_least_urgent() -> None:
    core, _ = make_core(num_slots=2, num_pages=8, page_size=4, watermark_pages=0, ordering="strict_priority")
    bulk, urgent = (
        make_request("bulk", [1] * 8, 16, priority=5),
        make_request("urgent", [2] * 8, 16, priority=0),
    )
    core.add(bulk)
    core.step()
    core.add(urgent)
    run_to_end(core)
    assert bulk.num_preemptions > 0
    assert urgent.num_preemptions == 0
    assert_right_tokens([bulk, urgent])


def test_bad_logits_end_only_their_own_request() -> None:
    fake = FakeExecutor(8, 4, bad_requests=frozenset({"bad"}))
    core, _ = make_core(executor=fake)
    bad, good = make_request("bad", [1, 2], 9), make_request("good", [3, 4], 9)
    core.add(bad)
    core.add(good)
    run_to_end(core)
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.error is not None
    assert "not finite" in bad.error
    assert good.output_token_ids == expected_tokens([3, 4], 0, 9)


def test_admission_prices_the_whole_prompt() -> None:
    """Of 8 pages a prompt of 3 leaves 5: one of 7 must wait, though its first chunk would fit."""
    core, fake = make_core(num_pages=9, page_size=4, token_budget=16, num_slots=4, watermark_pages=0)
    core.add(make_request("small", list(range(12)), 2))
    core.add(make_request("large", list(range(50, 78)), 2))
    run_to_end(core)
    started = {a.request_id: plan.step for plan in plans(fake) for a in plan.admissions}
    small_ends = max(p.step for p in plans(fake) if any(r.request_id == "small" for r in p.rows))
    assert started["large"] > small_ends
    assert not any(plan.preempted_ids for plan in plans(fake))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    depth=st.sampled_from(DEPTHS),
    num_slots=st.integers(1, 6),
    num_pages=st.integers(18, 60),
    batching=st.sampled_from(["continuous", "static", "dynamic"]),
    abort_rate=st.sampled_from([0.0, 0.05, 0.3]),
    ordering=st.sampled_from(sorted(ORDERINGS)),
    composition=st.sampled_from(sorted(COMPOSITIONS)),
    capacity=st.sampled_from(sorted(CAPACITIES)),
    victim=st.sampled_from(["auto", *VICTIMS]),
    max_decode_steps=st.integers(1, 4),
    stops_rows=st.booleans(),
)
def test_random_traffic_keeps_every_invariant(
    seed: int,
    depth: int,
    num_slots: int,
    num_pages: int,
    batching: str,
    abort_rate: float,
    ordering: str,
    composition: str,
    capacity: str,
    victim: str,
    max_decode_steps: int,
    stops_rows: bool,
) -> None:
    """No page lost or doubled, budget kept (the fake executor checks), nobody starves, no token wrong."""
    rng = random.Random(seed)
    clock = ManualClock()
    core, fake = make_core(
        num_slots=num_slots, num_pages=num_pages, pipeline_depth=depth, batching=batching, clock=clock,
        ordering=ordering, composition=composition, capacity=capacity, victim=victim, max_wait_s=0.3,
        max_decode_steps=max_decode_steps, executor=FakeExecutor(num_slots, 4, stops_rows=stops_rows),
    )  # fmt: skip
    requests: list[Request] = []
    for index in range(30):
        arrival = index * 0.02
        clock.now = max(clock.now, arrival)
        stops = frozenset({rng.randrange(101)}) if rng.random() < 0.5 else frozenset[int]()
        parent = requests[-1] if requests and rng.random() < 0.2 else None
        prompt = parent.prompt_token_ids if parent else random_prompt(rng, 40)
        request = make_request(
            f"r{index}", prompt, rng.randint(1, 24), seed=index, arrival=clock.now, stop_token_ids=stops,
            priority=rng.randint(-1, 1), client=f"c{index % 3}",
        )  # fmt: skip
        requests.append(request)
        core.add(request)
        for _ in range(rng.randint(0, 4)):
            clock.now += 0.01
            core.step()
            core.scheduler.check_integrity()
        if rng.random() < abort_rate:
            core.end(rng.choice(requests).id, FinishReason.ABORT)
            core.scheduler.check_integrity()
    for _ in range(20_000):
        if not core.has_work:
            break
        clock.now += 0.01
        core.step()
        core.scheduler.check_integrity()
    assert not core.has_work, f"somebody starves: {core.scheduler.stats()}"
    assert core.scheduler.stats().num_used_pages == 0
    assert all(request.is_finished for request in requests)
    assert_right_tokens(requests)
    ended_by_length = [r for r in requests if r.finish_reason is FinishReason.LENGTH]
    assert all(len(r.output_token_ids) == r.max_tokens for r in ended_by_length)
    assert fake.num_dispatched == core.stats.steps


def test_ten_thousand_requests_with_random_aborts_leak_nothing() -> None:
    rng = random.Random(1)
    core, _ = make_core(num_slots=32, num_pages=200, token_budget=256)
    alive: list[Request] = []
    for index in range(10_000):
        request = make_request(f"r{index}", random_prompt(rng, 12), rng.randint(1, 6), seed=index)
        core.add(request)
        alive.append(request)
        if index % 8 == 0:
            core.step()
        if rng.random() < 0.2:
            core.end(alive[rng.randrange(len(alive))].id, FinishReason.ABORT)
    run_to_end(core, check=False)
    core.scheduler.check_integrity()
    stats = core.scheduler.stats()
    assert (stats.num_used_pages, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert stats.num_finished == 10_000
    assert_right_tokens(alive)


def test_recorded_arrivals_replay_to_identical_plans() -> None:
    def run() -> list[StepPlan]:
        rng = random.Random(3)
        core, fake = make_core(num_pages=30)
        for index in range(60):
            core.add(make_request(f"r{index}", random_prompt(rng, 30), rng.randint(1, 20), seed=index))
            core.step()
        run_to_end(core)
        return plans(fake)

    assert run() == run()
