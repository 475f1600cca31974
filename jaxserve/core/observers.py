"""Tells the policies that want to know what becomes of requests."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import Policies, RequestObserver, TokenObserver
from jaxserve.request import Request


@final
class Observers:
    """The policies of a scheduler that observe requests or tokens."""

    def __init__(self, policies: Policies) -> None:
        self._of_requests = [policy for policy in policies if isinstance(policy, RequestObserver)]
        self._of_tokens = [policy for policy in policies if isinstance(policy, TokenObserver)]

    @property
    def want_tokens(self) -> bool:
        """Whether anybody wants to hear of tokens: the list of them need not be made otherwise."""
        return bool(self._of_tokens)

    def queued(self, request: Request, now: float) -> None:
        for observer in self._of_requests:
            observer.queued(request, now)

    def admitted(self, request: Request, now: float) -> None:
        for observer in self._of_requests:
            observer.admitted(request, now)

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        for observer in self._of_requests:
            observer.left(request, now, was_waiting=was_waiting)

    def generated(self, requests: list[Request], now: float) -> None:
        for observer in self._of_tokens:
            observer.generated(requests, now)
