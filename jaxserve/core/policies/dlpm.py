"""Ordering ``dlpm``: deficit longest prefix match (Cao et al., arXiv 2501.14312)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from jaxserve.core.policies.clients import ClientService
from jaxserve.core.policy import PolicyContext, SortKey
from jaxserve.request import Request

_REFRESH_S = 0.25
_QUANTUM = 4096.0


@final
class DeficitLongestPrefixMatch:
    """Longest prefix match among the clients that have some of their quantum left.

    When no waiting client has any left, all get another. Kept as the number of quanta that a client has
    spent (its round): the clients in the earliest round may be served, and rounds never fall, which is what
    a lane's key needs. What was cached costs nothing.

    Args:
        matched_tokens: leading prompt tokens of a request that are in the cache.
        quantum: weighted tokens a client may use before the others of its round have used theirs.
    """

    def __init__(self, matched_tokens: Callable[[Request], int], quantum: float = _QUANTUM) -> None:
        self._matched_tokens = matched_tokens
        self._quantum = quantum
        self._service = ClientService()
        self._round = 0

    @classmethod
    def from_context(cls, context: PolicyContext) -> DeficitLongestPrefixMatch:
        return cls(context.matched_tokens)

    def key(self, request: Request, now: float) -> SortKey:
        return (-self._matched_tokens(request), request.arrival_time)

    def key_until(self, request: Request, now: float) -> float:
        return now + _REFRESH_S

    def lane(self, request: Request, now: float) -> str:
        return request.client

    def lane_key(self, lane: str) -> float:
        return self._service.of[lane] // self._quantum

    def queued(self, request: Request, now: float) -> None:
        # Rounds that passed while a client asked for nothing are lost.
        self._service.raise_to(request.client, self._round * self._quantum)
        self._service.waiting[request.client] += 1

    def admitted(self, request: Request, now: float) -> None:
        self._round = max(self._round, int(self.lane_key(request.client)))
        self._service.prompt_computed(request, request.num_prompt_tokens - self._matched_tokens(request))
        self._stop_waiting(request.client)

    def generated(self, requests: Sequence[Request], now: float) -> None:
        self._service.generated(requests)

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        if was_waiting:
            self._stop_waiting(request.client)

    def _stop_waiting(self, client: str) -> None:
        service = self._service
        service.stop_waiting(client)
        if client not in service.waiting and service.of[client] <= self._round * self._quantum:
            del service.of[client]  # it comes back to the same
