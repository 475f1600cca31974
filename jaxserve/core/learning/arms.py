"""The configurations that learning chooses from."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from jaxserve.config import Capacity, Ordering, SchedulerConfig
from jaxserve.core.buckets import BucketLadder

# Others keep a promise (fairness, priorities) that a better number is no reason to break.
INTERCHANGEABLE_ORDERINGS: Final[tuple[Ordering, ...]] = ("fcfs", "sjf", "mlfq")
_CAPACITIES: Final[tuple[Capacity, ...]] = ("watermark", "predicted")
_BUDGET_DIVISORS: Final = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """Values of the scheduler's options that may change while it runs.

    Attributes:
        max_num_batched_tokens: most tokens of a step; below the largest compiled shape it is a cap.
        ordering: of the waiting queue; a victim policy that is ``auto`` goes with it.
        capacity: the pressure on the KV pages: ``watermark`` is aggressive, ``predicted`` conservative.
    """

    max_num_batched_tokens: int
    ordering: Ordering | str
    capacity: Capacity | str

    @property
    def name(self) -> str:
        return f"{self.max_num_batched_tokens}-{self.ordering}-{self.capacity}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def default_arm(config: SchedulerConfig, ladder: BucketLadder) -> Arm:
    """What the configuration says."""
    return Arm(ladder.token_budget, config.ordering, config.capacity)


def make_arms(config: SchedulerConfig, ladder: BucketLadder, num_slots: int) -> tuple[Arm, ...]:
    """Token budgets x orderings x pressures, 24 at most; the first is what the configuration says.

    Budgets are the compiled shapes nearest below the whole, a half, a quarter and an eighth of the largest;
    all exceed the slots, so that a step which decodes in all of them has room for a prompt. A configured
    ordering that is not `INTERCHANGEABLE_ORDERINGS` stays.
    """
    default = default_arm(config, ladder)
    limits = [ladder.token_budget // divisor for divisor in _BUDGET_DIVISORS]
    shapes = [size for size in ladder.mixed_tokens if size > num_slots]
    budgets = {max(fitting) for limit in limits if (fitting := [size for size in shapes if size <= limit])}
    is_free = config.ordering in INTERCHANGEABLE_ORDERINGS
    orderings = INTERCHANGEABLE_ORDERINGS if is_free else (config.ordering,)
    arms = [
        Arm(budget, ordering, capacity)
        for budget in sorted(budgets, reverse=True)
        for ordering in orderings
        for capacity in _CAPACITIES
    ]
    return (default, *(arm for arm in arms if arm != default))
