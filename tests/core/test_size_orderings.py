"""Orderings by predicted size, by use, and by score: what they promise, by hand and under hostile streams."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.policies.mlfq import SkipJoinFeedback
from jaxserve.core.policies.priority import DEFAULT_WEIGHTS, Factors, ScoredPriority, score_of
from jaxserve.core.policies.sizes import ServiceTimes
from jaxserve.core.policies.sjf import ShortestJobFirst
from jaxserve.request import Request, RequestStatus
from tests.support.engine_parts import ManualClock, make_core, make_request
from tests.support.policy_parts import engine, make_context, predicted, serve

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
    for generated, slices in ((544 + 1024, 2), (544 + 1025, 3)):
        request.output_token_ids = [1] * generated
        policy.generated([request], 0.0)
        assert policy.factors(request)["slices"] == slices
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


@pytest.mark.parametrize(("quantum", "is_fair"), [(512.0, True), (float("inf"), False)])
def test_a_client_with_short_requests_does_not_take_everything(quantum: float, is_fair: bool) -> None:
    """Two clients always wait; by size alone, the one with long requests would never be served."""
    clock = ManualClock()
    core, _ = engine(clock, ordering="sjf", num_slots=4, pipeline_depth=0, max_wait_s=1e6)
    # The engine's own ordering, with another quantum: the rest of the scheduler is as it serves.
    core.scheduler._policies.ordering._quantum = quantum  # type: ignore[attr-defined]
    for i in range(400):
        core.add(make_request(f"short-{i}", [1] * 8, 8, client="short"))
    for i in range(100):
        core.add(make_request(f"long-{i}", [1] * 64, 64, client="long"))
    served = {"short": 0.0, "long": 0.0}
    for _ in range(600):
        updates = core.step()
        for request in updates.requests:
            served[request.client] += 2
        for request in updates.ended:
            served[request.client] += request.num_prompt_tokens
        clock.now += 0.01
    assert core.scheduler.stats().num_waiting > 100, "both still wait"
    if is_fair:
        # A quantum, and what may be under way in four slots: 2 x (64 + 2 x 64) each at most.
        assert abs(served["short"] - served["long"]) <= quantum + 4 * 192
    else:
        assert served["long"] == 0.0


def test_promoted_requests_come_before_all_clients() -> None:
    policy = ShortestJobFirst(ServiceTimes(make_context().costs, 4, 256), max_wait_s=8.0, quantum=100.0)
    rich, poor = predicted("rich", 10, client="rich"), predicted("poor", 10, client="poor", arrival=5.0)
    policy.queued(rich, 0.0)
    policy.queued(poor, 5.0)
    policy._clients.counters["rich"] += 1000.0
    assert policy.lane_key(policy.lane(poor, 7.9)) < policy.lane_key(policy.lane(rich, 7.9))
    assert policy.lane_key(policy.lane(rich, 8.0)) < policy.lane_key(policy.lane(poor, 8.0))
    assert policy.key(rich, 8.0) < policy.key(poor, 8.0)


def test_a_preempted_request_does_not_stand_still_for_long() -> None:
    policy = sjf(max_wait_s=1000.0)
    stopped = predicted("stopped", 4000)
    policy.queued(stopped, 0.0)
    policy.admitted(stopped, 0.0)
    stopped.num_preemptions = 1
    policy.queued(stopped, 1.0)
    for step in range(200):
        assert policy.lane(stopped, 1.0) == stopped.client, step
        left = 200 - step
        assert policy.key_until(stopped, 1.0) == pytest.approx(1.0 + left * policy._times.token_s)
        policy.generated([], 1.0)
    fresh = predicted("fresh", 1)
    policy.queued(fresh, 1.0)
    assert policy.key(stopped, 1.0) < policy.key(fresh, 1.0)
    assert policy.lane_key(policy.lane(stopped, 1.0)) < policy.lane_key(policy.lane(fresh, 1.0))
    # It runs, and nobody takes its slot for ten steps.
    policy.admitted(stopped, 1.0)
    stopped.output_token_ids, stopped.num_computed_tokens, stopped.num_tokens = [1] * 9, 13, 14
    for _ in range(10):
        assert policy.preempts([stopped], fresh, 1.0) is None
        policy.generated([], 1.0)
    assert policy.preempts([stopped], fresh, 1.0) is stopped


def test_who_never_ran_has_the_wait_cap_and_no_idle_rule() -> None:
    policy = sjf(max_wait_s=1000.0)
    waiting = predicted("waiting", 4000)
    policy.queued(waiting, 0.0)
    for _ in range(300):
        policy.generated([], 0.0)
    assert policy.lane(waiting, 1.0) == waiting.client
    assert policy.key_until(waiting, 1.0) == 1000.0


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


def test_who_has_waited_too_long_comes_by_arrival_whatever_the_score() -> None:
    policy = scored()
    first, second = predicted("low", 500, priority=3), predicted("high", 5, priority=-3, arrival=1.0)
    fresh = predicted("fresh", 5, priority=-3, arrival=99.0)
    keys = [policy.key(request, 100.0) for request in (first, second, fresh)]
    assert keys == sorted(keys)
    assert policy.key(first, 50.0) > policy.key(second, 50.0), "a low tier has a longer cap"


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
