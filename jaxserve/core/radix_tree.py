"""A radix tree over full KV pages: which page holds the keys and values of which tokens.

An edge is a run of tokens in whole pages. A running request locks the path of its tokens. What nobody locks
can be evicted: leaves first, and of these the least valuable. Reference counts of pages are the caller's
(`jaxserve.core.prefix_cache`).

    root of a salt --[system prompt: pages 7 3]--+--[question: page 9]
                                                 +--[question: pages 4 5]--[answer and next question: page 8]
"""

from __future__ import annotations

import heapq
import math
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, final

# Seconds after which an access counts for 1/e of a new one. `bench/prefix.py --parts evict` compares it with
# one second, which is least recently used.
HORIZON_S = 300.0
_TOKEN_BYTES = array("i").itemsize
_NEVER = -math.inf
_LEAST_S = 1e-9
_FIRST_WINDOW = 8  # pages of an edge that are compared at once, at first


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as the tree compares them: 4 bytes each."""
    # For a list, half the time of making an array of it.
    return tokens.tobytes() if isinstance(tokens, array) else struct.pack(f"{len(tokens)}i", *tokens)


@final
class Node:
    """The end of an edge; a root has no pages.

    Attributes:
        parent: None for a root, and for a node that was taken out.
        start: pages between the root and this edge.
        tokens: of the edge, packed.
        pages: of the edge, in order.
        children: packed tokens of their first page -> child.
        claims: packed tokens of a page that comes next and is being computed -> who does so.
        num_locks: running requests whose path goes through here; never fewer than those of a child.
        heat: log of the number of accesses, each weighted with exp(time / horizon).
        log_cost: log of the seconds that a chunk of a prompt takes at this depth.
    """

    __slots__ = (
        "children", "claims", "heat", "is_queued", "log_cost", "num_locks", "pages", "parent", "salt",
        "start", "tokens",
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
        self.children: dict[bytes, Node] = {}
        self.claims: dict[bytes, object] = {}
        self.num_locks = 0
        self.heat = _NEVER
        self.log_cost = log_cost
        self.is_queued = False
        self.salt = salt  # of a root

    @property
    def value(self) -> float:
        """Log of expected reuses x seconds to compute again / bytes, but for a summand that all share."""
        return self.heat + self.log_cost

    @property
    def end(self) -> int:
        """Pages between the root and the end of this edge."""
        return self.start + len(self.pages)


class Match(NamedTuple):
    """How far some tokens are in the tree.

    Attributes:
        node: the deepest node that they reach.
        num_here: pages of its edge that they match.
        num_pages: pages that they match in all.
        num_evictable: of these, those that nobody has locked.
        is_claimed: somebody is computing the page that comes next.
    """

    node: Node
    num_here: int
    num_pages: int
    num_evictable: int
    is_claimed: bool


# What a tree without any tokens answers.
NO_MATCH: Final = Match(Node(None, 0, b"", [], 0.0), 0, 0, 0, is_claimed=False)


@final
class RadixTree:
    """One tree a salt: tokens under different salts never meet.

    Value of a leaf: v = (expected reuses within the horizon) x (seconds to compute it again) / bytes.
    Accesses lose weight exponentially, at the same rate everywhere, so the order of two values never changes
    by itself and a heap of them stays right. All pages have the same number of bytes.

    Args:
        page_size: tokens of a page.
        chunk_s: seconds that a chunk of a prompt takes after so many tokens of context.
        horizon_s: seconds after which an access counts for 1/e of a new one.
    """

    def __init__(self, page_size: int, chunk_s: Callable[[int], float], horizon_s: float = HORIZON_S) -> None:
        self._page_size = page_size
        self._horizon_s = horizon_s
        self._page_bytes = page_size * _TOKEN_BYTES
        self._chunk_s = chunk_s
        self._roots: dict[str, Node] = {}
        # (value, number of the entry, node): one at most for each node. Values only grow, so an entry that is
        # out of date comes too early and is put back.
        self._leaves: list[tuple[float, int, Node]] = []
        self._num_entries = 0
        self.num_nodes = 0
        self.num_pages = 0
        self.num_evictable = 0  # pages whose nodes nobody has locked
        self.version = 0  # a match holds as long as this stays

    # ------------------------------------------------------------------ looking

    def match(self, salt: str, tokens: Sequence[int], most_pages: int) -> Match:
        """How many of the first ``most_pages`` pages of some tokens are there. Changes nothing."""
        size, done, evictable = self._page_size, 0, 0
        node = self._roots.get(salt) or Node(None, 0, b"", [], 0.0, salt)
        while done < most_pages:
            page = pack(tokens[done * size : (done + 1) * size])
            child = node.children.get(page)
            if child is None:
                return Match(node, len(node.pages), done, evictable, page in node.claims)
            here = self._match_edge(child, tokens, done, min(len(child.pages), most_pages - done))
            done += here
            if child.num_locks == 0:
                evictable += here
            node = child
            if here < len(child.pages):
                return Match(node, here, done, evictable, is_claimed=False)
        return Match(node, len(node.pages), done, evictable, is_claimed=False)

    def _match_edge(self, node: Node, tokens: Sequence[int], start: int, most_pages: int) -> int:
        """Pages of an edge that the tokens from page ``start`` on match; the first one does."""
        size, page_bytes, here, window = self._page_size, self._page_bytes, 1, _FIRST_WINDOW
        while here < most_pages:
            end = min(here + window, most_pages)
            packed = pack(tokens[(start + here) * size : (start + end) * size])
            same = self._common(node.tokens[here * page_bytes : end * page_bytes], packed)
            here += same
            if here < end:
                break
            window *= 2  # what is looked at in vain stays in proportion to what is found
        return here

    def _common(self, a: bytes, b: bytes) -> int:
        """Leading pages that both have."""
        size = self._page_bytes
        if a.startswith(b):
            return len(b) // size
        low, high = 0, min(len(a), len(b)) // size
        while low < high:
            middle = (low + high + 1) // 2
            if a.startswith(b[: middle * size]):
                low = middle
            else:
                high = middle - 1
        return low

    def pages_to(self, node: Node) -> list[int]:
        """The pages from the root to the end of a node."""
        runs: list[list[int]] = []
        at: Node | None = node
        while at is not None:
            runs.append(at.pages)
            at = at.parent
        return [page for run in reversed(runs) for page in run]

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def claim(self, node: Node, page: bytes, owner: object) -> bool:
        """Says that somebody computes the page that comes after a node, unless somebody does already."""
        self.version += 1
        return node.claims.setdefault(page, owner) is owner

    def unclaim(self, node: Node, page: bytes) -> None:
        """Takes a claim back."""
        self.version += 1
        del node.claims[page]

    # ------------------------------------------------------------------ locking

    def lock(self, match: Match, now: float) -> Node:
        """Locks the path of a match that still holds, and counts an access; returns its last node."""
        self.version += 1
        node = match.node
        if node.parent is None:
            node = self._roots.setdefault(node.salt, node)
        elif match.num_here < len(node.pages):
            node = self._split(node, match.num_here)
        at: Node | None = node
        while at is not None:
            self._lock_one(at, now)
            at = at.parent
        return node

    def _lock_one(self, node: Node, now: float) -> None:
        if node.num_locks == 0:
            self.num_evictable -= len(node.pages)
        node.num_locks += 1
        node.heat = _log_add(node.heat, now / self._horizon_s)

    def unlock(self, node: Node) -> None:
        """Gives back the lock of a path. A node is worth no less than what was reached through it."""
        self.version += 1
        heat, at = _NEVER, node
        while True:
            heat = at.heat = max(at.heat, heat)
            at.num_locks -= 1
            if at.num_locks == 0:
                self.num_evictable += len(at.pages)
                self._offer(at)
            if at.parent is None:
                return
            at = at.parent

    # ------------------------------------------------------------------ growing

    def insert(
        self, node: Node, tokens: bytes, pages: list[int], now: float, *, may_grow: bool
    ) -> tuple[Node, list[int]]:
        """Puts full pages below a node that the caller has locked, and moves the lock to their end.

        Args:
            node: the end of the caller's path.
            tokens: of the pages, packed.
            pages: who holds them; those whose tokens the tree has already stay the caller's own.
            now: time of the access, in seconds.
            may_grow: the caller put the end of ``node`` there itself: the run may simply become longer.

        Returns:
            The node at the end, and the pages that the tree took.
        """
        self.version += 1
        size = self._page_bytes
        while tokens and (child := node.children.get(tokens[:size])) is not None:
            here = self._common(child.tokens, tokens[: len(child.tokens)])
            node = child if here == len(child.pages) else self._split(child, here)
            self._lock_one(node, now)
            tokens, pages, may_grow = tokens[here * size :], pages[here:], False
        if not pages:
            return node, pages
        self.num_pages += len(pages)
        if may_grow and node.num_locks == 1 and not node.children:
            node.tokens += tokens
            node.pages += pages
            return node, pages
        new = Node(node, node.end, tokens, list(pages), self._log_cost(node.end))
        node.children[tokens[:size]] = new
        new.num_locks = 1
        new.heat = now / self._horizon_s
        self.num_nodes += 1
        return new, pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cuts an edge after so many pages; returns the upper part. The lower part is the old node."""
        parent, size = node.parent, num_pages * self._page_bytes
        assert parent is not None
        upper = Node(parent, node.start, node.tokens[:size], node.pages[:num_pages], node.log_cost)
        upper.num_locks, upper.heat = node.num_locks, node.heat
        parent.children[node.tokens[: self._page_bytes]] = upper
        node.parent, node.start = upper, upper.end
        node.tokens, node.pages = node.tokens[size:], node.pages[num_pages:]
        node.log_cost = self._log_cost(node.start)
        upper.children[node.tokens[: self._page_bytes]] = node
        self.num_nodes += 1
        return upper

    def _log_cost(self, start: int) -> float:
        return math.log(max(self._chunk_s(start * self._page_size), _LEAST_S))

    # ------------------------------------------------------------------ shrinking

    def evict(self, num_pages: int) -> list[int]:
        """Takes out so many pages, or all that nobody has locked if these are fewer."""
        self.version += 1
        freed: list[int] = []
        while len(freed) < num_pages and self._leaves:
            value, _, node = heapq.heappop(self._leaves)
            node.is_queued = False
            if node.parent is None or node.num_locks or node.children:
                continue  # it was taken out, or is offered again when it is a free leaf
            if value < node.value:
                self._offer(node)
                continue
            freed += self._cut(node, num_pages - len(freed))
        return freed

    def forget(self, node: Node, after: int) -> list[int]:
        """Takes out the end of a path that was just unlocked, as far as nobody else uses it.

        Args:
            node: the end of the path.
            after: pages from the root that stay.
        """
        self.version += 1
        freed: list[int] = []
        while (parent := node.parent) is not None and node.start >= after:
            if node.num_locks or node.children:
                break
            freed += self._cut(node, len(node.pages))
            node = parent
        return freed

    def _cut(self, node: Node, num_pages: int) -> list[int]:
        """Takes the last pages off a free leaf; a leaf without any is taken out."""
        kept = max(0, len(node.pages) - num_pages)
        freed, parent = node.pages[kept:], node.parent
        assert parent is not None
        self.num_pages -= len(freed)
        self.num_evictable -= len(freed)
        if kept:
            node.pages, node.tokens = node.pages[:kept], node.tokens[: kept * self._page_bytes]
            self._offer(node)
            return freed
        del parent.children[node.tokens[: self._page_bytes]]
        node.parent = None
        self.num_nodes -= 1
        self._offer(parent)
        return freed

    def _offer(self, node: Node) -> None:
        """Lets eviction find a node if it is a free leaf; an empty root goes."""
        if node.num_locks or node.children or node.is_queued:
            return
        if node.parent is None:
            self._roots.pop(node.salt, None)
            return
        self._num_entries += 1
        node.is_queued = True
        heapq.heappush(self._leaves, (node.value, self._num_entries, node))

    def check_integrity(self) -> None:
        """Raises RuntimeError unless counters, locks, links and the heap agree with the nodes."""
        queued = {id(node) for _, _, node in self._leaves}
        num_nodes = num_pages = num_evictable = 0
        for node in self.nodes():
            num_pages += len(node.pages)
            num_nodes += node.parent is not None
            num_evictable += 0 if node.num_locks else len(node.pages)
            if len(node.tokens) != len(node.pages) * self._page_bytes:
                raise RuntimeError(f"{len(node.pages)} pages with {len(node.tokens)} bytes of tokens")
            for key, child in node.children.items():
                if child.parent is not node or child.start != node.end or not child.tokens.startswith(key):
                    raise RuntimeError(f"a child of {node.pages} does not know its place")
                if child.num_locks > node.num_locks:
                    raise RuntimeError(f"{child.num_locks} locks under {node.num_locks}")
            is_free_leaf = node.parent is not None and not node.num_locks and not node.children
            if is_free_leaf and id(node) not in queued:
                raise RuntimeError(f"eviction cannot find the leaf {node.pages}")
            if node.claims and not node.num_locks:
                raise RuntimeError("a claim without a lock")
        found, kept = (
            (num_nodes, num_pages, num_evictable),
            (self.num_nodes, self.num_pages, self.num_evictable),
        )
        if found != kept:
            raise RuntimeError(f"(nodes, pages, evictable) are {found}, counted as {kept}")


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), without overflow."""
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))
