"""Ordering ``mlfq``: skip-join multi-level feedback queues (FastServe, arXiv 2305.05920, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from jaxserve.core.policies.sizes import ServiceTimes
from jaxserve.core.policies.starvation import WaitCap
from jaxserve.core.policy import PolicyContext, SortKey
from jaxserve.request import Request

_NUM_LEVELS = 16


@final
class SkipJoinFeedback:
    """Levels whose quanta double; nobody's length is predicted.

    A request joins the highest level whose quantum covers its prompt (its length is known: *skip-join*), and
    falls by one whenever it has used its quantum. The highest level runs first, first come first served.
    When no slot is free, a running request of a lower level gives way to the head of the queue. Who waits
    longer than the cap joins the highest level.

    Args:
        times: what prompt and output tokens cost.
        first_quantum_s: of the highest level.
        max_wait_s: the starvation limit.
    """

    def __init__(self, times: ServiceTimes, first_quantum_s: float, max_wait_s: float) -> None:
        self._times = times
        self._first_quantum_s = first_quantum_s
        self._cap = WaitCap(max_wait_s)
        self._levels: dict[Request, int] = {}
        self._used_s: dict[Request, float] = {}
        self._queued_at: dict[Request, float] = {}

    @classmethod
    def from_context(cls, context: PolicyContext) -> SkipJoinFeedback:
        times = ServiceTimes(context.costs, context.num_slots, context.token_budget)
        return cls(times, 4 * times.token_s, context.config.max_wait_s)

    def level(self, request: Request) -> int:
        """0 is the highest."""
        return self._levels[request]

    def quantum_s(self, level: int) -> float:
        return self._first_quantum_s * 2**level

    def _joined_level(self, request: Request) -> int:
        prefill_s, level = self._times.prefill_s(request), 0
        while level < _NUM_LEVELS - 1 and self.quantum_s(level) < prefill_s:
            level += 1
        return level

    # ------------------------------------------------------------------ order

    def key(self, request: Request, now: float) -> SortKey:
        if request not in self._levels:
            self._levels[request] = self._joined_level(request)
        if self._is_starved(request, now):
            return (-1.0, request.arrival_time)
        return (float(self._levels[request]), self._queued_at[request])

    def key_until(self, request: Request, now: float) -> float:
        return math.inf if self._is_starved(request, now) else self._starves_at(request)

    def factors(self, request: Request) -> Mapping[str, float]:
        return {"level": float(self._levels[request]), "used_s": self._used_s.get(request, 0.0)}

    def _starves_at(self, request: Request) -> float:
        # A request that was preempted has had service: it starves by the time since then.
        return self._queued_at[request] + self._cap.limit_s(request)

    def _is_starved(self, request: Request, now: float) -> bool:
        return now >= self._starves_at(request)

    # ------------------------------------------------------------------ events

    def queued(self, request: Request, now: float) -> None:
        self._queued_at[request] = now

    def admitted(self, request: Request, now: float) -> None:
        if self._is_starved(request, now):
            self._levels[request], self._used_s[request] = 0, 0.0
        del self._queued_at[request]

    def generated(self, requests: Sequence[Request], now: float) -> None:
        token_s, used_s, levels = self._times.token_s, self._used_s, self._levels
        for request in requests:
            if request.is_finished:
                continue
            used = used_s.get(request, 0.0) + token_s
            if used >= self.quantum_s(levels[request]) and levels[request] < _NUM_LEVELS - 1:
                levels[request] += 1
                used = 0.0
            used_s[request] = used

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        for memory in (self._levels, self._used_s, self._queued_at):
            memory.pop(request, None)

    # ------------------------------------------------------------------ preemption

    def preempts(self, running: Sequence[Request], head: Request, now: float) -> Request | None:
        """The running request of the lowest level, if that is below the head's and it is cheap to resume.

        FastServe swaps; here its pages are computed again, and everybody who runs waits for that: it must
        take less than the head's quantum.
        """
        level = self._levels[head]
        most_s = self.quantum_s(level) / len(running)
        lower = [
            request
            for request in running
            if self._levels[request] > level and self._times.recompute_s(request) < most_s
        ]
        return max(lower, key=lambda request: self._levels[request], default=None)
