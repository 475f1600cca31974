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
from collections.abc import Iterable
from typing import NamedTuple, final

from jaxserve.core.draft import Draft
from jaxserve.core.page_pool import PagePool
from jaxserve.core.plan import NO_PAGE, PageCopy
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
        num_used_blocks, num_blocks: of host memory.
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
    """

    def __init__(self, host: HostTier, page_size: int, costs: ResumeCosts) -> None:
        self._host = host
        self._page_size = page_size
        self._costs = costs
        self._pool = PagePool(max(host.num_blocks, 1) + 1)  # block 0 is never used
        self._saved: dict[Request, _Saved] = {}
        self._loading: dict[int, Request] = {}  # number of the copy -> request; oldest first
        self._arrived: set[int] = set()
        self._saves: list[PageCopy] = []  # that no plan has yet
        self._loads: list[PageCopy] = []
        self._num_copies = 0
        self._saved_blocks = self._loaded_blocks = self._saved_tokens = self._resumed_tokens = 0

    @property
    def num_loading(self) -> int:
        """Requests that have slot and pages, and wait for what is in them."""
        return len(self._loading)

    def is_loading(self, request: Request) -> bool:
        return request in self._loading.values()

    def save(self, request: Request) -> None:
        """Copies the pages of a request that is being preempted, if that is cheaper than computing them.

        Call it while it still owns them. Those of a prompt that is in part computed are not worth it.
        """
        if request in self._saved:  # it was preempted while it loaded
            self._cancel(request)
            return
        num_tokens = request.num_computed_tokens
        if request.num_tokens - num_tokens != 1 or not self._costs.prefers_swap(num_tokens):
            return
        pages = request.page_ids[: -(-num_tokens // self._page_size)]
        count = -(-len(pages) // self._host.block_pages)
        if count > self._pool.num_free:
            return
        blocks = self._pool.allocate(count)
        self._saved[request] = _Saved(blocks, num_tokens)
        self._saves.append(self._copy(request, blocks, pages))
        self._saved_blocks += count
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
        copy = self._copy(request, saved.blocks[skipped:], pages[skipped * self._host.block_pages :])
        self._loading[copy.number] = request
        self._loads.append(copy)
        self._loaded_blocks += len(copy.blocks)

    def arrived(self, numbers: Iterable[int]) -> None:
        """Says that loads have come; of those that were cancelled it does not matter."""
        self._arrived.update(number for number in numbers if number in self._loading)

    def land(self, draft: Draft, *, waits_for_nothing_else: bool) -> list[Request]:
        """Requests whose pages are complete from this plan on, with their counts of computed tokens.

        Args:
            waits_for_nothing_else: land the oldest load even if it has not arrived: the step will wait.
        """
        numbers = [number for number in self._loading if number in self._arrived]
        if not numbers and waits_for_nothing_else and self._loading:
            numbers = [next(iter(self._loading))]
        landed: list[Request] = []
        for number in numbers:
            request = self._loading.pop(number)
            self._arrived.discard(number)
            saved = self._saved.pop(request)
            self._resumed_tokens += saved.num_tokens - request.num_computed_tokens
            request.num_computed_tokens = saved.num_tokens
            self._pool.release(saved.blocks)
            draft.landings.append(number)
            landed.append(request)
        return landed

    def drop(self, request: Request) -> None:
        """Frees the blocks of a request that leaves or is computed again."""
        self._cancel(request)
        saved = self._saved.pop(request, None)
        if saved is not None:
            self._pool.release(saved.blocks)

    def take_copies(self, draft: Draft) -> None:
        """Puts the copies that were asked for into a plan that will run."""
        draft.saves, self._saves = self._saves, []
        draft.loads, self._loads = self._loads, []

    def stats(self) -> SwapStats:
        return SwapStats(
            self._saved_blocks,
            self._loaded_blocks,
            self._saved_tokens,
            self._resumed_tokens,
            self._pool.num_used,
            self._host.num_blocks,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is free or one request's, and who loads was saved."""
        self._pool.check_integrity([saved.blocks for saved in self._saved.values()])
        strangers = [r.id for r in self._loading.values() if r not in self._saved]
        if strangers or not self._arrived <= set(self._loading):
            raise RuntimeError(f"loads of nothing that was saved: {strangers}, arrived: {self._arrived}")
        if any(request.is_finished for request in self._saved):
            raise RuntimeError("a finished request has blocks")

    def _cancel(self, request: Request) -> None:
        for number in [n for n, loading in self._loading.items() if loading is request]:
            del self._loading[number]
            self._arrived.discard(number)
            self._loads = [copy for copy in self._loads if copy.number != number]

    def _copy(self, request: Request, blocks: list[int], pages: list[int]) -> PageCopy:
        assert request.slot is not None
        self._num_copies += 1
        return PageCopy(self._num_copies, request.id, request.slot, tuple(blocks), tuple(pages))
