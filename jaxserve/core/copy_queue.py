"""Copies between KV pages and host memory that the next plan carries, and which of them have arrived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from jaxserve.core.plan import NO_SLOT, PageCopy
from jaxserve.request import Request


@final
class CopyQueue:
    """Numbers copies. What is asked for waits here until a plan runs."""

    def __init__(self) -> None:
        self._saves: list[PageCopy] = []
        self._loads: list[PageCopy] = []
        self._landings: list[int] = []
        self._num_copies = 0
        self._under_way: set[int] = set()  # numbers of loads that have not landed
        self._arrived: set[int] = set()

    @property
    def has_landings(self) -> bool:
        """Whether pages count as complete that no plan has completed yet."""
        return bool(self._landings)

    def save(self, blocks: Sequence[int], pages: Sequence[int], request: Request | None = None) -> int:
        """Asks for pages to be copied to blocks; returns the number of the copy.

        Args:
            request: whose they are; None for pages of the prefix cache.
        """
        self._saves.append(self._copy(blocks, pages, request))
        return self._num_copies

    def load(self, blocks: Sequence[int], pages: Sequence[int], request: Request | None = None) -> int:
        """Asks for blocks to be brought near; they go into the pages when they land."""
        self._loads.append(self._copy(blocks, pages, request))
        self._under_way.add(self._num_copies)
        return self._num_copies

    def arrived(self, numbers: Iterable[int]) -> None:
        """Says that loads have come; of those that were cancelled it does not matter."""
        self._arrived.update(number for number in numbers if number in self._under_way)

    def has_arrived(self, number: int) -> bool:
        return number in self._arrived

    def land(self, number: int) -> None:
        """Puts a load into its pages before the next step, which waits for it if it has not arrived."""
        self._landings.append(number)
        self._forget(number)

    def cancel(self, number: int) -> None:
        """Lets nothing come of a load."""
        self._loads = [copy for copy in self._loads if copy.number != number]
        self._forget(number)

    def take(self) -> tuple[list[PageCopy], list[PageCopy], list[int]]:
        """Saves, loads and landings for a plan that will run."""
        taken = self._saves, self._loads, self._landings
        self._saves, self._loads, self._landings = [], [], []
        return taken

    def forget(self) -> None:
        """Drops every copy, asked for or under way: the device has lost what they were of."""
        self.take()
        self._under_way.clear()
        self._arrived.clear()

    def check_integrity(self) -> None:
        """Raises RuntimeError if something arrived that nobody waits for."""
        if not self._arrived <= self._under_way:
            raise RuntimeError(f"arrived: {self._arrived}, under way: {self._under_way}")

    def _forget(self, number: int) -> None:
        self._under_way.discard(number)
        self._arrived.discard(number)

    def _copy(self, blocks: Sequence[int], pages: Sequence[int], request: Request | None) -> PageCopy:
        self._num_copies += 1
        if request is None:
            return PageCopy(self._num_copies, "", NO_SLOT, tuple(blocks), tuple(pages))
        assert request.slot is not None
        return PageCopy(self._num_copies, request.id, request.slot, tuple(blocks), tuple(pages))
