"""Victim ``least_urgent``: the worst priority."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.request import Request


@final
class LeastUrgentVictim:
    """Of those with the worst priority, whoever joined last."""

    def choose(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda request: request.priority)
