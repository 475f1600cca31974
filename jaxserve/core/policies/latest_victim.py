"""Victim ``latest``: whoever joined last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.request import Request


@final
class LatestVictim:
    """The least work is lost, and the oldest always makes progress."""

    def choose(self, running: Sequence[Request]) -> Request:
        return running[-1]
