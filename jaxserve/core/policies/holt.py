"""Holt's linear forecast of a rate that is counted in bins of time."""

from __future__ import annotations

from typing import final


@final
class HoltRate:
    """Level and trend of events a second (double exponential smoothing, Holt 1957).

    Args:
        bin_s: seconds in a bin.
        level_weight, trend_weight: of the newest bin.
    """

    def __init__(self, bin_s: float = 0.5, level_weight: float = 0.4, trend_weight: float = 0.2) -> None:
        self._bin_s = bin_s
        self._level_weight = level_weight
        self._trend_weight = trend_weight
        self._bin: int | None = None
        self._count = 0.0
        self._level = 0.0
        self._trend = 0.0

    def add(self, amount: float, now: float) -> None:
        """Counts events at a time that does not fall."""
        self._advance(now)
        self._count += amount

    def forecast(self, ahead_s: float, now: float) -> float:
        """Events a second, so many seconds from now; never negative."""
        self._advance(now)
        return max(0.0, self._level + self._trend * ahead_s / self._bin_s)

    def _advance(self, now: float) -> None:
        current = int(now / self._bin_s)
        if self._bin is None:
            self._bin = current
        # After a long silence nothing is left to forget.
        for _ in range(min(current - self._bin, 64)):
            rate, before = self._count / self._bin_s, self._level
            self._level += self._level_weight * (rate - self._level) + (1 - self._level_weight) * self._trend
            self._trend += self._trend_weight * (self._level - before - self._trend)
            self._count = 0.0
        self._bin = current
