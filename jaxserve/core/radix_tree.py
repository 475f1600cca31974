"""A radix tree over full KV pages: which page holds the keys and values of which tokens.

An edge is a run of tokens in whole pages. A running request locks the path of its tokens. What nobody locks
can be evicted: leaves first, and of these the least valuable. Reference counts of pages are the caller's
(`jaxserve.core.prefix_cache`).

    root of a salt --[system prompt: pages 7 3]--+--[question: page 9]
                                                 +--[question: pages 4 5]--[answer and next question: page 8]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import final

from jaxserve.core.leaf_queue import LeafQueue
from jaxserve.core.radix_check import TreeCounts, check_nodes
from jaxserve.core.radix_match import Matcher
from jaxserve.core.radix_node import NEVER, TOKEN_BYTES, Match, Node, PrefixLoad

# Seconds after which an access counts for 1/e of a new one. `bench/prefix.py --parts evict` compares it with
# one second, which is least recently used.
HORIZON_S = 300.0
_LEAST_S = 1e-9

# Gives the last so many pages of a leaf, or fewer, places on the host, or None; may take nodes out there.
type Demote = Callable[[Node, int], list[int] | None]


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
        block_pages: pages of a block of host memory; they go there together.

    Attributes:
        num_nodes: edges.
        num_pages: on the device.
        num_evictable: of these, those whose nodes nobody has locked.
        num_host_pages: on the host.
        num_unused: preloaded pages that left the device before anybody came.
        dropped: places on the host that are no longer in the tree; the owner frees and clears them.
        last_value: of the leaf that was evicted last; `NEVER` before that.
        version: a match holds as long as this stays.
    """

    def __init__(
        self,
        page_size: int,
        chunk_s: Callable[[int], float],
        horizon_s: float = HORIZON_S,
        block_pages: int = 1,
    ) -> None:
        self._page_size = page_size
        self._horizon_s = horizon_s
        self._page_bytes = page_size * TOKEN_BYTES
        self._matcher = Matcher(page_size)
        self._chunk_s = chunk_s
        self._roots: dict[str, Node] = {}
        self._block_pages = block_pages
        numbers = itertools.count(1)
        self._near, self._far = LeafQueue(numbers), LeafQueue(numbers)
        self.num_nodes = self.num_pages = self.num_evictable = self.num_host_pages = self.num_unused = 0
        self.dropped: list[int] = []
        self.last_value = NEVER
        self.version = 0

    def value_of(self, expected_uses: float, start: int, now: float) -> float:
        """What a node at that depth is worth that will be used so often within the horizon."""
        return math.log(expected_uses) + self._log_cost(start) + now / self._horizon_s

    def expected_uses(self, node: Node, now: float) -> float:
        """Of a node, within the horizon."""
        return math.exp(node.heat - now / self._horizon_s)

    def marginal_s(self, now: float) -> float:
        """Expected reuses x seconds of a chunk, of the leaf that was evicted last; 0 before that."""
        return math.exp(self.last_value - now / self._horizon_s)

    # ------------------------------------------------------------------ looking

    def match(self, salt: str, tokens: Sequence[int], most_pages: int) -> Match:
        """How many of the first ``most_pages`` pages of some tokens are there. Changes nothing."""
        root = self._roots.get(salt) or Node(None, 0, b"", [], 0.0, salt)
        return self._matcher.match(root, tokens, most_pages)

    def pages_to(self, node: Node) -> list[int]:
        """The pages from the root to the end of a node on the device."""
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

    def hold(self, node: Node) -> None:
        """Locks the path to a node, on either tier, without an access."""
        self.version += 1
        at: Node | None = node
        while at is not None:
            if at.num_locks == 0 and not at.on_host:
                self.num_evictable -= len(at.pages)
            at.num_locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """Gives back the lock of a path. A node is worth no less than what was reached through it."""
        self.version += 1
        heat, at = NEVER, node
        while True:
            heat = at.heat = max(at.heat, heat)
            at.num_locks -= 1
            if at.num_locks == 0:
                if not at.on_host:
                    self.num_evictable += len(at.pages)
                self._offer(at)
            if at.parent is None:
                return
            at = at.parent

    # ------------------------------------------------------------------ from the host

    def host_path(self, match: Match) -> list[Node]:
        """The nodes on the host that a match reaches, top first; the last edge is cut where it ends."""
        assert match.host is not None
        self.version += 1
        node, here, _ = match.host
        if here < len(node.pages):
            node = self._split(node, here)
        return self.host_nodes(node)

    def host_nodes(self, node: Node) -> list[Node]:
        """The nodes on the host on the path to one of them, top first."""
        nodes: list[Node] = []
        while node.on_host and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def bring_near(self, nodes: list[Node], pages: list[int], load: PrefixLoad) -> None:
        """Gives nodes of a path on the host, which somebody holds, KV pages instead of their places there."""
        self.version += 1
        for node in nodes:
            pages = self._move_near(node, pages)
            node.load = load

    def lock_more(self, nodes: list[Node], now: float) -> Node:
        """Takes a path's lock on to the nodes that come next; returns the last of them."""
        self.version += 1
        for node in nodes:
            self._lock_one(node, now)
        return nodes[-1]

    def _move_near(self, node: Node, pages: list[int]) -> list[int]:
        """Replaces a node's places on the host by the first of some pages; returns the others."""
        count = len(node.pages)
        assert node.parent is not None
        node.pages, node.on_host, node.entry = pages[:count], False, 0
        node.parent.num_near += 1
        self.num_pages += count
        self.num_host_pages -= count
        return pages[count:]

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
        taken: list[int] = []
        while tokens and (child := node.children.get(tokens[:size])) is not None:
            here = self._matcher.common_pages(child.tokens, tokens[: len(child.tokens)])
            node = child if here == len(child.pages) else self._split(child, here)
            if node.on_host:  # it was computed again
                self.dropped += node.pages
                self._move_near(node, pages[:here])
                self.num_evictable += 0 if node.num_locks else here
                taken += pages[:here]
            self._lock_one(node, now)
            tokens, pages, may_grow = tokens[here * size :], pages[here:], False
        if not pages:
            return node, taken
        self.num_pages += len(pages)
        if may_grow and node.num_locks == 1 and not node.children:
            node.tokens += tokens
            node.pages += pages
            return node, pages
        new = Node(node, node.end, tokens, list(pages), self._log_cost(node.end))
        node.children[tokens[:size]] = new
        node.num_near += 1
        node.num_born += 1
        new.num_locks = 1
        new.heat = now / self._horizon_s
        self.num_nodes += 1
        return new, taken + pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cuts an edge after so many pages; returns the upper part. The lower part is the old node."""
        parent, size = node.parent, num_pages * self._page_bytes
        assert parent is not None
        upper = Node(parent, node.start, node.tokens[:size], node.pages[:num_pages], node.log_cost)
        upper.num_locks, upper.heat, upper.kept_until = node.num_locks, node.heat, node.kept_until
        upper.on_host, upper.load, upper.is_preloaded = node.on_host, node.load, node.is_preloaded
        upper.num_near, upper.num_born = int(not node.on_host), 1
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

    def evict(
        self,
        num_pages: int,
        now: float = math.inf,
        below: float = math.inf,
        demote: Demote | None = None,
    ) -> list[int]:
        """Takes so many pages off the device, or all that nobody has locked if these are fewer.

        Args:
            num_pages: at least so many; with ``demote`` up to a block more.
            now: nodes that are kept for longer go last, and only without ``below``.
            below: only pages that are worth less.
            demote: where they may go.
        """
        self.version += 1
        freed: list[int] = []
        takes_kept = below == math.inf
        while len(freed) < num_pages and (node := self._near.pop(now, below, takes_kept=takes_kept)):
            self.last_value = node.value
            count = num_pages - len(freed)
            freed += (demote and self._demote_tail(node, count, demote)) or self._cut(node, count)
        return freed

    def demote(self, num_pages: int, now: float, demote: Demote) -> list[int]:
        """Moves so many pages to the host, least valuable first, until one has no place there.

        What is kept for longer than ``now`` stays.
        """
        freed: list[int] = []
        while len(freed) < num_pages and (node := self._near.pop(now, takes_kept=False)):
            moved = self._demote_tail(node, num_pages - len(freed), demote)
            if moved is None:
                self._offer(node)
                break
            self.last_value = node.value
            freed += moved
        return freed

    def _demote_tail(self, node: Node, count: int, demote: Demote) -> list[int] | None:
        """Moves whole blocks of a free leaf to the host; returns the pages, or None if they have no place."""
        count = min(-(-count // self._block_pages) * self._block_pages, len(node.pages))
        places = demote(node, count)
        return None if places is None else self._demote(node, places)

    def _demote(self, node: Node, places: list[int]) -> list[int]:
        """Gives the last pages of a free leaf places on the host; returns the pages."""
        self.version += 1
        count = len(places)
        if count < len(node.pages):
            self._split(node, len(node.pages) - count)
        parent, pages = node.parent, node.pages
        assert parent is not None
        self.num_unused += count if node.is_preloaded else 0
        node.is_preloaded = False
        node.pages, node.on_host, node.entry = places, True, 0
        parent.num_near -= 1
        self.num_pages -= count
        self.num_evictable -= count
        self.num_host_pages += count
        self._join_child(node)
        if node.parent is not None:
            self._offer(node)
        self._offer(parent)
        return pages

    def _join_child(self, node: Node) -> None:
        """Makes one edge of a node on the host and what was cut off it before."""
        if node.num_born != 1 or len(node.children) != 1:
            return
        (child,) = node.children.values()
        if child.heat != node.heat:
            return
        parent = node.parent
        assert parent is not None
        child.tokens, child.pages = node.tokens + child.tokens, node.pages + child.pages
        child.parent, child.start, child.log_cost = parent, node.start, node.log_cost
        parent.children[child.tokens[: self._page_bytes]] = child
        node.parent = None
        self.num_nodes -= 1

    def evict_from_host(self, below: float = math.inf) -> bool:
        """Takes out what the least valuable leaf on the host has of its last block, if that is worth less."""
        node = self._far.pop(math.inf, below)
        if node is None:
            return False
        self.version += 1
        block = node.pages[-1] // self._block_pages
        count = sum(1 for place in node.pages[-self._block_pages :] if place // self._block_pages == block)
        self._cut(node, count)
        return True

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
        """Takes the last pages off a free leaf, and what follows; a leaf without any is taken out.

        Returns:
            The pages, if they were on the device.
        """
        for child in list(node.children.values()):
            self._drop(child)
        kept = max(0, len(node.pages) - num_pages)
        freed, parent = node.pages[kept:], node.parent
        assert parent is not None
        if node.on_host:
            self.num_host_pages -= len(freed)
            self.dropped += freed
        else:
            self.num_pages -= len(freed)
            self.num_evictable -= len(freed)
            self.num_unused += len(freed) if node.is_preloaded else 0
        if kept:
            node.pages, node.tokens = node.pages[:kept], node.tokens[: kept * self._page_bytes]
            self._offer(node)
        else:
            self._take_out(node)
            self._offer(parent)
        return [] if node.on_host else freed

    def _drop(self, node: Node) -> None:
        """Takes a node on the host out, with all that follows."""
        stack = [node]
        while stack:
            one = stack.pop()
            stack.extend(one.children.values())
            one.children = {}
            self.num_host_pages -= len(one.pages)
            self.dropped += one.pages
            self._take_out(one)

    def _take_out(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        parent.children.pop(node.tokens[: self._page_bytes], None)
        parent.num_near -= 0 if node.on_host else 1
        node.parent, node.entry = None, 0
        self.num_nodes -= 1

    def _offer(self, node: Node) -> None:
        """Lets eviction find a node if it is a free leaf; an empty root goes."""
        if node.parent is None:
            if not node.children and not node.num_locks:
                self._roots.pop(node.salt, None)
        elif not node.entry and node.is_free_leaf:
            (self._far if node.on_host else self._near).offer(node)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless counters, locks, links, tiers and queues agree with the nodes."""
        counts = TreeCounts(self.num_nodes, self.num_pages, self.num_evictable, self.num_host_pages)
        check_nodes(self.nodes(), self._page_bytes, counts, (self._near, self._far))


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), without overflow."""
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))
