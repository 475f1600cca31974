"""What every ordering promises, with keys worked out by hand and streams meant to break it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, get_args

import pytest

from jaxserve import config
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.policies import registry
from jaxserve.core.policies.dlpm import DeficitLongestPrefixMatch
from jaxserve.core.policies.fair import VirtualTokenCounters
from jaxserve.core.policies.lpm import LongestPrefixMatch
from jaxserve.core.policies.mlfq import SkipJoinFeedback
from jaxserve.core.policies.priority import DEFAULT_WEIGHTS, Factors, ScoredPriority, score_of
from jaxserve.core.policies.sizes import ServiceTimes
from jaxserve.core.policies.sjf import ShortestJobFirst
from jaxserve.core.policies.spf import ShortestPrefillFirst
from jaxserve.core.waiting_queue import WaitingQueue
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import Request, RequestStatus
from tests.support.engine_parts import ManualClock, make_core, make_request
from tests.support.policy_parts import LightExecutor, make_context

STEP_S = 0.01


def predicted(name: str, median: float, upper: float | None = None, **options: Any) -> Request:
    request = make_request(name, [1] * options.pop("prompt", 4), options.pop("max_tokens", 4096), **options)
    request.predicted_output_tokens = median
    request.predicted_output_upper = median if upper is None else upper
    return request


def order_of(queue: WaitingQueue) -> list[str]:
    names: list[str] = []
    while (request := queue.peek()) is not None:
        names.append(request.id)
        queue.remove(request)
    return names


def serve(core: EngineCore[Any], clock: ManualClock, arrivals: list[Request]) -> None:
    """Steps of ten milliseconds until all are served."""
    pending = sorted(arrivals, key=lambda request: request.arrival_time)
    pending.reverse()
    for _ in range(50_000):
        while pending and pending[-1].arrival_time <= clock.now:
            core.add(pending.pop())
        if not pending and not core.has_work:
            return
        core.step()
        clock.now += STEP_S
    raise AssertionError(f"still working: {core.scheduler.stats()}")


def engine(clock: ManualClock, **options: Any) -> tuple[EngineCore[Any], LightExecutor]:
    executor = LightExecutor()
    core, _ = make_core(
        clock=clock, executor=executor, num_pages=4000, page_size=16, token_budget=512, **options
    )
    return core, executor


# ---------------------------------------------------------------------- registry and queue


def test_flags_offer_exactly_what_is_registered() -> None:
    assert set(get_args(config.Ordering)) == set(registry.ORDERINGS)
    assert set(get_args(config.Batching)) == set(registry.ADMISSIONS)
    assert set(get_args(config.Composition)) == set(registry.COMPOSITIONS)
    assert set(get_args(config.Victim)) == {"auto", *registry.VICTIMS}
    assert set(registry.OWN_VICTIMS) <= set(registry.ORDERINGS)
    assert set(registry.OWN_VICTIMS.values()) <= set(registry.VICTIMS)


@dataclasses.dataclass
class Scripted:
    """Keys and lanes as the test says; each key holds for a second."""

    keys: dict[str, float]
    lanes: dict[str, float]

    def key(self, request: Request, now: float) -> tuple[float, ...]:
        return (self.keys[request.id],)

    def key_until(self, request: Request, now: float) -> float:
        return now + 1.0

    def lane(self, request: Request) -> str:
        return request.client

    def lane_key(self, lane: str) -> float:
        return self.lanes[lane]


@pytest.mark.parametrize("seed", range(20))
def test_queue_agrees_with_sorting_everything(seed: int) -> None:
    """Pushes, removals, keys that change, lanes whose keys grow: the head is always the least of all."""
    rng = random.Random(seed)
    script = Scripted({}, {f"c{i}": 0.0 for i in range(4)})
    queue, alive, now = WaitingQueue(script), dict[str, tuple[Request, int]](), 0.0
    tickets = 0
    for index in range(400):
        action = rng.random()
        if action < 0.5 or not alive:
            request = make_request(f"r{index}", [1] * rng.randint(1, 9), 1, client=f"c{rng.randrange(4)}")
            script.keys[request.id] = rng.randint(0, 20)
            queue.push(request, now)
            tickets += 1
            alive[request.id] = (request, tickets)
        elif action < 0.8:
            request, _ = alive.pop(rng.choice(list(alive)))
            queue.remove(request)
        elif action < 0.9:
            script.lanes[f"c{rng.randrange(4)}"] += rng.random()
        else:  # every key is due, and is what the script says from now on
            for name in alive:
                script.keys[name] = rng.randint(0, 20)
            now += 1.0
            for _ in range(1 + len(alive) // 32):
                queue.refresh(now)
            alive = {name: (request, queue._members[request].ticket) for name, (request, _) in alive.items()}
            tickets = queue._counter
        best = min(
            ((script.lanes[r.client], script.keys[n], ticket, n) for n, (r, ticket) in alive.items()),
            default=None,
        )
        head = queue.peek()
        assert (None if head is None else head.id) == (None if best is None else best[3])
        assert queue.num_tokens == sum(request.num_tokens for request, _ in alive.values())
    assert queue._num_entries <= 6 * len(alive) + 70


def test_a_step_computes_a_bounded_number_of_keys_anew() -> None:
    calls = 0

    class Counting:
        def key(self, request: Request, now: float) -> tuple[float, ...]:
            nonlocal calls
            calls += 1
            return (request.arrival_time,)

        def key_until(self, request: Request, now: float) -> float:
            return now + 0.5

    queue = WaitingQueue(Counting())
    for index in range(1000):
        queue.push(make_request(f"r{index}", [1], 1), 0.0)
    calls = 0
    queue.refresh(0.4)
    assert calls == 0
    queue.refresh(1.0)
    assert calls == 32


# ---------------------------------------------------------------------- spf, lpm


def test_spf_takes_short_prompts_first_and_age_counts() -> None:
    policy = ShortestPrefillFirst(gamma=15.0)
    queue = WaitingQueue(policy)
    for name, prompt, arrival in (("long", 90, 0.0), ("short", 20, 4.0), ("late", 20, 5.0), ("mid", 50, 0.0)):
        queue.push(make_request(name, [1] * prompt, 1, arrival=arrival), arrival)
    # 90, 20 + 60, 20 + 75, 50
    assert order_of(queue) == ["mid", "short", "long", "late"]


def test_spf_bounds_the_wait_of_a_long_prompt() -> None:
    """Short prompts come as fast as they are served; the long one is overtaken for (900 - 10) / gamma s."""
    clock = ManualClock()
    core, _ = engine(clock, ordering="spf", num_slots=2, pipeline_depth=0)
    long = make_request("long", [1] * 900, 2, arrival=0.05)
    flood = [make_request(f"s{i}", [1] * 10, 40, arrival=0.208 * max(0, i - 50)) for i in range(900)]
    pending = sorted([long, *flood], key=lambda r: -r.arrival_time)
    while long.first_scheduled_time is None:
        while pending and pending[-1].arrival_time <= clock.now:
            core.add(pending.pop())
        core.step()
        clock.now += STEP_S
    assert 40.0 < long.first_scheduled_time - 0.05 <= 890 / 15.0 + 10.0 + 0.5, (
        "and those who were there before"
    )


def test_spf_gives_the_chunk_but_not_the_pages_of_a_long_prompt_to_a_short_one() -> None:
    core, fake = make_core(ordering="spf", pipeline_depth=0, token_budget=32, num_slots=4)
    core.add(make_request("long", range(100), 2))
    core.step()
    core.add(make_request("short", range(5), 2, arrival=0.0))
    core.step()
    rows = [(r.request_id, r.num_tokens) for r in fake.batches[1].plan.rows]
    assert rows == [("short", 5), ("long", 27)]
    assert not fake.batches[1].plan.preempted_ids
    for _ in range(20):
        core.step()


def test_lpm_takes_what_is_cached_first_until_someone_has_waited_too_long() -> None:
    cached = {"a": 0, "b": 48, "c": 16}
    queue = WaitingQueue(LongestPrefixMatch(lambda request: cached[request.id], max_wait_s=3.0))
    for arrival, name in enumerate("abc"):
        queue.push(make_request(name, [1] * 64, 1, arrival=float(arrival)), float(arrival))
    first = queue.peek()
    assert first is not None
    assert first.id == "b"
    cached["c"] = 64
    queue.refresh(2.5)
    assert order_of_copy(queue)[0] == "c", "what is cached changed"
    queue.refresh(3.0)
    assert order_of(queue) == ["a", "c", "b"], "a has waited three seconds"


def order_of_copy(queue: WaitingQueue) -> list[str]:
    return [r.id for r in sorted(queue, key=lambda r: (queue._members[r].key, queue._members[r].ticket))]


# ---------------------------------------------------------------------- fair, dlpm


def charged(executor: LightExecutor) -> dict[str, float]:
    totals: dict[str, float] = {}
    for plan in executor.plans:
        for row in plan.rows:
            client = row.request_id.split("-")[0]
            weight = 2.0 * row.samples + (row.num_tokens if row.start == 0 else 0.0)
            totals[client] = totals.get(client, 0.0) + weight
    return totals


@pytest.mark.parametrize("ordering", ["fair", "dlpm"])
def test_two_clients_that_always_wait_get_the_same_service(ordering: str) -> None:
    """One floods with long requests: within the bound of 2 max(w_p L_in, w_q M)."""
    clock = ManualClock()
    core, executor = engine(clock, ordering=ordering, num_slots=8, pipeline_depth=0)
    rng = random.Random(1)
    for index in range(1500):
        core.add(make_request(f"flood-{index}", [1] * 64, rng.randint(20, 60), client="flood"))
    for index in range(600):
        core.add(make_request(f"calm-{index}", [1] * 16, rng.randint(5, 20), client="calm"))
    worst = 0.0
    for step in range(1000):
        core.step()
        clock.now += STEP_S
        if step % 50 == 49:
            totals = charged(executor)
            worst = max(worst, abs(totals.get("flood", 0.0) - totals.get("calm", 0.0)))
    totals = charged(executor)
    bound = 2 * max(64.0, 2.0 * 8 * 60) if ordering == "fair" else 2 * 4096.0 + 2 * 960
    assert worst <= bound
    if ordering == "fair":
        assert 0.9 <= totals["flood"] / totals["calm"] <= 1.1
    fcfs_clock = ManualClock()
    core, executor = engine(fcfs_clock, ordering="fcfs", num_slots=8, pipeline_depth=0)
    for index in range(600):
        core.add(make_request(f"flood-{index}", [1] * 64, 40, client="flood"))
        core.add(make_request(f"flood-x{index}", [1] * 64, 40, client="flood"))
        core.add(make_request(f"calm-{index}", [1] * 16, 10, client="calm"))
    for _ in range(1000):
        core.step()
    totals = charged(executor)
    assert totals["flood"] > 3 * totals["calm"], "first come, first served is not fair"


def test_lift_saves_up_nothing_for_a_client_that_was_idle() -> None:
    clock = ManualClock()
    core, executor = engine(clock, ordering="fair", num_slots=4, pipeline_depth=0)
    for index in range(800):
        core.add(make_request(f"busy-{index}", [1] * 8, 20, client="busy"))
    for _ in range(1000):
        core.step()
    before = len(executor.plans)
    for index in range(400):
        core.add(make_request(f"back-{index}", [1] * 8, 20, client="back"))
    for _ in range(600):
        core.step()
    rows = [row.request_id.split("-")[0] for plan in executor.plans[before:] for row in plan.rows]
    share = rows.count("back") / len(rows)
    assert 0.45 <= share <= 0.55
    counters = VirtualTokenCounters()
    counters.counters["busy"] = 1000.0
    counters.queued(make_request("r", [1], 1, client="busy"), 0.0)
    counters.queued(make_request("s", [1], 1, client="back"), 0.0)
    assert counters.counters["back"] == 1000.0


def test_fair_forgets_clients_that_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.core.policies.fair.MOST_CLIENTS", 10)
    policy = VirtualTokenCounters()
    for index in range(100):
        request = make_request(f"r{index}", [1] * 5, 1, client=f"c{index}")
        policy.queued(request, 0.0)
        policy.admitted(request, 0.0)
    assert len(policy.counters) <= 12


def test_dlpm_prefers_what_is_cached_within_a_quantum() -> None:
    cached = {"a1": 0, "a2": 32, "b1": 16}
    policy = DeficitLongestPrefixMatch(lambda request: cached[request.id], quantum=100.0)
    queue = WaitingQueue(policy)
    for name in cached:
        request = make_request(name, [1] * 48, 1, client=name[0])
        policy.queued(request, 0.0)
        queue.push(request, 0.0)
    first = queue.peek()
    assert first is not None
    assert first.id == "a2", "both have quanta left: the longest match"
    queue.remove(first)
    policy.admitted(first, 0.0)  # 16 tokens were not cached
    policy.generated([first] * 45, 0.0)  # 90 more: a's quantum is spent
    assert order_of(queue) == ["b1", "a1"]


# ---------------------------------------------------------------------- sjf


def sjf(**options: Any) -> ShortestJobFirst:
    return ShortestJobFirst.from_context(make_context(**options))


def test_sizes_are_prefill_plus_pessimistic_output() -> None:
    times = ServiceTimes(make_context(num_slots=4).costs, 4, 256, pessimism=0.25)
    # A step of four rows takes 1.04 ms, one of 256 prompt tokens 3.56 ms.
    assert times.token_s == pytest.approx(1.04e-3)
    assert times.prompt_token_s == pytest.approx(3.56e-3 / 256)
    request = predicted("r", 100.0, 200.0, prompt=64)
    assert times.remaining_tokens(request) == 125.0
    assert times.size_s(request) == pytest.approx(64 * 3.56e-3 / 256 + 125 * 1.04e-3)
    request.output_token_ids = [1] * 120
    assert times.remaining_tokens(request) == 5.0


def test_sjf_order_moves_as_it_should() -> None:
    policy = sjf()
    base = policy.key(predicted("r", 50, 80), 0.0)
    assert policy.key(predicted("r", 51, 80), 0.0) > base, "longer: later"
    assert policy.key(predicted("r", 50, 120), 0.0) > base, "less certain: later"
    assert policy.key(predicted("r", 50, 80, prompt=9), 0.0) > base, "a longer prompt: later"
    assert policy.key(predicted("r", 50, 80, arrival=1.0), 0.0) > base, "came later: later"
    waiting = predicted("r", 50, 80)
    assert policy.key(waiting, 7.9) == base, "keys do not change with time"
    assert policy.key(waiting, 8.0) < policy.key(predicted("s", 1.0, arrival=5.0), 8.0), "only the class"
    assert policy.key_until(waiting, 0.0) == 8.0
    batch = predicted("b", 50, 80, priority=1)
    assert policy.key_until(batch, 0.0) == 60.0


def test_age_lets_a_long_request_overtake_fresh_short_ones() -> None:
    policy = ShortestJobFirst(ServiceTimes(make_context().costs, 4, 256), max_wait_s=1e6, gamma=0.5)
    long, short_size = predicted("long", 1000), 10 * 1.04e-3
    gap_s = (policy.key(long, 0.0)[1] - policy.key(predicted("s", 10), 0.0)[1]) / 0.5
    assert policy.key(predicted("s", 10, arrival=0.99 * gap_s), 0.0) < policy.key(long, 0.0)
    assert policy.key(predicted("s", 10, arrival=1.01 * gap_s), 0.0) > policy.key(long, 0.0)
    assert short_size > 0


@pytest.mark.parametrize("ordering", ["sjf", "priority", "mlfq"])
def test_nobody_waits_longer_than_the_cap_and_those_promoted_before(ordering: str) -> None:
    """Short requests arrive faster than they can be served, for ever; a long one comes early."""
    clock = ManualClock()
    core, _ = engine(clock, ordering=ordering, num_slots=2, pipeline_depth=0, max_wait_s=2.0)
    long = make_request("long", [1] * 300, 200, arrival=0.5)
    flood = [make_request(f"s{i}", [1] * 4, 8, arrival=0.038 * i) for i in range(1500)]
    serve(core, clock, [long, *flood])
    assert long.first_scheduled_time is not None
    waited = long.first_scheduled_time - long.arrival_time
    # Two slots serve 25 requests of eight steps a second, 26.3 come: at most 3 of the queue are promoted
    # before it, and the promoted are served by arrival.
    assert 0.0 < waited <= 2.0 + 0.5


def test_sjf_preempts_only_early_only_for_a_gain_and_only_if_that_pays() -> None:
    policy = sjf(num_slots=2)
    head = predicted("head", 10)

    def running(median: float, generated: int, prompt: int = 4) -> Request:
        request = predicted("run", median, prompt=prompt)
        policy.queued(request, 0.0)
        request.output_token_ids = [1] * generated
        request.num_computed_tokens = prompt + generated
        request.num_tokens = prompt + generated + 1
        return request

    early = running(1000, 100)
    assert policy.preempts([running(30, 1), early], head, 0.0) is early, "the longest"
    assert policy.preempts([early], head, 0.0) is None, "once a slice"
    assert policy.preempts([running(1000, 801)], head, 0.0) is None, "most of it is done"
    assert policy.preempts([running(12, 1)], head, 0.0) is None, "no gain"
    assert policy.preempts([running(100, 1, prompt=9000)], head, 0.0) is None, "it would cost more"
    assert policy.preempts([running(1000, 100)], head, 8.0) is None, "a promoted head waits for its turn"
    prefilling = running(1000, 0, prompt=40)
    prefilling.num_computed_tokens = 20
    assert policy.preempts([prefilling], head, 0.0) is None, "its prompt is being computed"


def test_an_outgrown_prediction_makes_a_request_as_long_as_its_slice() -> None:
    policy = sjf()
    request = predicted("r", 20, 30)
    policy.queued(request, 0.0)
    request.output_token_ids = [1] * 30
    policy.generated([request], 0.0)
    assert policy.factors(request)["slices"] == 0
    request.output_token_ids.append(1)
    policy.generated([request], 0.0)
    assert policy.factors(request)["slices"] == 1
    assert policy.factors(request)["size_s"] == pytest.approx(512 * 1.04e-3)
    request.output_token_ids = [1] * (31 + 513)
    policy.generated([request], 0.0)
    assert policy.factors(request)["size_s"] == pytest.approx(1024 * 1.04e-3), "twice as long"
    policy.left(request, 0.0, was_waiting=False)
    assert not (policy._slices or policy._ends or policy._initial)


def test_sjf_in_the_engine_serves_short_before_long_and_preempts() -> None:
    clock = ManualClock()
    lengths = {"long": 400, "mid": 50, "short": 5}

    class Known:
        def predict(self, request: Request) -> tuple[float, float]:
            return (lengths[request.id], lengths[request.id])

        def observe(self, request: Request) -> None:
            pass

    core, executor = engine(clock, ordering="sjf", num_slots=1, predictor=Known(), max_wait_s=60.0)
    long = make_request("long", [1] * 4, 400)
    core.add(long)
    for _ in range(20):
        core.step()
    for name in ("mid", "short"):
        core.add(make_request(name, [1] * 4, lengths[name]))
    while core.has_work:
        core.step()
        core.scheduler.check_integrity()
    order = [a.request_id for plan in executor.plans for a in plan.admissions]
    assert order == ["long", "short", "mid", "long"]
    assert long.num_preemptions == 1
    assert len(long.output_token_ids) == 400


# ---------------------------------------------------------------------- mlfq


def test_mlfq_joins_by_prompt_falls_by_use_and_rises_by_waiting() -> None:
    times = ServiceTimes(make_context().costs, 4, 256)
    policy = SkipJoinFeedback(times, first_quantum_s=4 * times.token_s, max_wait_s=3.0)
    short, long = make_request("short", [1] * 4, 999), make_request("long", [1] * 3000, 999)
    for request in (short, long):
        policy.queued(request, 0.0)
        policy.key(request, 0.0)
    assert policy.level(short) == 0
    # 3000 prompt tokens take 41.7 ms; the quanta are 4.16, 8.32, 16.6, 33.3, 66.6 ms.
    assert policy.level(long) == 4
    policy.admitted(short, 0.0)
    for count in range(1, 13):
        policy.generated([short], 0.0)
        assert policy.level(short) == (0 if count < 4 else 1 if count < 12 else 2)
    assert policy.key(long, 2.9)[0] == 4
    assert policy.key(long, 3.0)[0] == -1.0, "starved"
    policy.admitted(long, 3.0)
    assert policy.level(long) == 0
    head = make_request("head", [1] * 4, 9)
    policy.queued(head, 3.0)
    policy.key(head, 3.0)
    short.num_computed_tokens = 20
    assert policy.preempts([long, short], head, 3.0) is short
    for request in (short, long, head):
        policy.left(request, 3.0, was_waiting=False)
    assert not (policy._levels or policy._used_s or policy._queued_at)


# ---------------------------------------------------------------------- priority


def scored(**options: Any) -> ScoredPriority:
    policy = ScoredPriority.from_context(make_context(ttft_slo_s=2.0, **options))
    for index, median in enumerate((10, 50, 100, 500)):
        policy.queued(predicted(f"seen{index}", median, client="other"), 0.0)
    return policy


def test_each_factor_moves_the_score_in_its_direction() -> None:
    policy = scored()
    base = policy.key(predicted("r", 100), 1.0)
    assert policy.key(predicted("r", 100, priority=-1), 1.0) < base
    assert policy.key(predicted("r", 100, priority=3), 1.0) > base
    assert policy.key(predicted("r", 50), 1.0) < base
    assert policy.key(predicted("r", 100), 1.5) < base, "waiting and urgency"
    assert policy.key(predicted("r", 100, deadline=1.2), 1.0) < base
    served = predicted("s", 100, client="greedy")
    policy.queued(served, 0.0)
    policy.key(served, 0.0)
    policy.admitted(served, 0.0)
    policy.generated([served] * 500, 0.0)
    greedy, modest = (policy.key(predicted("r", 100, client=client), 1.0) for client in ("greedy", "x"))
    assert greedy > modest
    full = scored(page_occupancy=lambda: 0.95)
    small, large = (full.evaluate(predicted("r", 100, prompt=n), 0.0).load for n in (4, 400))
    assert 1.0 >= small > large >= 0.0
    assert policy.evaluate(predicted("r", 100), 0.0).load == 0.0, "memory counts only when it is short"


def test_factors_stay_between_zero_and_one() -> None:
    rng = random.Random(0)
    policy = scored(page_occupancy=lambda: 0.99)
    for index in range(300):
        request = predicted(
            f"r{index}", rng.lognormvariate(4, 2), prompt=rng.randint(1, 500), priority=rng.randint(-9, 9),
            arrival=rng.uniform(0, 50), deadline=rng.choice([None, rng.uniform(50, 90)]),
            client=f"c{index % 5}",
        )  # fmt: skip
        policy.queued(request, request.arrival_time)
        assert all(
            0.0 <= f <= 1.0 for f in policy.evaluate(request, request.arrival_time + rng.uniform(0, 60))
        )


def test_the_decision_log_reproduces_every_score_exactly() -> None:
    records: list[dict[str, Any]] = []
    clock = ManualClock()
    core, _ = engine(
        clock, ordering="priority", num_slots=2, max_wait_s=50.0, decision_log=DecisionLog(records.append)
    )
    rng = random.Random(2)
    requests = [
        make_request(f"r{i}", [1] * rng.randint(1, 60), rng.randint(2, 30), arrival=0.03 * i,
                     priority=rng.randint(-2, 2), client=f"c{i % 3}")
        for i in range(80)
    ]  # fmt: skip
    serve(core, clock, requests)
    admitted = [record for record in records if record["decision"] == "admit"]
    assert len(admitted) == 80
    for record in admitted:
        assert record["key"][1] == -score_of(DEFAULT_WEIGHTS, Factors(**record["factors"]))
    composed = [record for record in records if record["decision"] == "compose"]
    assert all(0 <= record["granted"] <= record["budget_left"] for record in composed)


def test_preemptions_are_logged_with_their_cause() -> None:
    records: list[dict[str, Any]] = []
    core, _ = make_core(
        num_slots=4, num_pages=13, page_size=4, watermark_pages=0, decision_log=DecisionLog(records.append)
    )
    requests = [make_request(f"r{i}", [i] * 8, 30) for i in range(4)]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    causes = [record["for"] for record in records if record["decision"] == "preempt"]
    assert len(causes) == sum(request.num_preemptions for request in requests) > 0
    assert set(causes) == {None}
    assert all(request.status is RequestStatus.FINISHED for request in requests)
