"""The leaves of a tier, the least valuable first."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from typing import final

from jaxserve.core.radix_node import Node


@final
class LeafQueue:
    """Says whose pages go next.

    A node has one entry at most. Entries are looked at when they come up: one whose node has been locked,
    taken out or given to the other tier is dropped; that node is offered again when it is a free leaf. Values
    only grow (but for a node that is joined with its parent), so an entry that is out of date comes too early
    and is put back.

    Args:
        numbers: of entries; shared by the queues of a tree.
    """

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._heap: list[tuple[float, int, Node]] = []  # (value, number of the entry, node)
        self._kept: list[tuple[float, int, Node]] = []  # (kept until, number, node): not in the heap

    def offer(self, node: Node) -> None:
        """Adds a free leaf that has no entry."""
        node.entry = next(self._numbers)
        heapq.heappush(self._heap, (node.value, node.entry, node))

    def pop(self, now: float, below: float = math.inf, *, takes_kept: bool = True) -> Node | None:
        """Takes the leaf of the least value, if that is less than ``below``; its entry is gone.

        Those that are kept come after all others, and only with ``takes_kept``.
        """
        while self._kept and self._kept[0][0] <= now:
            self._restore()
        while (node := self._least(below)) is not None and node.kept_until > now:
            heapq.heappush(self._kept, (node.kept_until, node.entry, node))
        while node is None and self._kept and takes_kept:
            self._restore()
            node = self._least(below)
        if node is not None:
            node.entry = 0
        return node

    def _least(self, below: float) -> Node | None:
        """The node of the first entry that is true, taken off the heap."""
        while self._heap:
            value, number, node = self._heap[0]
            if node.entry != number or not node.is_free_leaf:
                heapq.heappop(self._heap)
                if node.entry == number:
                    node.entry = 0
            elif value < node.value:
                heapq.heapreplace(self._heap, (node.value, number, node))
            elif value >= below:
                return None
            else:
                heapq.heappop(self._heap)
                return node
        return None

    def _restore(self) -> None:
        """Puts the one that is kept for the shortest time back among the others, if its entry is true."""
        _, number, node = heapq.heappop(self._kept)
        if node.entry == number:
            heapq.heappush(self._heap, (node.value, number, node))

    def entries(self) -> Iterator[Node]:
        """The nodes that `pop` can find."""
        for _, number, node in itertools.chain(self._heap, self._kept):
            if node.entry == number:
                yield node
