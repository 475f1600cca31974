"""Contexts for policies, and engines that serve long streams of requests quickly."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.config import SchedulerConfig
from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import CostModel, StepCost, StepFeatures
from jaxserve.core.plan import Bucket, StepPlan, StepResult
from jaxserve.core.policy import PolicyContext
from jaxserve.request import Request


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
    return PolicyContext(
        config=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
        num_slots=num_slots,
        token_budget=chunk_sizes[-1],
        chunk_sizes=chunk_sizes,
        costs=CostModel(cost or LinearCost()),
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
        return StepResult([1] * len(handle.rows), device_s=1e-3)
