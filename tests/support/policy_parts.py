"""Contexts for policies, and engines that serve long streams of requests quickly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxserve.config import SchedulerConfig
from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import CostModel, StepCost, StepFeatures
from jaxserve.core.plan import Bucket, StepPlan, StepResult
from jaxserve.core.policy import PolicyContext
from jaxserve.core.resume_costs import NO_HOST, ResumeCosts
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import Request
from tests.support.engine_parts import ManualClock, make_core, make_request

STEP_S = 0.01


class LinearCost:
    """Step times for mental arithmetic: a millisecond, and ten microseconds a token."""

    def __init__(self, step_s: float = 1e-3, token_s: float = 1e-5) -> None:
        self.step_s = step_s
        self.token_s = token_s

    def seconds(self, bucket: Bucket, features: StepFeatures) -> float:
        return self.step_s + self.token_s * features.tokens

    def floor(self, bucket: Bucket, features: StepFeatures) -> float:
        return 0.0


def make_context(
    *,
    num_slots: int = 4,
    chunk_sizes: tuple[int, ...] = (64, 256),
    cost: StepCost | None = None,
    matched_tokens: Callable[[Request], int] = lambda request: 0,
    page_occupancy: Callable[[], float] = lambda: 0.0,
    **scheduler: object,
) -> PolicyContext:
    """A context; ``scheduler`` are fields of `SchedulerConfig`."""
    costs = CostModel(cost or LinearCost())
    return PolicyContext(
        config=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
        num_slots=num_slots,
        token_budget=chunk_sizes[-1],
        chunk_sizes=chunk_sizes,
        costs=costs,
        resume=ResumeCosts(costs, chunk_sizes[-1], num_slots, 16, NO_HOST),
        page_size=16,
        matched_tokens=matched_tokens,
        page_occupancy=page_occupancy,
    )


class LightExecutor:
    """Computes nothing: every token is 1. Keeps the plans."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def dispatch(self, batch: StepBatch) -> StepPlan:
        self.plans.append(batch.plan)
        return batch.plan

    def collect(self, handle: StepPlan) -> StepResult:
        return StepResult([[1] * len(handle.rows)] * handle.num_decode_steps, device_s=1e-3)


def predicted(name: str, median: float, upper: float | None = None, **options: Any) -> Request:
    request = make_request(name, [1] * options.pop("prompt", 4), options.pop("max_tokens", 4096), **options)
    request.predicted_output_tokens = median
    request.predicted_output_upper = median if upper is None else upper
    return request


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
