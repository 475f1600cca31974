"""Blocks of host memory: who gets one when none is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, final

from jaxserve.core.page_pool import PagePool
from jaxserve.core.resume_costs import HostTier


class Reclaimer(Protocol):
    """Has blocks that it can do without."""

    def reclaim(self, num_blocks: int, now: float) -> bool:
        """Frees what is worth less than pages of a running request, until so many blocks are free."""
        ...


@final
class HostBlocks:
    """The blocks that preempted requests and cold prefixes share.

    Pages of a preempted request are used once more for certain, so they take the place of prefixes that are
    worth less than that; never the other way round.

    Attributes:
        pool: the blocks; 0 is never used.
        num_blocks: of the memory.
        num_for_requests: that hold preempted requests.
        reclaimer: who may give some up; None if nobody does.
    """

    def __init__(self, host: HostTier) -> None:
        self.pool = PagePool(max(host.num_blocks, 1) + 1)
        self.num_blocks = host.num_blocks
        self.num_for_requests = 0
        self.reclaimer: Reclaimer | None = None
        self._landed: list[int] = []

    def allocate_for_request(self, count: int, now: float) -> list[int] | None:
        """Blocks for the pages of a request that is being preempted; None if there is no room."""
        if count > self.num_blocks:
            return None
        lacks = count > self.pool.num_free
        if lacks and (self.reclaimer is None or not self.reclaimer.reclaim(count, now)):
            return None
        self.num_for_requests += count
        return self.pool.allocate(count)

    def release_of_request(self, blocks: Sequence[int], *, landed: bool = False) -> None:
        """Frees the blocks of a request, which the plan in the making lands or no plan needs."""
        self.num_for_requests -= len(blocks)
        if landed:
            self.release_landed(blocks)
        else:
            self.pool.release(blocks)

    def release_landed(self, blocks: Sequence[int]) -> None:
        """Drops a reference to each of some blocks once a plan has landed them.

        That plan may load them, too, and saves before it loads: they must not be given out for it.
        """
        self._landed += blocks

    def plan_taken(self) -> None:
        """Says that a plan will run that lands what was to be landed."""
        if self._landed:
            self.pool.release(self._landed)
            self._landed.clear()

    @property
    def num_for_prefixes(self) -> int:
        """Blocks that hold cold prefixes; one that is landing in part counts as free."""
        return self.pool.num_used - self.num_for_requests - len(set(self._landed))

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless every block is free or somebody's."""
        self.pool.check_integrity([*owned, self._landed])
