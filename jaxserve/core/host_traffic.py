"""All that goes between the device and host memory: preempted requests, and prefixes that nobody uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from jaxserve.core.cold_prefixes import ColdPrefixes
from jaxserve.core.copy_queue import CopyQueue
from jaxserve.core.draft import Draft
from jaxserve.core.host_blocks import HostBlocks
from jaxserve.core.swap import SwapSpace
from jaxserve.request import Request


@final
class HostTraffic:
    """What a scheduler must know of both.

    Args:
        blocks: that they share.
        copies: that the next plan carries.
        swap: preempted requests.
        cold: prefixes; None without a prefix cache, or without host memory.
    """

    def __init__(
        self, blocks: HostBlocks, copies: CopyQueue, swap: SwapSpace, cold: ColdPrefixes | None
    ) -> None:
        self._blocks = blocks
        self._copies = copies
        self._cold = cold
        self.swap = swap

    @property
    def num_loading(self) -> int:
        """Requests that have slot and pages, and wait for what is in them."""
        cold = self._cold
        if cold is None or not cold.num_waiting:
            return self.swap.num_loading
        # One may wait for both.
        return cold.num_waiting + sum(not cold.waits(request) for request in self.swap.loading())

    @property
    def has_loads(self) -> bool:
        """Whether anything is on its way to the device, for a request or in advance."""
        cold = self._cold
        return self.swap.num_loading > 0 or (cold is not None and cold.num_loads + cold.num_waiting > 0)

    def is_loading(self, request: Request) -> bool:
        """Whether a request must not compute yet."""
        return self.waits_for_prefix(request) or self.swap.is_loading(request)

    def waits_for_prefix(self, request: Request) -> bool:
        """Whether pages that a request shares are not complete."""
        return self._cold is not None and self._cold.waits(request)

    def arrived(self, numbers: Iterable[int]) -> None:
        """Says that loads have come."""
        self._copies.arrived(numbers)

    def land(self, *, waits_for_nothing_else: bool) -> list[Request]:
        """Requests whose pages are complete from this plan on, with their counts of computed tokens.

        Args:
            waits_for_nothing_else: complete those of one request although they have not arrived: the step
                will wait.
        """
        ready: list[Request] = []
        if self._cold is not None:
            landed = self._cold.land(waits_for_nothing_else=waits_for_nothing_else)
            ready = [request for request in landed if not self.swap.is_loading(request)]
        may_wait = waits_for_nothing_else and not ready
        return ready + self.swap.land(self.waits_for_prefix, waits_for_nothing_else=may_wait)

    def land_all(self) -> None:
        """Completes what is loaded for nobody who runs: those who wait may need its pages."""
        if self._cold is not None:
            self._cold.land_all()

    def forget(self) -> None:
        """Forgets what is on the host and on its way: the device that it came from has failed."""
        self.swap.forget()
        if self._cold is not None:
            self._cold.forget()
        self._copies.forget()

    def take_copies(self, draft: Draft) -> None:
        """Puts the copies that were asked for into a plan that will run."""
        draft.saves, draft.loads, draft.landings = self._copies.take()
        self._blocks.plan_taken()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is free, a preempted request's or a prefix's."""
        self.swap.check_integrity()
        self._copies.check_integrity()
        tables = self.swap.tables()
        self._blocks.check_integrity(tables if self._cold is None else tables + self._cold.tables())
