"""The host tier: copies by hand, invariants under random traffic, and tokens that stay what they were."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.cost_model import CostModel, UnknownDevice
from jaxserve.core.plan import NO_PAGE, StepPlan
from jaxserve.core.resume_costs import HostTier, ResumeCosts
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_core, make_request, random_prompt, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens

FAST = HostTier(num_blocks=64, block_pages=2, block_bytes=1000, bytes_s=1e12)
SLOW = HostTier(num_blocks=64, block_pages=2, block_bytes=1000, bytes_s=1.0)
SMALL: dict[str, Any] = {"num_slots": 4, "num_pages": 17, "page_size": 4, "watermark_pages": 0}


def plans(fake: FakeExecutor) -> list[StepPlan]:
    return [batch.plan for batch in fake.batches]


def pressed(**options: Any) -> tuple[EngineCore[object], FakeExecutor, list[Request]]:
    """Four requests of 8 + 24 tokens in pages for two of them."""
    core, fake = make_core(**SMALL | options)
    requests = [make_request(f"r{i}", range(i, i + 8), 24, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    return core, fake, requests


def assert_right(requests: list[Request]) -> None:
    for request in requests:
        wanted = expected_tokens(list(request.prompt_token_ids), request.seed, len(request.output_token_ids))
        assert request.output_token_ids == wanted


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("decode_steps", [1, 4])
def test_a_swapped_request_goes_on_where_it_was(depth: int, caches: bool, decode_steps: int) -> None:
    core, fake, requests = pressed(
        host=FAST, pipeline_depth=depth, prefix_caching=caches, max_decode_steps=decode_steps
    )
    run_to_end(core)
    assert_right(requests)
    assert all(len(request.output_token_ids) == 24 for request in requests)
    stats, swaps = core.scheduler.stats(), core.scheduler.swap_stats()
    assert stats.num_preemptions >= 2
    assert swaps.saved_tokens > 0
    assert swaps.resumed_tokens > 0
    assert swaps.num_used_blocks == 0
    assert stats.num_lost_tokens == 0
    assert any(plan.is_loop for plan in plans(fake)) == (decode_steps > 1)
    if not caches:  # no token was computed twice
        assert swaps.resumed_tokens == swaps.saved_tokens
        assert fake.num_computed_tokens - sum(7 + len(r.output_token_ids) for r in requests) <= 4 * depth


def test_without_a_tier_the_same_tokens_are_computed_again() -> None:
    core, _, requests = pressed(prefix_caching=False)
    run_to_end(core)
    assert_right(requests)
    assert core.scheduler.stats().num_lost_tokens > 20
    assert core.scheduler.swap_stats().saved_blocks == 0


def test_a_slow_link_is_not_used() -> None:
    core, fake, requests = pressed(host=SLOW)
    run_to_end(core)
    assert_right(requests)
    assert core.scheduler.stats().num_preemptions > 0
    assert not any(plan.saves or plan.loads for plan in plans(fake))


def test_a_full_tier_computes_the_rest() -> None:
    core, _, requests = pressed(host=HostTier(3, 2, 1000, 1e12), prefix_caching=False)
    run_to_end(core)
    assert_right(requests)
    assert core.scheduler.swap_stats().saved_blocks > 0
    assert core.scheduler.stats().num_lost_tokens > 0


def test_other_requests_run_while_a_load_is_under_way() -> None:
    core, fake, _ = pressed(host=FAST, prefix_caching=False)
    run_to_end(core)
    begun: dict[int, StepPlan] = {}
    waits: list[int] = []
    for plan in plans(fake):
        begun |= {load.number: plan for load in plan.loads}
        for number in plan.landings:
            load_plan = begun[number]
            waits.append(plan.step - load_plan.step)
            name = next(load.request_id for load in load_plan.loads if load.number == number)
            between = plans(fake)[load_plan.step : plan.step]
            assert all(row.request_id != name for step in between for row in step.rows)
            assert name in {admission.request_id for admission in plan.admissions}
            assert [row.num_tokens for row in plan.rows if row.request_id == name] == [1]
    assert max(waits) >= fake.load_steps


def test_what_the_prefix_cache_still_has_is_not_copied_back() -> None:
    core, fake = make_core(**SMALL, host=FAST)
    shared = list(range(8))
    requests = [make_request(f"r{i}", [*shared, i], 24, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert_right(requests)
    loads = [load for plan in plans(fake) for load in plan.loads]
    assert loads
    # Two pages of the prompt are shared with those that run: with blocks of two they need no block at all.
    saves = {save.request_id: save for plan in plans(fake) for save in plan.saves}
    assert all(
        len(load.blocks) < len(saves[load.request_id].blocks) or NO_PAGE in load.pages for load in loads
    )


def test_abort_in_every_state_frees_blocks_and_pages() -> None:
    for steps in range(4, 60):
        core, _, requests = pressed(host=FAST)
        for _ in range(steps):
            core.step()
        for request in requests:
            core.end(request.id, FinishReason.ABORT)
            core.scheduler.check_integrity()
        run_to_end(core)
        assert core.scheduler.swap_stats().num_used_blocks == 0
        assert core.scheduler.stats().num_used_pages == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.sampled_from([0, 1, 2]),
    blocks=st.integers(1, 24),
    caches=st.booleans(),
    victim=st.sampled_from(["latest", "most_remaining", "value"]),
    capacity=st.sampled_from(["watermark", "predicted"]),
    ordering=st.sampled_from(["fcfs", "mlfq", "sjf"]),
    load_steps=st.integers(1, 6),
    decode_steps=st.integers(1, 4),
)
def test_random_traffic_leaks_nothing(
    seed: int,
    depth: int,
    blocks: int,
    caches: bool,
    victim: str,
    capacity: str,
    ordering: str,
    load_steps: int,
    decode_steps: int,
) -> None:
    """`run_to_end` and the loop check every page and block after every step; the executor every KV entry."""
    rng, clock = random.Random(seed), ManualClock()
    fake = FakeExecutor(4, 4, load_steps=load_steps)
    core, _ = make_core(
        num_slots=4, num_pages=20, watermark_pages=0, pipeline_depth=depth, prefix_caching=caches,
        clock=clock, executor=fake, host=HostTier(blocks, 2, 1000, 1e12), victim=victim, capacity=capacity,
        ordering=ordering, max_wait_s=0.2, max_decode_steps=decode_steps,
    )  # fmt: skip
    requests: list[Request] = []
    for index in range(20):
        same = rng.choice(requests) if requests and rng.random() < 0.3 else None
        prompt = random_prompt(rng, 24) if same is None else list(same.prompt_token_ids)
        requests.append(make_request(f"r{index}", prompt, rng.randint(2, 40), seed=index, arrival=clock.now))
        core.add(requests[-1])
        for _ in range(rng.randint(0, 6)):
            core.step()
            core.scheduler.check_integrity()
            clock.now += 0.01
        if rng.random() < 0.15:
            core.end(rng.choice(requests).id, FinishReason.ABORT)
            core.scheduler.check_integrity()
    run_to_end(core)
    assert_right(requests)
    stats = core.scheduler.stats()
    assert stats.num_used_pages == 0
    assert core.scheduler.swap_stats().num_used_blocks == 0


def test_the_cheaper_way_moves_with_bandwidth_and_context() -> None:
    costs = CostModel(UnknownDevice())

    def resume(bytes_s: float) -> ResumeCosts:
        return ResumeCosts(costs, 64, 8, 16, HostTier(10, 4, 64_000, bytes_s))

    assert resume(1e9).prefers_swap(1000)
    assert not resume(1e4).prefers_swap(1000)
    assert resume(1e9).swap_s(1000) == pytest.approx(2 * 16 * 64_000 / 1e9)  # 63 pages are 16 blocks
    assert resume(1e9).recompute_s(2000) == pytest.approx(2 * resume(1e9).recompute_s(1000))
