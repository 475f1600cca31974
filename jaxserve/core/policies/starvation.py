"""Against starvation: the wait cap that size-based orderings share, and the idle rule of the preempted."""

from __future__ import annotations

import math
from typing import final

from jaxserve.request import Request

PROMOTED, NORMAL = -1.0, 0.0
MOST_IDLE_STEPS, GRANTED_STEPS = 200, 10
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


@final
class IdleRule:
    """A preempted request that stood still for 200 steps goes first, and then runs 10 steps undisturbed.

    The wait cap counts from the arrival, so it says nothing of who has run already: a request whose client
    has seen tokens must not stop for long. Steps are those whose results came in (vllm-ltr, Fu et al. 2024,
    where the rule holds for all that wait; here those who never ran have the cap).
    """

    def __init__(self) -> None:
        self._step = 0
        self._stopped: dict[Request, int] = {}  # preempted, and waiting since that step
        self._granted: dict[Request, int] = {}  # running undisturbed until that step

    def step_done(self) -> None:
        """Counts a step."""
        self._step += 1

    def idle_steps_left(self, request: Request) -> int | None:
        """Steps after which a request goes first, 0 if it does now; None for one that was not preempted."""
        stopped = self._stopped.get(request)
        return None if stopped is None else max(0, stopped + MOST_IDLE_STEPS - self._step)

    def is_granted(self, request: Request) -> bool:
        """Whether a running request may not be preempted yet."""
        return self._granted.get(request, 0) > self._step

    def queued(self, request: Request) -> None:
        if request.num_preemptions:
            self._stopped[request] = self._step

    def admitted(self, request: Request) -> None:
        stopped = self._stopped.pop(request, None)
        if stopped is not None and self._step - stopped >= MOST_IDLE_STEPS:
            self._granted[request] = self._step + GRANTED_STEPS

    def left(self, request: Request) -> None:
        self._stopped.pop(request, None)
        self._granted.pop(request, None)
