"""What conversations leave is kept, or brought back from the host, in time for their next turn.

When a turn ends, its pages are kept for a while: as long as keeping them costs less than bringing them back
would. Later, if they have gone to the host, they are brought back once

    P(next turn within dt) x seconds to compute them > seconds to load them x pressure

where pressure is 1 / share of the pages that no running request holds, and in place of others only if these
are worth less. dt reaches to the end of the next bin of `jaxserve.core.return_times`; for so long they are
kept then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, final

from jaxserve.core.radix_node import Node
from jaxserve.core.radix_tree import RadixTree
from jaxserve.core.resume_costs import ResumeCosts
from jaxserve.core.return_times import BIN_ENDS, NUM_BINS, ReturnTimes
from jaxserve.core.sessions import Session, Sessions
from jaxserve.request import Request

# Sessions that are looked at for one plan.
_MOST_LOOKS = 16


class Loader(Protocol):
    """Brings pages of a tree back from the host."""

    def load_s(self, num_pages: int) -> float:
        """Seconds until so many pages could be here; infinite without a host tier."""
        ...

    def preload(self, nodes: list[Node], below: float) -> bool:
        """Begins to load nodes of one path, in place of what is worth less; False if there is no room."""
        ...


class PreloadingStats(NamedTuple):
    """Counters since start.

    Attributes:
        num_sessions: conversations whose next turn may come.
        num_returns: next turns that came.
        num_preloads: of pages for one that might.
        num_kept: turns whose pages were kept for a while.
        mean_keep_s: for how long.
    """

    num_sessions: int
    num_returns: int
    num_preloads: int
    num_kept: int
    mean_keep_s: float


@final
class Preloading:
    """Decides what to keep and what to preload.

    Args:
        tree: where conversations leave their pages.
        page_size: tokens of a page.
        horizon_s: of the tree's accesses.
        costs: of computing and loading.
        loader: of the tree's pages.
        pressure: of those who run on the pages; 1 if nobody runs.
    """

    def __init__(
        self,
        tree: RadixTree,
        page_size: int,
        horizon_s: float,
        costs: ResumeCosts,
        loader: Loader,
        pressure: Callable[[], float],
    ) -> None:
        self._tree = tree
        self._page_size = page_size
        self._horizon_s = horizon_s
        self._costs = costs
        self._loader = loader
        self._pressure = pressure
        self._times = ReturnTimes()
        self._sessions = Sessions(self._times)
        self._num_preloads = self._num_kept = 0
        self._keep_s = 0.0

    def began(self, request: Request, node: Node) -> None:
        """Hears that a request was admitted; ``node`` is the end of what it found."""
        self._sessions.began(request, node)

    def ended(self, request: Request, node: Node, now: float) -> None:
        """Hears that a request has left its pages on the path to a node."""
        session = self._sessions.ended(request, node, now)
        if session is None:
            return
        keep_s = self.keep_s(session, now)
        if keep_s > 0.0:
            node.kept_until = max(node.kept_until, now + keep_s)
            self._num_kept += 1
            self._keep_s += keep_s

    def failed(self, request: Request) -> None:
        """Hears that a request has left, and none of its pages."""
        self._sessions.failed(request)

    def keep_s(self, session: Session, now: float) -> float:
        """Seconds for which it pays to keep what a turn has left.

        A page is held at the price of those that are evicted meanwhile: what such a page is expected to save
        within the horizon, a second of it.
        """
        start, num_pages = _own_pages(session.node)
        page_s = self._tree.marginal_s(now) * self._costs.page_share
        if page_s == 0.0:  # nothing is evicted
            return 0.0
        tokens = num_pages * self._page_size
        reload_s = min(self._costs.compute_s(tokens, start * self._page_size), self._loader.load_s(num_pages))
        return self._times.best_keep_s(num_pages * page_s / self._horizon_s, reload_s, session.gaps)

    def look(self, now: float) -> None:
        """Preloads for those whose next turn has become likely."""
        for session in self._sessions.passed(now, _MOST_LOOKS):
            is_there = session.node.parent is not None  # not given up for another of these sessions
            if is_there and session.node.on_host:
                self._consider(session, now)

    def _consider(self, session: Session, now: float) -> None:
        nodes = self._tree.host_nodes(session.node)
        start, num_pages = nodes[0].start, sum(len(node.pages) for node in nodes)
        last = min(session.bin + 1, NUM_BINS - 1)
        chance = self._times.comes_within(session.bin, last, session.gaps)
        saved_s = self._costs.compute_s(num_pages * self._page_size, start * self._page_size)
        if chance * saved_s <= self._loader.load_s(num_pages) * self._pressure():
            return
        if self._loader.preload(nodes, self._tree.value_of(chance, start, now)):
            session.node.kept_until = session.since + BIN_ENDS[last]
            self._num_preloads += 1

    def stats(self) -> PreloadingStats:
        return PreloadingStats(
            num_sessions=len(self._sessions),
            num_returns=self._times.num_returns,
            num_preloads=self._num_preloads,
            num_kept=self._num_kept,
            mean_keep_s=self._keep_s / max(self._num_kept, 1),
        )


def _own_pages(node: Node) -> tuple[int, int]:
    """Where the part of a path begins that nobody else has shared, and its pages."""
    at = node
    while at.parent is not None and at.parent.parent is not None and at.parent.num_born == 1:
        at = at.parent
    return at.start, node.end - at.start
