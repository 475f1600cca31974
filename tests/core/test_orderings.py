"""What every ordering promises, with keys worked out by hand and streams meant to break it."""

from __future__ import annotations

import dataclasses
import random
from typing import get_args

import pytest

from jaxserve import config
from jaxserve.core.policies import registry
from jaxserve.core.policies.dlpm import DeficitLongestPrefixMatch
from jaxserve.core.policies.fair import VirtualTokenCounters
from jaxserve.core.policies.lpm import LongestPrefixMatch
from jaxserve.core.policies.spf import ShortestPrefillFirst
from jaxserve.core.waiting_queue import WaitingQueue
from jaxserve.request import Request
from tests.support.engine_parts import ManualClock, make_core, make_request
from tests.support.policy_parts import STEP_S, LightExecutor, engine


def order_of(queue: WaitingQueue) -> list[str]:
    names: list[str] = []
    while (request := queue.peek()) is not None:
        names.append(request.id)
        queue.remove(request)
    return names


# ---------------------------------------------------------------------- registry and queue


def test_flags_offer_exactly_what_is_registered() -> None:
    assert set(get_args(config.Ordering)) == set(registry.ORDERINGS)
    assert set(get_args(config.Batching)) == set(registry.ADMISSIONS)
    assert set(get_args(config.Composition)) == set(registry.COMPOSITIONS)
    assert set(get_args(config.Capacity)) == set(registry.CAPACITIES)
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

    def lane(self, request: Request, now: float) -> str:
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
    core.add(make_request("short", range(60, 65), 2, arrival=0.0))
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
        core.add(make_request(f"flood-{index}", [index] * 64, rng.randint(20, 60), client="flood"))
    for index in range(600):
        core.add(make_request(f"calm-{index}", [2000 + index] * 16, rng.randint(5, 20), client="calm"))
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
