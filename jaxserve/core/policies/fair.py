"""Ordering ``fair``: virtual token counters (VTC, Sheng et al., OSDI 2024, algorithm 2), with lift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import final

from jaxserve.core.policy import SortKey
from jaxserve.request import Request

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
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
        self.counters: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._last_served = 0.0

    def key(self, request: Request, now: float) -> SortKey:
        return (request.arrival_time,)

    def lane(self, request: Request) -> str:
        return request.client

    def lane_key(self, lane: str) -> float:
        return self.counters[lane]

    def queued(self, request: Request, now: float) -> None:
        client = request.client
        if self._waiting[client] == 0:
            levels = [self.counters[other] for other, count in self._waiting.items() if count]
            lift = min(levels) if levels else self._last_served
            self.counters[client] = max(self.counters.get(client, 0.0), lift)
        self._waiting[client] += 1
        if len(self.counters) > MOST_CLIENTS:
            self._forget_idle_clients()

    def admitted(self, request: Request, now: float) -> None:
        self._stop_waiting(request.client)
        if request.num_preemptions == 0:  # what is computed once more is no service
            self.counters[request.client] += INPUT_WEIGHT * request.num_prompt_tokens
        self._last_served = self.counters[request.client]

    def generated(self, requests: Sequence[Request], now: float) -> None:
        counters = self.counters
        for request in requests:
            if request.client in counters:
                counters[request.client] += OUTPUT_WEIGHT

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        if was_waiting:
            self._stop_waiting(request.client)

    def _stop_waiting(self, client: str) -> None:
        self._waiting[client] -= 1
        if self._waiting[client] == 0:
            del self._waiting[client]

    def _forget_idle_clients(self) -> None:
        """Drops those that would be lifted anyway if they came back now."""
        level = min(self.counters[client] for client in self._waiting)
        self.counters = {c: v for c, v in self.counters.items() if v > level or c in self._waiting}
