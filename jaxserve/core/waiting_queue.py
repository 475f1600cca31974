"""The waiting requests, in policy order."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from jaxserve.core.policy import OrderingPolicy, SortKey
from jaxserve.request import Request

_SLACK = 64  # former members that may be kept


class WaitingQueue:
    """A heap by the ordering policy's key; removal in the middle is lazy.

    Ties are broken by the order of joining, so that a recorded run replays exactly.
    """

    def __init__(self, ordering: OrderingPolicy) -> None:
        self._ordering = ordering
        self._heap: list[tuple[SortKey, int, Request]] = []
        self._members: dict[Request, int] = {}
        self._counter = 0
        self._by_arrival: deque[Request] = deque()
        self._newest_arrival: float | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def push(self, request: Request) -> None:
        if len(self._heap) + len(self._by_arrival) > 4 * len(self._members) + _SLACK:
            self._forget_former_members()
        self._counter += 1
        self._members[request] = self._counter
        heapq.heappush(self._heap, (self._ordering.key(request), self._counter, request))
        if self._newest_arrival is None or request.arrival_time >= self._newest_arrival:
            self._newest_arrival = request.arrival_time
            self._by_arrival.append(request)
        else:  # a preempted request comes back
            self._by_arrival.appendleft(request)

    def _forget_former_members(self) -> None:
        """Those behind a first member that stays long would otherwise never be let go."""
        self._heap = [entry for entry in self._heap if self._members.get(entry[2]) == entry[1]]
        heapq.heapify(self._heap)
        self._by_arrival = deque(dict.fromkeys(r for r in self._by_arrival if r in self._members))

    def peek(self) -> Request | None:
        """The first request, or None."""
        while self._heap:
            _, ticket, request = self._heap[0]
            if self._members.get(request) == ticket:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> None:
        """Takes a member out, wherever it stands."""
        del self._members[request]

    @property
    def newest_arrival(self) -> float | None:
        """Arrival time of the last request that ever joined, or None before the first."""
        return self._newest_arrival

    @property
    def oldest_arrival(self) -> float | None:
        """Arrival time of the member that arrived first, or None if there is none."""
        while self._by_arrival and self._by_arrival[0] not in self._members:
            self._by_arrival.popleft()
        return self._by_arrival[0].arrival_time if self._by_arrival else None

    def __iter__(self) -> Iterator[Request]:
        """The members, in no particular order."""
        return iter(self._members)
