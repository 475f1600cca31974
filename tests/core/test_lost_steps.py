"""A device that cannot run a step: who ran gets an error, nothing it held is shared, and the others go on."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import StepResult
from jaxserve.core.resume_costs import NO_HOST, HostTier
from jaxserve.errors import StepFailedError
from jaxserve.request import FinishReason
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens
from tests.support.lossy_executor import LossyExecutor
from tests.support.random_traffic import hold_conversations


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(0, 2),
    share=st.sampled_from([0.02, 0.1, 0.3]),
    host=st.sampled_from([NO_HOST, HostTier(12, 2, 1000, 1e12), HostTier(12, 2, 1000, 1e5)]),
    caches=st.booleans(),
    batching=st.sampled_from(["continuous", "static"]),
    decode_steps=st.sampled_from([1, 3]),
)
def test_nobody_reads_what_was_lost_and_nothing_leaks(
    seed: int, depth: int, share: float, host: HostTier, caches: bool, batching: str, decode_steps: int
) -> None:
    rng, clock = random.Random(seed), ManualClock()
    executor = LossyExecutor(4, 4)
    executor.rng, executor.share = random.Random(seed + 1), share
    core, _ = make_core(
        num_slots=4, num_pages=26, pipeline_depth=depth, clock=clock, executor=executor, host=host,
        prefix_caching=caches, watermark_pages=0, batching=batching, max_decode_steps=decode_steps,
    )  # fmt: skip
    requests = hold_conversations(
        core, clock, rng, count=24, abort_rate=0.1, pauses_s=(0.01, 0.01, 2.0),
        check=core.scheduler.check_integrity,
    )  # fmt: skip
    for request in requests:
        assert request.is_finished
        assert (request.error is not None) == (request.finish_reason is FinishReason.ERROR)
        want = expected_tokens(list(request.prompt_token_ids), request.seed, len(request.output_token_ids))
        assert request.output_token_ids == want
    stats = core.scheduler.stats()
    assert (stats.num_used_pages, stats.num_running, stats.num_held, stats.num_waiting) == (0, 0, 0, 0)
    failed = [request for request in requests if request.finish_reason is FinishReason.ERROR]
    assert executor.num_failures > 0 or not failed


class FailingOnce(LossyExecutor):
    """Loses everything with the first step whose plan has a certain part."""

    part = ""

    def fail_sometimes(self) -> None:
        self.share = float(self.num_failures == 0 and bool(self.batches))
        self.share *= any(getattr(batch.plan, self.part) for batch in self.batches[-1:])
        super().fail_sometimes()


@pytest.mark.parametrize("part", ["preempted_ids", "saves", "loads", "landings"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_copies_and_preempted_rows_are_lost_with_the_step(part: str, depth: int) -> None:
    """Who was preempted goes on only if all of its tokens are known, and computes anew what was not saved."""
    executor = FailingOnce(4, 4)
    executor.part = part
    core, _ = make_core(
        num_slots=4, num_pages=17, page_size=4, watermark_pages=0, pipeline_depth=depth, executor=executor,
        host=HostTier(64, 2, 1000, 1e12), prefix_caching=False,
    )  # fmt: skip
    requests = [make_request(f"r{i}", range(i, i + 8), 24, seed=i) for i in range(4)]
    for request in requests:
        core.add(request)
    for _ in range(1000):
        core.step()
        core.scheduler.check_integrity()
        if executor.num_failures:
            break
    scheduler = core.scheduler
    assert executor.num_failures == 1
    assert (scheduler.stats().num_used_pages, scheduler.stats().num_cached_pages) == (0, 0)
    assert (scheduler.swap_stats().num_used_blocks, scheduler._host._copies._under_way) == (0, set())
    going_on = [request for request in requests if not request.is_finished]
    assert all(request.num_pending_tokens == 0 for request in going_on)
    run_to_end(core)
    assert {request.finish_reason for request in going_on} <= {FinishReason.LENGTH}
    for request in requests:
        want = expected_tokens(list(request.prompt_token_ids), request.seed, len(request.output_token_ids))
        assert request.output_token_ids == want
        assert request.is_finished


@pytest.mark.parametrize("part", ["loads", "landings"])
@pytest.mark.parametrize("depth", [0, 1])
def test_prefixes_on_their_way_from_the_host_are_lost_with_the_step(part: str, depth: int) -> None:
    executor, clock = FailingOnce(4, 4), ManualClock()
    executor.part = part
    core, _ = make_core(
        num_slots=4, num_pages=17, page_size=4, watermark_pages=0, token_budget=64, pipeline_depth=depth,
        executor=executor, host=HostTier(64, 2, 1000, 1e12), clock=clock,
    )  # fmt: skip
    prompts = [[(31 * i + j) % 101 for j in range(20)] for i in range(6)]
    for index, prompt in enumerate(prompts):  # the first of them go to the host
        clock.now += 1.0
        core.add(make_request(f"r{index}", prompt, 1))
        run_to_end(core)
    core.add(make_request("busy", [50], 30))  # so that steps run while the prefix is on its way
    for _ in range(3):
        core.step()
    again = make_request("again", [*prompts[0], 1, 2, 3], 4, seed=5)
    core.add(again)
    while not executor.num_failures:
        clock.now += 0.01
        core.step()
    core.scheduler.check_integrity()
    assert again.finish_reason is FinishReason.ERROR
    stats, host = core.scheduler.stats(), core.scheduler.prefix_cache_stats()
    assert (stats.num_used_pages, stats.num_cached_pages) == (0, 0)
    assert host is not None
    assert host.host is not None
    assert (host.num_nodes, host.host.num_host_pages, host.host.num_loads) == (0, 0, 0)
    assert core.scheduler._host._copies._under_way == set()
    once_more = make_request("once more", [*prompts[0], 1, 2, 3], 4, seed=5)
    core.add(once_more)
    run_to_end(core)
    assert once_more.output_token_ids == expected_tokens([*prompts[0], 1, 2, 3], 5, 4)


def failing_at(step: int, times: int = 1, **options: Any) -> tuple[Any, FakeExecutor]:
    """A core whose executor cannot run some of its steps."""

    class Failing(FakeExecutor):
        num_calls = 0

        def dispatch(self, batch: StepBatch) -> StepResult:
            self.num_calls += 1
            if step <= self.num_calls < step + times:
                raise StepFailedError("no memory for a step")
            return super().dispatch(batch)

    return make_core(num_slots=2, executor=Failing(2, 4), **options)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_who_ran_gets_the_error_and_who_waited_an_answer(
    depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    core, _ = failing_at(4, pipeline_depth=depth)
    requests = [make_request(f"r{i}", range(i, i + 9), 12, seed=i) for i in range(5)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    ran, waited = requests[:2], requests[2:]
    assert [(r.finish_reason, r.error) for r in ran] == [(FinishReason.ERROR, "no memory for a step")] * 2
    assert [r.finish_reason for r in waited] == [FinishReason.LENGTH] * 3
    assert [r.output_token_ids for r in waited] == [
        expected_tokens(list(r.prompt_token_ids), r.seed, 12) for r in waited
    ]
    assert core.stats.finished == {"error": 2, "length": 3}
    assert core.scheduler.stats().num_used_pages == 0
    assert "no memory for a step; it ended 2 requests" in caplog.text


def test_a_prompt_that_others_share_is_computed_again() -> None:
    """What the lost device had of it is found by nobody."""
    core, _ = failing_at(3, pipeline_depth=0)
    prompt = list(range(16))
    core.add(make_request("first", prompt, 12))
    run_to_end(core)
    again = make_request("again", prompt, 3)
    core.add(again)
    run_to_end(core)
    assert again.num_cached_tokens == 0
    assert again.output_token_ids == expected_tokens(prompt, 0, 3)


def test_an_executor_that_only_fails_ends_the_engine() -> None:
    core, _ = failing_at(1, times=100, pipeline_depth=1)
    for index in range(10):
        core.add(make_request(f"r{index}", [index], 3))
    for _ in range(3):
        assert [request.error for request in core.step().ended] == ["no memory for a step"] * 2
    with pytest.raises(StepFailedError, match="no memory for a step"):
        core.step()
    core.stop(FinishReason.ERROR, "the engine failed")
    assert core.stats.finished == {"error": 10}
    core.scheduler.check_integrity()
    assert core.scheduler.stats().num_used_pages == 0


def test_three_failures_between_successes_are_survived() -> None:
    core, _ = failing_at(2, times=3, pipeline_depth=0)
    for index in range(10):
        core.add(make_request(f"r{index}", [index], 3))
    run_to_end(core)
    assert core.stats.finished == {"error": 6, "length": 4}
