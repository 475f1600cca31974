"""Ordering ``strict_priority``: urgent requests always go first."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import SortKey
from jaxserve.request import Request


@final
class StrictPriority:
    """By the request's priority (lower first), then by arrival. Low priorities can starve."""

    def key(self, request: Request, now: float) -> SortKey:
        return (request.priority, request.arrival_time)
