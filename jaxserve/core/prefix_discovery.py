"""Shared prefixes, found by what the tree knows of them: who is used often, by many different continuations.

A node with at least four different children and six hits a minute is *promoted*: others leave the device
before it does. Hits are counted with exp(-age / horizon), so a node is promoted once they have lasted for a
while, and it is no longer when they would have faded below that rate.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

from jaxserve.core.radix_node import Node
from jaxserve.core.radix_tree import RadixTree

_LEAST_CHILDREN = 4
_LEAST_HITS_A_MINUTE = 6.0
_MOST_SHOWN = 5
_MOST_PROMOTED = 1024  # before those that are no longer are looked for


class SharedPrefix(NamedTuple):
    """A beginning that many requests have.

    Attributes:
        num_tokens: of it.
        num_children: different continuations that there have been.
        hits_per_minute: lately.
    """

    num_tokens: int
    num_children: int
    hits_per_minute: float


@final
class PrefixDiscovery:
    """Promotes nodes of a tree.

    Args:
        tree: whose.
        page_size: tokens of a page.
        horizon_s: of the tree's accesses.
    """

    def __init__(self, tree: RadixTree, page_size: int, horizon_s: float) -> None:
        self._tree = tree
        self._page_size = page_size
        self._horizon_s = horizon_s
        self._promoted: dict[Node, None] = {}
        self.num_promotions = 0

    def used(self, node: Node, now: float) -> None:
        """Looks at a node that a request has just reached or passed."""
        if node.num_born < _LEAST_CHILDREN or node.parent is None:
            return
        hits = self._hits_per_minute(node, now)
        if hits < _LEAST_HITS_A_MINUTE:
            return
        node.kept_until = max(node.kept_until, now + self._horizon_s * math.log(hits / _LEAST_HITS_A_MINUTE))
        if node not in self._promoted:
            self._promoted[node] = None
            self.num_promotions += 1
            if len(self._promoted) > _MOST_PROMOTED:
                self._forget(now)

    def promoted(self, now: float) -> list[SharedPrefix]:
        """The nodes that are promoted now, most used first."""
        self._forget(now)
        found = [
            SharedPrefix(n.end * self._page_size, n.num_born, self._hits_per_minute(n, now))
            for n in self._promoted
        ]
        return sorted(found, key=lambda prefix: -prefix.hits_per_minute)[:_MOST_SHOWN]

    def _forget(self, now: float) -> None:
        for node in list(self._promoted):
            if node.parent is None or self._hits_per_minute(node, now) < _LEAST_HITS_A_MINUTE:
                del self._promoted[node]

    def _hits_per_minute(self, node: Node, now: float) -> float:
        return 60.0 / self._horizon_s * self._tree.expected_uses(node, now)
