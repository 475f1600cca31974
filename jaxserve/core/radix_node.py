"""What a radix tree over KV pages is made of: nodes, matches, loads."""

from __future__ import annotations

import dataclasses
import math
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, final

TOKEN_BYTES = array("i").itemsize
NEVER = -math.inf


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as the tree compares them: 4 bytes each."""
    # For a list, half the time of making an array of it.
    return tokens.tobytes() if isinstance(tokens, array) else struct.pack(f"{len(tokens)}i", *tokens)


@final
class Node:
    """The end of an edge; a root has no pages.

    The tiers of a path are never mixed: from some node on, all that follows is on the host.

    Attributes:
        parent: None for a root, and for a node that was taken out.
        start: pages between the root and this edge.
        tokens: of the edge, packed.
        pages: of the edge, in order; numbers of KV pages, or of places in host memory.
        on_host: which of both.
        children: packed tokens of their first page -> child.
        num_near: children that are not on the host.
        num_born: children that there have ever been.
        claims: packed tokens of a page that comes next and is being computed -> who does so.
        load: what brings or brought the pages from the host; None if they were computed here.
        is_preloaded: they were brought for somebody who has not come yet.
        num_locks: running requests and loads whose path goes through here; never fewer than those of a child.
        heat: log of the number of accesses, each weighted with exp(time / horizon).
        log_cost: log of the seconds that a chunk of a prompt takes at this depth.
        kept_until: seconds; before that others are evicted first.
        entry: number of its entry in a `LeafQueue`; 0 for none.
        salt: of a root.
    """

    __slots__ = (
        "children", "claims", "entry", "heat", "is_preloaded", "kept_until", "load", "log_cost", "num_born",
        "num_locks", "num_near", "on_host", "pages", "parent", "salt", "start", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        parent: Node | None,
        start: int,
        tokens: bytes,
        pages: list[int],
        log_cost: float,
        salt: str = "",
    ) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.pages = pages
        self.on_host = False
        self.children: dict[bytes, Node] = {}
        self.num_near = 0
        self.num_born = 0
        self.claims: dict[bytes, object] = {}
        self.load: PrefixLoad | None = None
        self.is_preloaded = False
        self.num_locks = 0
        self.heat = NEVER
        self.log_cost = log_cost
        self.kept_until = NEVER
        self.entry = 0
        self.salt = salt

    @property
    def value(self) -> float:
        """Log of expected reuses x seconds to compute again / bytes, but for a summand that all share."""
        return self.heat + self.log_cost

    @property
    def end(self) -> int:
        """Pages between the root and the end of this edge."""
        return self.start + len(self.pages)

    @property
    def is_free_leaf(self) -> bool:
        """Whether its last pages could leave its tier now."""
        if self.parent is None or self.num_locks:
            return False
        return not (self.children if self.on_host else self.num_near)

    @property
    def is_loading(self) -> bool:
        """Whether its pages are not complete yet."""
        return self.load is not None and not self.load.is_done


@final
@dataclasses.dataclass(slots=True, eq=False)
class PrefixLoad:
    """Pages of a path that come back from the host; they have their KV pages already.

    Attributes:
        end: node whose path the load keeps locked.
        places: on the host, of all of them; free when the load is done.
        pieces: blocks and pages of the copies that have not begun.
        in_air: numbers of those that have.
        is_planned: a plan has run that put the last of them into the pages.
    """

    end: Node
    places: list[int]
    pieces: deque[tuple[tuple[int, ...], tuple[int, ...]]]
    in_air: set[int] = dataclasses.field(default_factory=set[int])
    is_planned: bool = False

    @property
    def is_done(self) -> bool:
        return not self.pieces and not self.in_air


class HostMatch(NamedTuple):
    """How far some tokens go on among nodes on the host.

    Attributes:
        node: the deepest.
        num_here: pages of its edge that they match.
        num_pages: pages on the host that they match in all.
    """

    node: Node
    num_here: int
    num_pages: int


class Match(NamedTuple):
    """How far some tokens are in the tree.

    Attributes:
        node: the deepest node on the device that they reach.
        num_here: pages of its edge that they match.
        num_pages: pages on the device that they match in all.
        num_evictable: of these, those that nobody has locked.
        is_claimed: somebody is computing the page that comes next.
        loads: what brings some of these pages and is not done.
        host: what they match behind that, or None.
    """

    node: Node
    num_here: int
    num_pages: int
    num_evictable: int
    is_claimed: bool
    loads: tuple[PrefixLoad, ...] = ()
    host: HostMatch | None = None

    @property
    def deepest(self) -> HostMatch:
        """Where the tokens part from the tree, on whichever tier."""
        if self.host is None:
            return HostMatch(self.node, self.num_here, self.num_pages)
        return self.host._replace(num_pages=self.num_pages + self.host.num_pages)


# What a tree without any tokens answers.
NO_MATCH: Final = Match(Node(None, 0, b"", [], 0.0), 0, 0, 0, is_claimed=False)
