"""The waiting requests, in policy order."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from jaxserve.core.policy import (
    ChangingKeys,
    LanedOrdering,
    OrderingPolicy,
    QueueView,
    RequestObserver,
    SortKey,
)
from jaxserve.request import Request

_SLACK = 64  # former entries that may be kept
_ONLY_LANE = ""
# Keys computed anew in one step, so that a long queue costs each step the same; the longest due come first.
_MOST_REKEYS = 32


class _Membership(NamedTuple):
    """Where a member stands; an entry of a heap counts only if it has the member's present ticket."""

    ticket: int
    lane: str
    key: SortKey


class WaitingQueue:
    """A heap for each lane by the ordering policy's key, and a heap of lanes; removal is lazy.

    Most orderings have one lane. Ties are broken by the order of joining, so that a recorded run replays
    exactly. Keys that change while requests wait are computed again when they are due (`refresh`).
    """

    def __init__(self, ordering: OrderingPolicy) -> None:
        self._follow(ordering)
        self._members: dict[Request, _Membership] = {}
        self._lanes: dict[str, list[tuple[SortKey, int, Request]]] = {}
        self._heads: list[tuple[float, SortKey, int, str]] = []  # (lane key, its head's key and ticket, lane)
        self._due: list[tuple[float, int, Request]] = []
        self._num_due = 0
        self._counter = 0
        self._num_entries = 0  # of heaps and the arrival list, those of former members included
        self._by_arrival: deque[Request] = deque()
        self._newest_arrival: float | None = None
        self.num_tokens = 0  # of all members

    def _follow(self, ordering: OrderingPolicy) -> None:
        self._ordering = ordering
        self._laned = ordering if isinstance(ordering, LanedOrdering) else None
        self._changing = ordering if isinstance(ordering, ChangingKeys) else None

    def reorder(self, ordering: OrderingPolicy, now: float) -> None:
        """Puts all members in the order of another policy, which is told of them as they once joined."""
        self._follow(ordering)
        members = list(self._members)
        self._lanes.clear()
        self._heads.clear()
        self._due.clear()
        self._members.clear()
        self._num_entries = 0
        for request in members:
            if isinstance(ordering, RequestObserver):
                # Who never ran has waited since it came, whatever the ordering was.
                ordering.queued(request, now if request.num_preemptions else request.arrival_time)
            self._place(request, now)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def push(self, request: Request, now: float) -> None:
        self._forget_former_members()
        self._place(request, now)
        self.num_tokens += request.num_tokens
        if self._newest_arrival is None or request.arrival_time >= self._newest_arrival:
            self._newest_arrival = request.arrival_time
            self._by_arrival.append(request)
        else:  # a preempted request comes back
            self._by_arrival.appendleft(request)

    def _place(self, request: Request, now: float) -> None:
        """Gives a request a new ticket, and puts it where its key belongs."""
        self._counter += 1
        self._num_entries += 1
        lane = self._laned.lane(request, now) if self._laned else _ONLY_LANE
        member = _Membership(self._counter, lane, self._ordering.key(request, now))
        self._members[request] = member
        heap = self._lanes.setdefault(lane, [])
        heapq.heappush(heap, (member.key, member.ticket, request))
        if heap[0][1] == member.ticket:
            self._push_head(lane)
        if self._changing is not None:
            due = self._changing.key_until(request, now)
            heapq.heappush(self._due, (due, member.ticket, request))

    def _push_head(self, lane: str) -> None:
        key, ticket, _ = self._lanes[lane][0]
        heapq.heappush(self._heads, (self._lane_key(lane), key, ticket, lane))

    def _lane_key(self, lane: str) -> float:
        return self._laned.lane_key(lane) if self._laned else 0.0

    def _forget_former_members(self) -> None:
        """Those behind a first member that stays long would otherwise never be let go."""
        if self._num_entries <= 4 * len(self._members) + _SLACK:
            return
        members = self._members
        self._num_entries = len(members)
        for lane, heap in list(self._lanes.items()):
            kept = [entry for entry in heap if entry[2] in members and members[entry[2]].ticket == entry[1]]
            heapq.heapify(kept)
            self._lanes[lane] = kept
            if not kept:
                del self._lanes[lane]
        self._heads.clear()
        for lane in self._lanes:
            self._push_head(lane)
        self._due = [d for d in self._due if d[2] in members and members[d[2]].ticket == d[1]]
        heapq.heapify(self._due)
        self._by_arrival = deque(dict.fromkeys(r for r in self._by_arrival if r in members))

    def refresh(self, now: float) -> None:
        """Computes keys anew that hold no longer, so many at most; call it once a step."""
        if not self._due or self._due[0][0] > now:
            return
        self._forget_former_members()
        due, members = self._due, self._members
        left = _MOST_REKEYS
        while left and due and due[0][0] <= now:
            _, ticket, request = heapq.heappop(due)
            member = members.get(request)
            if member is not None and member.ticket == ticket:
                self._place(request, now)
                left -= 1

    def peek(self) -> Request | None:
        """The first request, or None."""
        heads = self._heads
        while heads:
            lane_key, key, ticket, lane = heads[0]
            head = self._clean_head(lane)
            if head is None:
                heapq.heappop(heads)
                continue
            current = (self._lane_key(lane), head[0], head[1], lane)
            if current == (lane_key, key, ticket, lane):
                return head[2]
            # Keys of lanes never fall, and a better head of a lane has an entry of its own: so an entry that
            # is out of date stood too far in front, never too far behind.
            heapq.heapreplace(heads, current)
        return None

    def _clean_head(self, lane: str) -> tuple[SortKey, int, Request] | None:
        """The first member of a lane; a lane without any is dropped."""
        heap = self._lanes.get(lane)
        while heap:
            member = self._members.get(heap[0][2])
            if member is not None and member.ticket == heap[0][1]:
                return heap[0]
            heapq.heappop(heap)
        self._lanes.pop(lane, None)
        return None

    def key_of(self, request: Request) -> SortKey:
        """The key by which a member was placed."""
        return self._members[request].key

    def remove(self, request: Request) -> None:
        """Takes a member out, wherever it stands."""
        del self._members[request]
        self.num_tokens -= request.num_tokens

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

    def view(self, now: float, *, num_running: int, num_held: int, num_free_slots: int) -> QueueView:
        """What admission may look at, with what the scheduler says of its slots."""
        oldest, newest = self.oldest_arrival, self._newest_arrival
        return QueueView(
            now=now,
            num_waiting=len(self._members),
            oldest_arrival=now if oldest is None else oldest,
            newest_arrival=now if newest is None else newest,
            num_running=num_running,
            num_held=num_held,
            num_free_slots=num_free_slots,
        )

    def __iter__(self) -> Iterator[Request]:
        """The members, in no particular order."""
        return iter(self._members)
