"""The wait cap that size-based orderings share: who has waited too long goes first, by arrival."""

from __future__ import annotations

import math
from typing import final

from jaxserve.request import Request

PROMOTED, NORMAL = -1.0, 0.0
_BATCH_FACTOR = 7.5  # with the default of 8 s: a minute for requests of batch priority (above 0)


@final
class WaitCap:
    """Classes by waiting time.

    Nobody waits longer than the cap plus the time to serve those promoted before: promoted requests are
    served by arrival, and no other overtakes them.

    Args:
        max_wait_s: of interactive requests (priority 0 or less).
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s

    def limit_s(self, request: Request) -> float:
        """Seconds a request may wait."""
        return self._max_wait_s * (1.0 if request.priority <= 0 else _BATCH_FACTOR)

    def promotion_time(self, request: Request) -> float:
        """When a request that still waits is promoted."""
        return request.arrival_time + self.limit_s(request)

    def is_promoted(self, request: Request, now: float) -> bool:
        """Whether a waiting request has waited too long."""
        return now >= self.promotion_time(request)

    def until(self, request: Request, now: float) -> float:
        """When its class changes next; ``math.inf`` for never."""
        promotion = self.promotion_time(request)
        return promotion if now < promotion else math.inf
