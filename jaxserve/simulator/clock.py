"""A clock that moves when the simulation says so."""

from __future__ import annotations

from typing import final


@final
class VirtualClock:
    """Seconds since the simulation began; passed wherever the engine takes a clock."""

    __slots__ = ("now",)

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        """Never goes back."""
        if time > self.now:
            self.now = time
