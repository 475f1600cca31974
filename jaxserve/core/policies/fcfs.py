"""Ordering ``fcfs``: first come, first served."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import SortKey
from jaxserve.request import Request


@final
class FirstComeFirstServed:
    """By arrival; ties by the order of joining: deterministic for recorded runs."""

    def key(self, request: Request, now: float) -> SortKey:
        return (request.arrival_time,)
