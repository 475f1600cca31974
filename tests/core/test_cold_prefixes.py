"""The prefix cache on two tiers: what goes to the host, what comes back, and that nobody stalls or leaks."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cold_prefixes import ColdStats
from jaxserve.core.plan import NO_SLOT, StepPlan
from jaxserve.core.policies.registry import ORDERINGS
from jaxserve.core.prefix_cache import PrefixCacheStats
from jaxserve.core.resume_costs import NO_HOST, HostTier
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens
from tests.support.random_traffic import hold_conversations

PAGE, BLOCK = 4, 2
PAGE_BYTES = 500
DEPTHS = (0, 1, 2)


def tier(num_blocks: int = 64, bytes_s: float = 1e12) -> HostTier:
    return HostTier(num_blocks, BLOCK, BLOCK * PAGE_BYTES, bytes_s)


class TickingClock(ManualClock):
    """A hundredth of a second passes whenever somebody looks."""

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def two_tiers(**options: Any) -> tuple[EngineCore[object], FakeExecutor]:
    """A device of 16 pages."""
    small: dict[str, Any] = {
        "num_slots": 4,
        "clock": TickingClock(),
        "num_pages": 17,
        "page_size": PAGE,
        "watermark_pages": 0,
    }
    small |= {"token_budget": 64, "host": tier()}
    return make_core(**small | options)


def prompt(*parts: int) -> list[int]:
    """A page for each number."""
    return [(7 * part + i) % 101 for part in parts for i in range(PAGE)]


def ask(core: EngineCore[Any], name: str, tokens: list[int], max_tokens: int = 1, **options: Any) -> Request:
    request = make_request(name, tokens, max_tokens, **options)
    core.add(request)
    run_to_end(core)
    want = expected_tokens(tokens, request.seed, len(request.output_token_ids))
    assert request.output_token_ids == want
    return request


def cache_stats(core: EngineCore[Any]) -> PrefixCacheStats:
    stats = core.scheduler.prefix_cache_stats()
    assert stats is not None
    return stats


def host_stats(core: EngineCore[Any]) -> ColdStats:
    stats = cache_stats(core).host
    assert stats is not None
    return stats


def plans(fake: FakeExecutor) -> list[StepPlan]:
    return [batch.plan for batch in fake.batches]


def push_out(core: EngineCore[Any], count: int = 3) -> None:
    """Other prompts take all pages of the device."""
    for index in range(count):
        ask(core, f"push{index}", prompt(*range(40 + 12 * index, 52 + 12 * index)))


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_was_evicted_is_loaded_and_not_computed(depth: int) -> None:
    core, fake = two_tiers(pipeline_depth=depth)
    ask(core, "a", [*prompt(1, 2, 3, 4, 5, 6), 9])
    push_out(core)
    computed = fake.num_computed_tokens
    again = ask(core, "b", [*prompt(1, 2, 3, 4, 5, 6), 8, 7])
    assert again.num_cached_tokens == 24
    assert fake.num_computed_tokens - computed == 2
    stats = cache_stats(core)
    assert stats.host_hit_tokens > 0
    assert stats.hit_tokens == 24
    host = host_stats(core)
    assert host.loaded_bytes == stats.host_hit_tokens // PAGE * PAGE_BYTES
    assert host.saved_bytes == host.loaded_bytes + host.wasted_bytes + host.num_host_pages * PAGE_BYTES
    copies = [copy for plan in plans(fake) for copy in (*plan.saves, *plan.loads)]
    assert {(copy.request_id, copy.slot) for copy in copies} == {("", NO_SLOT)}


def test_without_a_tier_or_with_a_slow_one_it_is_computed_again() -> None:
    for host in (NO_HOST, tier(bytes_s=1.0)):
        core, fake = two_tiers(host=host)
        ask(core, "a", prompt(1, 2, 3, 4, 5, 6))
        push_out(core)
        assert ask(core, "b", [*prompt(1, 2, 3, 4, 5, 6), 8]).num_cached_tokens == 0
        assert not any(plan.saves or plan.loads for plan in plans(fake))


def test_a_slower_link_moves_the_decision() -> None:
    """Saved over a fast link; when it has become slow, computing is sooner done, and replaces it."""
    core, fake = two_tiers()
    ask(core, "a", prompt(1, 2, 3, 4, 5, 6))
    push_out(core)
    cold = core.scheduler._kv.cold
    assert cold is not None
    before, wasted = cold._tree.num_host_pages, host_stats(core).wasted_bytes
    cold._costs._host = tier(bytes_s=1.0)
    computed = fake.num_computed_tokens
    again = ask(core, "b", [*prompt(1, 2, 3, 4, 5, 6), 8])
    assert fake.num_computed_tokens - computed == 25 - again.num_cached_tokens > 8
    assert cold._tree.num_host_pages < before
    assert host_stats(core).wasted_bytes > wasted, "what was computed again is given up on the host"


def test_others_run_while_a_prefix_is_loaded() -> None:
    fake = FakeExecutor(4, PAGE, load_steps=5)
    core, _ = two_tiers(executor=fake)
    ask(core, "a", prompt(1, 2, 3, 4, 5, 6))
    push_out(core)
    core.add(make_request("runs", prompt(90), 20))
    core.step()
    waiting = make_request("waits", [*prompt(1, 2, 3, 4, 5, 6), 8], 2)
    behind = make_request("behind", prompt(95), 2)
    core.add(waiting)
    core.add(behind)
    run_to_end(core)
    begun = next(plan.step for plan in plans(fake) if plan.loads)
    landed = next(plan for plan in plans(fake) if plan.landings)
    assert landed.step - begun >= 5
    between = [plan for plan in plans(fake) if begun <= plan.step < landed.step]
    assert all("runs" in plan.rows.request_ids and "waits" not in plan.rows.request_ids for plan in between)
    assert any("behind" in plan.rows.request_ids for plan in between), "nobody is held up behind it"
    assert "waits" in landed.rows.request_ids
    assert waiting.num_cached_tokens == 24


def test_two_requests_wait_for_one_load() -> None:
    fake = FakeExecutor(4, PAGE, load_steps=4)
    core, _ = two_tiers(executor=fake)
    ask(core, "a", prompt(1, 2, 3, 4, 5, 6))
    push_out(core)
    requests = [make_request(f"b{i}", [*prompt(1, 2, 3, 4, 5, 6), 8 + i], 2) for i in range(2)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert [request.num_cached_tokens for request in requests] == [24, 24]
    loaded = [page for plan in plans(fake) for load in plan.loads for page in load.pages if page > 0]
    assert len(loaded) == len(set(loaded)) <= 6


def test_a_load_goes_on_when_its_request_leaves() -> None:
    for steps in range(1, 8):
        fake = FakeExecutor(4, PAGE, load_steps=4)
        core, _ = two_tiers(executor=fake)
        ask(core, "a", prompt(1, 2, 3, 4, 5, 6))
        push_out(core)
        core.add(make_request("runs", prompt(90), 20))
        core.add(make_request("leaves", [*prompt(1, 2, 3, 4, 5, 6), 8], 2))
        for _ in range(steps):
            core.step()
            core.scheduler.check_integrity()
        core.end("leaves", FinishReason.ABORT)
        core.scheduler.check_integrity()
        run_to_end(core)
        assert host_stats(core).num_loads == 0
        assert core.scheduler.stats().num_used_pages == 0
        assert ask(core, "b", [*prompt(1, 2, 3, 4, 5, 6), 8]).num_cached_tokens == 24


def test_the_less_valuable_leaves_the_host() -> None:
    """Four blocks: what was used three times stays, of what was used once the older goes."""
    clock = TickingClock()
    core, _ = two_tiers(host=tier(num_blocks=6), clock=clock)
    for _ in range(3):
        ask(core, "often", prompt(1, 2, 3, 4))
    for index in range(8):
        clock.now += 20.0
        ask(core, f"once{index}", prompt(*range(20 + 8 * index, 28 + 8 * index)))
    assert host_stats(core).wasted_bytes > 0
    assert ask(core, "again", [*prompt(1, 2, 3, 4), 1]).num_cached_tokens == 16
    assert ask(core, "gone", [*prompt(*range(20, 28)), 1]).num_cached_tokens < 32


def test_preempted_requests_take_blocks_from_prefixes() -> None:
    """The host is full of prefixes that were used long ago; a request that will go on is worth more."""
    clock = TickingClock()
    core, fake = two_tiers(host=tier(num_blocks=8), clock=clock)
    for index in range(6):
        ask(core, f"old{index}", prompt(*range(12 * index, 12 * index + 12)))
    assert host_stats(core).num_host_blocks == 8
    clock.now += 3000.0
    requests = [make_request(f"r{i}", range(i, i + 8), 24, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    swaps = core.scheduler.swap_stats()
    assert swaps.saved_tokens > 0
    assert swaps.resumed_tokens > 0
    assert swaps.num_used_blocks == 0
    for request in requests:
        assert request.output_token_ids == expected_tokens(list(request.prompt_token_ids), request.seed, 24)
    assert fake.num_computed_tokens > 0


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    depth=st.sampled_from(DEPTHS),
    num_pages=st.integers(26, 60),
    blocks=st.integers(1, 40),
    load_steps=st.integers(1, 6),
    decode_steps=st.integers(1, 4),
    abort_rate=st.sampled_from([0.0, 0.1, 0.3]),
    batching=st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
    ordering=st.sampled_from(sorted(ORDERINGS)),
    speed=st.sampled_from([1e12, 1e12, 1e6]),
)
def test_random_conversations_leak_nothing_on_two_tiers(
    seed: int,
    depth: int,
    num_pages: int,
    blocks: int,
    load_steps: int,
    decode_steps: int,
    abort_rate: float,
    batching: str,
    ordering: str,
    speed: float,
) -> None:
    """Turns that go on from answers, after pauses; the executor checks every key that a step reads."""
    rng, clock = random.Random(seed), ManualClock()
    fake = FakeExecutor(4, PAGE, bad_requests=frozenset({"r5", "r11"}), load_steps=load_steps)
    core, _ = make_core(
        num_slots=4, num_pages=num_pages, pipeline_depth=depth, batching=batching, clock=clock,
        ordering=ordering, executor=fake, max_wait_s=0.3, batch_window_s=0.02, max_decode_steps=decode_steps,
        host=tier(blocks, speed), watermark_pages=0, victim="value",
    )  # fmt: skip

    def check() -> None:
        core.scheduler.check_integrity()
        stats, host = core.scheduler.stats(), host_stats(core)
        free = core.scheduler._kv._pool.num_free
        assert free + stats.num_used_pages + stats.num_cached_pages == num_pages - 1
        # What is landing in the plan being made counts as neither.
        pool = core.scheduler._host._blocks.pool
        assert pool.num_free + core.scheduler.swap_stats().num_used_blocks + host.num_host_blocks <= blocks

    requests = hold_conversations(
        core, clock, rng, count=36, abort_rate=abort_rate, pauses_s=(0.01, 0.01, 2.0), check=check
    )
    for request in requests:
        if request.finish_reason is not FinishReason.ERROR:
            want = expected_tokens(
                list(request.prompt_token_ids), request.seed, len(request.output_token_ids)
            )
            assert request.output_token_ids == want
    host = host_stats(core)
    assert core.scheduler.swap_stats().num_used_blocks == 0
    on_host = PAGE_BYTES * host.num_host_pages
    assert host.saved_bytes == host.loaded_bytes + host.wasted_bytes + on_host
    assert host.preload_useful_bytes + host.preload_wasted_bytes <= host.preloaded_bytes <= host.loaded_bytes
