"""What the engine measures about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import TracebackType

from jaxserve.core.plan import Bucket

STAGES = ("predict", "schedule", "prepare", "execute", "post_process", "learn")


@dataclasses.dataclass(slots=True)
class BucketStats:
    """Use of one compiled shape."""

    steps: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    mean_step_s: float = 0.0  # exponentially weighted, from launch (or its predecessor's end) to result


@dataclasses.dataclass(slots=True)
class EngineStats:
    """Counters since start. Times in seconds on the engine's clock."""

    steps: int = 0
    scheduled_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    stage_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    buckets: dict[Bucket, BucketStats] = dataclasses.field(default_factory=dict[Bucket, BucketStats])

    def stage_ms_per_step(self) -> dict[str, float]:
        """Mean host milliseconds of each stage; ``execute`` includes waiting for the device."""
        return {stage: 1e3 * seconds / max(self.steps, 1) for stage, seconds in self.stage_s.items()}

    def padding_share(self) -> float:
        """Share of computed tokens that were padding."""
        buckets = list(self.buckets.values())  # at once: another thread's step may add one
        padded = sum(stats.padded_tokens for stats in buckets)
        return padded / max(padded + sum(stats.tokens for stats in buckets), 1)


class StageTimer:
    """Adds the time spent in a ``with`` block to one stage."""

    __slots__ = ("_clock", "_stage", "_start", "_stats")

    def __init__(self, stats: EngineStats, stage: str, clock: Callable[[], float]) -> None:
        self._stats = stats
        self._stage = stage
        self._clock = clock
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stats.stage_s[self._stage] += self._clock() - self._start
