"""The host tier: preempted requests whose KV pages are copied to host memory instead of computed again.

A block is a few pages that are copied together. What a block holds, and where a request is:

    running --save--> waiting, its blocks are written --load--> has slot and pages --land--> running
                      (its KV pages are free at once)           (does not compute yet)

Nothing waits for a copy. Saves are dispatched before the step that may overwrite their pages, and devices run
in that order. A load first only brings blocks near; a result says which have arrived, and the next plan puts
them into the request's pages, just before its next token is computed. Blocks are free when their load has
landed, or the request has left.

Host only. The executor copies in the order of the plans, so a block may be given out as soon as it is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple, final

from jaxserve.core.copy_queue import CopyQueue
from jaxserve.core.host_blocks import HostBlocks
from jaxserve.core.plan import NO_PAGE
from jaxserve.core.resume_costs import HostTier, ResumeCosts
from jaxserve.request import Request

# Loaded blocks wait in device memory until they land.
_MOST_LOADING = 2


class SwapStats(NamedTuple):
    """Counters since start, and the blocks in use.

    Attributes:
        saved_blocks, loaded_blocks: copied to the host, and back.
        saved_tokens: computed tokens of requests that were preempted and saved.
        resumed_tokens: of these, those that landed again and were not recomputed.
        num_used_blocks: that hold preempted requests.
        num_blocks: of host memory.
    """

    saved_blocks: int
    loaded_blocks: int
    saved_tokens: int
    resumed_tokens: int
    num_used_blocks: int
    num_blocks: int


@dataclasses.dataclass(slots=True)
class _Saved:
    """A request's pages on the host."""

    blocks: list[int]
    num_tokens: int


@final
class SwapSpace:
    """Which blocks of host memory hold whose pages, and which copies are under way.

    Args:
        host: the memory, and what a copy costs.
        page_size: tokens of a KV page.
        costs: whether a copy is worth it.
        blocks: of the memory.
        copies: that the next plan carries.
    """

    def __init__(
        self, host: HostTier, page_size: int, costs: ResumeCosts, blocks: HostBlocks, copies: CopyQueue
    ) -> None:
        self._host = host
        self._page_size = page_size
        self._costs = costs
        self._blocks = blocks
        self._copies = copies
        self._saved: dict[Request, _Saved] = {}
        self._loading: dict[int, Request] = {}  # number of the copy -> request; oldest first
        self._saved_blocks = self._loaded_blocks = self._saved_tokens = self._resumed_tokens = 0

    @property
    def num_loading(self) -> int:
        """Requests that have slot and pages, and wait for what is in them."""
        return len(self._loading)

    def loading(self) -> Iterable[Request]:
        """The requests that load."""
        return self._loading.values()

    def is_loading(self, request: Request) -> bool:
        return request in self._loading.values()

    def save(self, request: Request, now: float) -> None:
        """Copies the pages of a request that is being preempted, if that is cheaper than computing them.

        Call it while it still owns them. Those of a prompt that is in part computed, or loaded, are not worth
        it.
        """
        if request in self._saved:  # it was preempted while it loaded
            self._cancel(request)
            return
        num_tokens = request.num_computed_tokens
        if request.num_tokens - num_tokens != 1 or not self._costs.prefers_swap(num_tokens):
            return
        pages = request.page_ids[: -(-num_tokens // self._page_size)]
        blocks = self._blocks.allocate_for_request(-(-len(pages) // self._host.block_pages), now)
        if blocks is None:
            return
        self._saved[request] = _Saved(blocks, num_tokens)
        self._copies.save(blocks, pages, request)
        self._saved_blocks += len(blocks)
        self._saved_tokens += num_tokens

    def may_load(self, request: Request, num_matched: int) -> bool:
        """Whether loading what was saved of a request is cheaper than computing what the cache lacks.

        Args:
            num_matched: leading tokens that the prefix cache still has.
        """
        saved = self._saved.get(request)
        if saved is None or num_matched >= saved.num_tokens:
            return False
        missing = saved.num_tokens - num_matched
        return self._costs.swap_s(missing) < 2 * self._costs.recompute_s(missing)  # half is paid already

    @property
    def is_busy(self) -> bool:
        """Whether as many requests load as may at once."""
        return len(self._loading) >= _MOST_LOADING

    def load(self, request: Request, num_matched_pages: int) -> None:
        """Begins to bring a request's blocks back; it owns its slot and pages already."""
        saved = self._saved[request]
        pages = [NO_PAGE] * num_matched_pages + request.page_ids[num_matched_pages:]
        pages = pages[: -(-saved.num_tokens // self._page_size)]
        skipped = num_matched_pages // self._host.block_pages
        blocks = saved.blocks[skipped:]
        number = self._copies.load(blocks, pages[skipped * self._host.block_pages :], request)
        self._loading[number] = request
        self._loaded_blocks += len(blocks)

    def land(self, waits: Callable[[Request], bool], *, waits_for_nothing_else: bool) -> list[Request]:
        """Requests whose pages are complete from this plan on, with their counts of computed tokens.

        Args:
            waits: whether a request waits for something else; it does not land then.
            waits_for_nothing_else: land the oldest load even if it has not arrived: the step will wait.
        """
        able = [number for number, request in self._loading.items() if not waits(request)]
        numbers = [number for number in able if self._copies.has_arrived(number)]
        if not numbers and waits_for_nothing_else:
            numbers = able[:1]
        landed: list[Request] = []
        for number in numbers:
            request = self._loading.pop(number)
            saved = self._saved.pop(request)
            self._resumed_tokens += saved.num_tokens - request.num_computed_tokens
            request.num_computed_tokens = saved.num_tokens
            self._blocks.release_of_request(saved.blocks, landed=True)
            self._copies.land(number)
            landed.append(request)
        return landed

    def drop(self, request: Request) -> None:
        """Frees the blocks of a request that leaves or is computed again."""
        self._cancel(request)
        saved = self._saved.pop(request, None)
        if saved is not None:
            self._blocks.release_of_request(saved.blocks)

    def forget(self) -> None:
        """Frees every block."""
        for request in list(self._saved):
            self.drop(request)

    def stats(self) -> SwapStats:
        return SwapStats(
            self._saved_blocks,
            self._loaded_blocks,
            self._saved_tokens,
            self._resumed_tokens,
            self._blocks.num_for_requests,
            self._host.num_blocks,
        )

    def tables(self) -> list[list[int]]:
        """The blocks of each request."""
        return [saved.blocks for saved in self._saved.values()]

    def check_integrity(self) -> None:
        """Raises RuntimeError unless blocks are counted right, and who loads was saved."""
        strangers = [r.id for r in self._loading.values() if r not in self._saved]
        counted = self._blocks.num_for_requests
        if strangers or counted != sum(map(len, self.tables())):
            raise RuntimeError(f"loads of nothing that was saved: {strangers}, or not {counted} blocks")
        if any(request.is_finished for request in self._saved):
            raise RuntimeError("a finished request has blocks")

    def _cancel(self, request: Request) -> None:
        for number in [n for n, loading in self._loading.items() if loading is request]:
            del self._loading[number]
            self._copies.cancel(number)
