"""The host tier of the prefix cache: where pages go that the device has no room for, and how they come back.

    on the device --demote--> on the host --begin--> loading: has KV pages, nobody reads them --land-->
                              (evicted by value)     (locked by the load)                    on the device

A load belongs to the tree and not to whoever asked for it: requests whose path it is on wait for it, others
run, and it ends though they leave. Copies are those of `jaxserve.core.swap`: nothing waits for them, and
blocks are copied as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, final

from jaxserve.core.copy_queue import CopyQueue
from jaxserve.core.host_blocks import HostBlocks
from jaxserve.core.plan import NO_PAGE
from jaxserve.core.radix_node import Node, PrefixLoad
from jaxserve.core.radix_tree import RadixTree
from jaxserve.core.resume_costs import MOST_LOADING, MOST_SAVING, HostTier, ResumeCosts
from jaxserve.request import Request

_PIECE_BLOCKS = 8


class HostSide(NamedTuple):
    """What a prefix cache needs for a tier on the host.

    Attributes:
        tier: the memory, and what a copy costs.
        blocks: of the memory, shared with preempted requests.
        copies: that the next plan carries.
        costs: whether a copy is worth it.
    """

    tier: HostTier
    blocks: HostBlocks
    copies: CopyQueue
    costs: ResumeCosts


class ColdStats(NamedTuple):
    """Bytes since start, and what is on the host now.

    Attributes:
        saved_bytes: copied to the host. They are loaded, wasted, or still there.
        loaded_bytes: brought back, for requests that had come and for those expected.
        wasted_bytes: given up on the host, or computed again.
        preloaded_bytes: of those that were loaded, for requests expected.
        preload_useful_bytes, preload_wasted_bytes: of these, used by a request, and evicted before that.
        num_host_pages, num_host_blocks: that hold cold prefixes.
        num_loads: of prefixes, under way.
    """

    saved_bytes: int
    loaded_bytes: int
    wasted_bytes: int
    preloaded_bytes: int
    preload_useful_bytes: int
    preload_wasted_bytes: int
    num_host_pages: int
    num_host_blocks: int
    num_loads: int


@final
class ColdPrefixes:
    """Moves pages of a tree between its tiers.

    Args:
        tree: whose pages these are.
        page_size: tokens of a page.
        host: where they go.
    """

    def __init__(self, tree: RadixTree, page_size: int, host: HostSide) -> None:
        self._tree = tree
        self._page_size = page_size
        self._tier, self._blocks, self._copies, self._costs = host
        self._block_pages = self._tier.block_pages
        self._now = 0.0
        self._saving_until = 0.0  # when the copies to the host are done, if they go as fast as they should
        self._loads: list[PrefixLoad] = []
        self._copying: dict[int, tuple[PrefixLoad, int]] = {}  # number of a copy -> (its load, blocks)
        self._landed: list[PrefixLoad] = []  # done, but no plan has run yet that lands them
        self._waiting: dict[Request, tuple[list[PrefixLoad], int]] = {}  # for what, and tokens it has then
        self._saved = self._loaded = self._wasted = 0  # pages
        self._preloaded = self._preload_useful = 0
        host.blocks.reclaimer = self

    # ------------------------------------------------------------------ to the host

    def demote(self, node: Node, count: int) -> list[int] | None:
        """Places on the host for the last pages of a leaf, which are copied there; None if not worth it.

        It is if loading is cheaper than computing, and if there is room among what is worth less. So many
        pages at most that the link keeps up; the last ones then. A plan saves before it lands, so pages that
        the next plan lands cannot be saved.
        """
        if node.load is not None and not node.load.is_planned:
            return None
        size = self._block_pages
        num_blocks = min(-(-count // size), self._link_blocks())
        count = min(count, num_blocks * size)
        start = (node.end - count) * self._page_size
        if self._costs.load_s(num_blocks) >= self._costs.compute_s(count * self._page_size, start):
            return None
        if not num_blocks or not self._make_room(num_blocks, node.value):
            return None
        self._saving_until = max(self._saving_until, self._now) + self._tier.copy_s(num_blocks)
        blocks = self._blocks.pool.allocate(num_blocks)
        self._copies.save(blocks, node.pages[-count:])
        places = [block * size + offset for block in blocks for offset in range(size)][:count]
        # A block has a reference for each of its pages.
        self._blocks.pool.share([place // size for place in places if place % size])
        self._saved += count
        return places

    def _link_blocks(self) -> int:
        """Blocks that may join those on their way to the host."""
        under_way_s = max(self._saving_until - self._now, 0.0)
        return int(MOST_SAVING - under_way_s * self._tier.bytes_s / self._tier.block_bytes)

    def reclaim(self, num_blocks: int, now: float) -> bool:
        """Implements `Reclaimer`."""
        return self._make_room(num_blocks, self._tree.value_of(1.0, 0, now))

    def _make_room(self, num_blocks: int, below: float) -> bool:
        if num_blocks > self._blocks.num_blocks:
            return False
        while self._blocks.pool.num_free < num_blocks:
            if not self._tree.evict_from_host(below):
                return False
            self.drop()
        return True

    def drop(self) -> None:
        """Frees the places that have left the tree."""
        if self._tree.dropped:
            self._wasted += len(self._tree.dropped)
            self._blocks.pool.release(self._blocks_of(self._tree.dropped))
            self._tree.dropped.clear()

    def _blocks_of(self, places: Sequence[int]) -> list[int]:
        """The block of each place."""
        return [place // self._block_pages for place in places]

    # ------------------------------------------------------------------ back to the device

    @property
    def num_loads(self) -> int:
        """Loads under way."""
        return len(self._loads)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a prefix."""
        return len(self._waiting)

    def waits(self, request: Request) -> bool:
        """Whether a request that has a slot waits for a prefix."""
        return request in self._waiting

    def load_s(self, num_pages: int) -> float:
        """Seconds until so many pages could be here, behind the loads that are under way."""
        ahead = sum(len(blocks) for load in self._loads for blocks, _ in load.pieces)
        ahead += sum(count for _, count in self._copying.values())
        return self._costs.load_s(ahead - (-num_pages // self._block_pages))

    def prefers_load(self, start: int, num_pages: int) -> bool:
        """Whether loading pages behind ``start`` others is sooner done than computing them."""
        compute_s = self._costs.compute_s(num_pages * self._page_size, start * self._page_size)
        return self.load_s(num_pages) < compute_s

    def begin(self, nodes: list[Node], pages: list[int], *, is_preload: bool) -> PrefixLoad:
        """Begins to bring nodes of one path, top first, into KV pages; the caller holds it for the load."""
        places = [place for node in nodes for place in node.pages]
        load = PrefixLoad(nodes[-1], places, deque(self._pieces(places, pages)))
        self._tree.bring_near(nodes, pages, load)
        for node in nodes:
            node.is_preloaded = is_preload
        self._loaded += len(places)
        self._preloaded += len(places) if is_preload else 0
        self._loads.append(load)
        self._issue()
        return load

    def _pieces(self, places: list[int], pages: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Blocks and the page of each of their places, a few blocks at a time."""
        size, blocks, wanted = self._block_pages, list[int](), list[int]()
        for place, page in zip(places, pages, strict=True):
            if not blocks or blocks[-1] != place // size:
                blocks.append(place // size)
                wanted += [NO_PAGE] * size
            wanted[(len(blocks) - 1) * size + place % size] = page
        starts = range(0, len(blocks), _PIECE_BLOCKS)
        return [
            (tuple(blocks[i : i + _PIECE_BLOCKS]), tuple(wanted[i * size : (i + _PIECE_BLOCKS) * size]))
            for i in starts
        ]

    def _issue(self, *, at_once: PrefixLoad | None = None) -> None:
        """Lets copies begin, in order, while device memory allows; all that is left of ``at_once``."""
        in_air = sum(count for _, count in self._copying.values())
        for load in self._loads:
            while load.pieces and (load is at_once or in_air + len(load.pieces[0][0]) <= MOST_LOADING):
                blocks, pages = load.pieces.popleft()
                number = self._copies.load(blocks, pages)
                load.in_air.add(number)
                self._copying[number] = load, len(blocks)
                in_air += len(blocks)
            if load.pieces and at_once is None:
                return

    def wait(self, request: Request, loads: list[PrefixLoad], num_tokens: int) -> None:
        """Lets a request wait for loads; then ``num_tokens`` of it are computed."""
        self._waiting[request] = loads, num_tokens

    def leave(self, request: Request) -> None:
        """Lets a request not wait any more; the loads go on."""
        self._waiting.pop(request, None)

    def land(self, *, waits_for_nothing_else: bool) -> list[Request]:
        """Requests whose prefix is complete from this plan on, with their counts of computed tokens.

        Args:
            waits_for_nothing_else: complete that of the first although not all of it has arrived: the step
                will wait.
        """
        self._land([number for number in self._copying if self._copies.has_arrived(number)])
        if waits_for_nothing_else and self._waiting and not self._ready():
            for load in next(iter(self._waiting.values()))[0]:
                self._issue(at_once=load)
                self._land(list(load.in_air))
        self._issue()
        ready = self._ready()
        for request in ready:
            request.num_computed_tokens = self._waiting.pop(request)[1]
        return ready

    def land_all(self) -> None:
        """Completes every load, arrived or not: nobody can run while they hold their pages."""
        for load in list(self._loads):
            self._issue(at_once=load)
            self._land(list(load.in_air))

    def _ready(self) -> list[Request]:
        return [r for r, (loads, _) in self._waiting.items() if all(load.is_done for load in loads)]

    def _land(self, numbers: list[int]) -> None:
        for number in numbers:
            load, _ = self._copying.pop(number)
            self._copies.land(number)
            load.in_air.discard(number)
            if load.is_done:
                self._loads.remove(load)
                self._blocks.release_landed(self._blocks_of(load.places))
                self._landed.append(load)
                self._tree.unlock(load.end)

    def forget(self) -> None:
        """Ends every load, done or not; nobody may wait for one. The tree's owner takes their pages out."""
        for load in self._loads:
            load.pieces.clear()
            load.in_air.clear()
            self._blocks.pool.release(self._blocks_of(load.places))
            self._tree.unlock(load.end)
        self._loads.clear()
        self._copying.clear()
        self._landed.clear()

    def begin_plan(self, now: float) -> None:
        """Takes note of what the plans before this one have landed."""
        self._now = now
        if self._landed and not self._copies.has_landings:
            for load in self._landed:
                load.is_planned = True
            self._landed.clear()

    def used(self, node: Node) -> None:
        """Says that a request uses pages that were brought for somebody like it."""
        self._preload_useful += len(node.pages)
        node.is_preloaded = False

    def stats(self) -> ColdStats:
        page_bytes = self._tier.block_bytes // self._block_pages
        pages = (self._saved, self._loaded, self._wasted)
        preloads = (self._preloaded, self._preload_useful, self._tree.num_unused)
        return ColdStats(
            *(page_bytes * count for count in (*pages, *preloads)),
            num_host_pages=self._tree.num_host_pages,
            num_host_blocks=self._blocks.num_for_prefixes,
            num_loads=len(self._loads),
        )

    def tables(self) -> list[list[int]]:
        """Blocks of nodes and loads, once for each reference."""
        tables = [node.pages for node in self._tree.nodes() if node.on_host]
        tables += [load.places for load in self._loads]
        return [self._blocks_of(table) for table in tables]

    def held(self) -> list[Node]:
        """The ends of the paths that loads hold."""
        return [load.end for load in self._loads]
