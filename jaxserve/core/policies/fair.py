"""Ordering ``fair``: virtual token counters (VTC, Sheng et al., OSDI 2024, algorithm 2), with lift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.core.policies.clients import ClientService
from jaxserve.core.policy import SortKey
from jaxserve.request import Request

MOST_CLIENTS = 100_000


@final
class VirtualTokenCounters:
    """Serves the waiting client that was served least.

    A client's counter grows by its prompt tokens on admission and by twice its output tokens as they come. A
    client that begins to wait is lifted to the least counter of those waiting: time in which it asked for
    nothing is not saved up. The service of two clients that both wait all the time differs by at most
    ``2 max(w_p L_in, w_q M)``, L_in being the longest prompt and M the most tokens in a batch.
    """

    def __init__(self) -> None:
        self._service = ClientService()
        self._last_served = 0.0

    @property
    def counters(self) -> dict[str, float]:
        """Client -> its virtual token counter."""
        return self._service.of

    def key(self, request: Request, now: float) -> SortKey:
        return (request.arrival_time,)

    def lane(self, request: Request, now: float) -> str:
        return request.client

    def lane_key(self, lane: str) -> float:
        return self.counters[lane]

    def queued(self, request: Request, now: float) -> None:
        client, waiting = request.client, self._service.waiting
        if client not in waiting:
            levels = [self.counters[other] for other in waiting]
            self._service.raise_to(client, min(levels) if levels else self._last_served)
        waiting[client] += 1
        if len(self.counters) > MOST_CLIENTS:
            self._forget_idle_clients()

    def admitted(self, request: Request, now: float) -> None:
        self._service.stop_waiting(request.client)
        self._service.prompt_computed(request, request.num_prompt_tokens)
        self._last_served = self.counters[request.client]

    def generated(self, requests: Sequence[Request], now: float) -> None:
        self._service.generated(requests)

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        if was_waiting:
            self._service.stop_waiting(request.client)

    def _forget_idle_clients(self) -> None:
        """Drops those that would be lifted anyway if they came back now."""
        waiting = self._service.waiting
        level = min(self.counters[client] for client in waiting)
        self._service.of = {c: v for c, v in self.counters.items() if v > level or c in waiting}
