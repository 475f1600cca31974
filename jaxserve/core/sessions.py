"""Conversations, recognised by their prefix: the next turn begins with what the last one left in the tree."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from typing import final

from jaxserve.core.radix_node import Node
from jaxserve.core.return_times import BIN_ENDS, NUM_BINS, ReturnTimes, bin_of
from jaxserve.request import Request

_MOST_SESSIONS = 20_000
_MOST_GAPS = 8  # of a conversation that are remembered


@dataclasses.dataclass(slots=True, eq=False)
class Session:
    """A conversation between two turns.

    Attributes:
        node: where the last turn ended.
        since: when, in seconds.
        bin: of the time that has passed.
        gaps: bins of those before.
    """

    node: Node
    since: float
    bin: int = 0
    gaps: list[int] = dataclasses.field(default_factory=list[int])


@final
class Sessions:
    """Follows conversations and learns how long they pause."""

    def __init__(self, times: ReturnTimes) -> None:
        self._times = times
        self._waiting: dict[Node, Session] = {}
        self._active: dict[Request, Session] = {}
        self._timers: list[tuple[float, int, Session]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def began(self, request: Request, node: Node) -> None:
        """Looks whether a request that was admitted is somebody's next turn.

        Args:
            node: where the path ends that it found. An edge may have been cut there: then the last page of
                the turn before was not full, or its answer was written differently.
        """
        at = node
        if at.parent is None:
            return
        if at not in self._waiting and len(node.children) == node.num_born == 1:
            (at,) = node.children.values()
        session = self._waiting.pop(at, None)
        if session is None:
            return
        self._active[request] = session
        if not request.num_preemptions:
            gap = bin_of(request.arrival_time - session.since)
            self._times.came(min(gap, session.bin), session.bin)
            session.gaps = [*session.gaps[1 - _MOST_GAPS :], gap]

    def ended(self, request: Request, node: Node, now: float) -> Session | None:
        """Remembers where a turn has left its pages; None if it left nothing."""
        session = self._active.pop(request, None) or Session(node, now)
        if node.parent is None:
            return None
        session.node, session.since, session.bin = node, now, 0
        self._waiting.pop(node, None)
        self._waiting[node] = session
        if len(self._waiting) > _MOST_SESSIONS:
            del self._waiting[next(iter(self._waiting))]
        self._times.awaited(0)
        self._set_timer(session)
        return session

    def failed(self, request: Request) -> None:
        """Forgets whose turn a request was that has left nothing."""
        self._active.pop(request, None)

    def passed(self, now: float, most: int) -> list[Session]:
        """Sessions whose next turn has not come in another bin, oldest first, no more than so many."""
        found: list[Session] = []
        while self._timers and self._timers[0][0] <= now and len(found) < most:
            time, _, session = heapq.heappop(self._timers)
            if time != self._due(session) or self._waiting.get(session.node) is not session:
                continue  # the next turn has come
            if session.node.parent is None or session.bin + 1 == NUM_BINS:
                del self._waiting[session.node]
                continue
            session.bin += 1
            self._times.awaited(session.bin)
            self._set_timer(session)
            found.append(session)
        return found

    def _due(self, session: Session) -> float:
        return session.since + BIN_ENDS[session.bin]

    def _set_timer(self, session: Session) -> None:
        heapq.heappush(self._timers, (self._due(session), next(self._numbers), session))
