"""What is fixed when attention is traced."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionVariant:
    """One layer's kind of attention, as every implementation takes it.

    Attributes:
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys in (p - window, p]; None sees all of [0, p].
        soft_cap: scores become ``cap * tanh(score / cap)``.

    Raises:
        ValueError: for a value that is out of range.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale}: must be finite")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: must be at least 1, or None")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0.0):
            raise ValueError(f"soft_cap={self.soft_cap}: must be positive and finite, or None")
