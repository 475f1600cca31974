"""The prefix cache: KV pages outlive their requests, and requests with the same beginning share them.

The tree holds one reference to each page in it, every request one to each page in its table. Pages are shared
as they are: a page in the tree is full and never written again, so nothing is copied. What a running request
computes of its prompt is put in the tree chunk by chunk; the rest when it leaves its slot, finished or
preempted. It claims the page that comes next: who needs that one waits for it, and nothing is computed twice.

    position   0 .............. matched ........................ num_computed ...... num_tokens
    pages      [ shared, locked; perhaps loading ][ own, in the tree soon ][ own, not full  ]

With a host tier, pages are copied to the host where they are evicted, and loaded where a request matches them
(`jaxserve.core.cold_prefixes`). The tree's changes are what a router of several engines would be told.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, final

from jaxserve.core.cold_prefixes import ColdPrefixes, ColdStats, HostSide
from jaxserve.core.page_pool import PagePool
from jaxserve.core.prefix_discovery import PrefixDiscovery, SharedPrefix
from jaxserve.core.preloading import Preloading, PreloadingStats
from jaxserve.core.radix_node import NO_MATCH, Match, Node, pack
from jaxserve.core.radix_tree import HORIZON_S, RadixTree
from jaxserve.core.resume_costs import ResumeCosts
from jaxserve.core.template_breaks import TemplateBreak, TemplateBreaks
from jaxserve.request import Request

# Finding out what is worth least costs as much for one page as for several.
_EVICTED_SHARE = 1 / 1024
# Of the pages, that are kept free where others can be copied to the host in time.
_RESERVED_SHARE = 1 / 16


class PrefixCacheStats(NamedTuple):
    """Counters since start, and what is there now.

    Attributes:
        lookup_tokens: of requests that were admitted for the first time.
        hit_tokens: of these, how many were in the cache.
        host_hit_tokens: of these, how many were on the host, and were loaded.
        resumed_hit_tokens: found again by requests that had been preempted.
        num_evicted_pages: pages taken off the device for others.
        num_pages: pages in the tree, on the device.
        num_evictable_pages: of these, those that no running request holds on to.
        num_nodes: edges of the tree.
        num_promotions: beginnings that turned out to be shared by many.
        shared_prefixes: those that are now, most used first.
        host: the host tier; None without one.
        preloading: for conversations; None if it is off.
        template_breaks: where prompts part that then go on alike; the most expensive first.
    """

    lookup_tokens: int
    hit_tokens: int
    host_hit_tokens: int
    resumed_hit_tokens: int
    num_evicted_pages: int
    num_pages: int
    num_evictable_pages: int
    num_nodes: int
    num_promotions: int
    shared_prefixes: list[SharedPrefix]
    host: ColdStats | None
    preloading: PreloadingStats | None
    template_breaks: list[TemplateBreak]

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the share of tokens that were found."""
        return {
            **self._asdict(),
            "shared_prefixes": [prefix._asdict() for prefix in self.shared_prefixes],
            "host": None if self.host is None else self.host._asdict(),
            "preloading": None if self.preloading is None else self.preloading._asdict(),
            "template_breaks": [place._asdict() for place in self.template_breaks],
            "hit_rate": self.hit_tokens / max(self.lookup_tokens, 1),
        }


@dataclasses.dataclass(slots=True)
class _Path:
    """A running request's place in the tree; it has the path to ``node`` locked.

    Attributes:
        num_pages: of the request, whose tokens lie on the path.
        num_matched: of these, those that it found there.
        owns_end: it put the end of the node there itself.
        claim: packed tokens of the page that it computes next, if it was the first to say so.
    """

    node: Node
    num_pages: int
    num_matched: int
    owns_end: bool = False
    claim: bytes | None = None


@final
class PrefixCache:
    """Finds, shares and keeps pages by their tokens.

    Args:
        pool: whose pages these are.
        page_size: tokens of a page.
        chunk_s: seconds that a chunk of a prompt takes after so many tokens of context.
        horizon_s: seconds after which an access counts for 1/e of a new one, when pages are evicted.
        host: memory for pages that are evicted; None for no such tier.
        preloads: what keeping and loading for the next turn of a conversation cost; None to do neither.
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        chunk_s: Callable[[int], float],
        horizon_s: float = HORIZON_S,
        host: HostSide | None = None,
        preloads: ResumeCosts | None = None,
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._tree = RadixTree(page_size, chunk_s, horizon_s, 1 if host is None else host.tier.block_pages)
        self._cold = None if host is None else ColdPrefixes(self._tree, page_size, host)
        self._discovery = PrefixDiscovery(self._tree, page_size, horizon_s)
        self._preloading = (
            None
            if preloads is None
            else Preloading(self._tree, page_size, horizon_s, preloads, self, self._pressure)
        )
        self._eviction_run = int(pool.num_usable * _EVICTED_SHARE)
        self._reserve = int(pool.num_usable * _RESERVED_SHARE)
        self._now = 0.0
        self._paths: dict[Request, _Path] = {}
        self._advanced: dict[Request, None] = {}  # computed more of their prompts in the newest plan
        self._asked: tuple[Request, int, int] | None = None
        self._answer = NO_MATCH
        self._breaks = TemplateBreaks()
        self._lookup_tokens = self._hit_tokens = self._host_hit_tokens = self._resumed_hit_tokens = 0
        self._num_evicted = 0

    @property
    def cold(self) -> ColdPrefixes | None:
        """The host tier, if there is one."""
        return self._cold

    @property
    def num_evictable(self) -> int:
        """Pages that could be freed at once."""
        return self._tree.num_evictable

    def match(self, request: Request) -> Match:
        """How much of a waiting request is there. Its last token is always computed: for its logits.

        The head of the queue is asked about again and again while it waits for pages.
        """
        asked = (request, request.num_known_tokens, self._tree.version)
        if asked != self._asked:
            tokens = request.known_token_ids() if request.output_token_ids else request.prompt_token_ids
            most = (request.num_tokens - 1) // self._page_size
            self._asked, self._answer = asked, self._tree.match(request.cache_salt, tokens, most)
        return self._answer

    def enter(self, request: Request, match: Match, now: float, *, may_load: bool = True) -> int:
        """Gives a request, which owns nothing yet, the pages of its match.

        Its count of computed tokens is that of the pages that are here; if others are being loaded, it waits
        for them.

        Args:
            may_load: load what is on the host, if that is sooner done than computing it.

        Returns:
            Tokens that were found, those that are being loaded included.
        """
        if not request.num_preemptions:
            self._breaks.observe(match.deepest, request.prompt_token_ids, self._page_size)
        node, loads, num_loaded = self._tree.lock(match, now), list(match.loads), 0
        if self._cold is not None and may_load and match.host is not None:
            num_loaded = match.host.num_pages
            if self._cold.prefers_load(match.num_pages, num_loaded):
                nodes = self._tree.host_path(match)
                self._tree.hold(nodes[-1])
                self._make_room(num_loaded)
                loads.append(self._cold.begin(nodes, self._pool.allocate(num_loaded), is_preload=False))
                node = self._tree.lock_more(nodes, now)
            else:
                num_loaded = 0
        pages = self._tree.pages_to(node)
        self._pool.share(pages)
        request.page_ids += pages
        found, ready = len(pages) * self._page_size, self._look_at_path(node, now) * self._page_size
        request.num_computed_tokens = ready
        if ready < found and self._cold is not None:
            self._cold.wait(request, loads, found)
        self._count(request, found, num_loaded * self._page_size)
        path = self._paths[request] = _Path(node, len(pages), len(pages))
        self._claim(request, path)
        if self._preloading is not None:
            self._preloading.began(request, node)
        return found

    def _look_at_path(self, node: Node, now: float) -> int:
        """Notes that a path is used; returns how many of its pages are complete."""
        at, ready = node, node.end
        while at.parent is not None:
            if at.is_loading:
                ready = at.start
            if at.is_preloaded and self._cold is not None:
                self._cold.used(at)
            self._discovery.used(at, now)
            at = at.parent
        return ready

    def _count(self, request: Request, found: int, loaded: int) -> None:
        if request.num_preemptions:
            self._resumed_hit_tokens += found
            return
        self._lookup_tokens += request.num_tokens
        self._hit_tokens += found
        self._host_hit_tokens += loaded

    def advanced(self, request: Request) -> None:
        """Says that the plan being made computes a chunk of a request; others may use it from the next on."""
        self._advanced[request] = None

    def commit(self, now: float) -> None:
        """Puts what the last plan computed in the tree; call it before the next plan is made."""
        self._now = now
        if self._advanced:
            for request in self._advanced:
                self._insert_computed(request, self._paths[request], now)
            self._advanced.clear()
        if self._cold is not None:
            self._cold.begin_plan(now)
            self._demote_ahead(self._cold)
        if self._preloading is not None:
            self._preloading.look(now)

    def leave(self, request: Request, now: float, *, keep: bool) -> None:
        """Ends a request's stay in its slot; call it before its own references are dropped.

        Args:
            keep: leave its pages in the tree; if not, those that it brought are taken out.
        """
        path = self._paths.pop(request)
        self._advanced.pop(request, None)
        if self._cold is not None:
            self._cold.leave(request)
        if keep:
            self._insert_computed(request, path, now)
        self._drop_claim(path)
        self._tree.unlock(path.node)
        if not keep:
            self._pool.release(self._tree.forget(path.node, path.num_matched))
            self._drop_host_pages()
        if self._preloading is not None:
            if keep:
                self._preloading.ended(request, path.node, now)
            else:
                self._preloading.failed(request)

    def allocate(self, num_pages: int) -> list[int]:
        """Takes free pages, and evicts where there are too few; the caller has checked that it can."""
        self._make_room(num_pages)
        return self._pool.allocate(num_pages)

    def _make_room(self, num_pages: int, below: float = math.inf) -> bool:
        """Evicts what is worth less until so many pages are free, if that can be."""
        lacking = num_pages - self._pool.num_free
        if lacking > 0:
            self.evict(max(lacking, self._eviction_run) if below == math.inf else lacking, below)
        return self._pool.num_free >= num_pages

    def evict(self, num_pages: int, below: float = math.inf) -> None:
        """Frees so many pages, the least valuable first, or all that can be and are worth less."""
        demote = None if self._cold is None else self._cold.demote
        pages = self._tree.evict(num_pages, self._now, below, demote)
        self._num_evicted += len(pages)
        self._pool.release(pages)
        self._drop_host_pages()

    def forget(self) -> None:
        """Takes everything out, on both tiers. No request may be in a slot, and no load under way."""
        self._pool.release(self._tree.evict(self._tree.num_pages, self._now))
        while self._tree.evict_from_host():
            pass
        self._drop_host_pages()

    def _demote_ahead(self, cold: ColdPrefixes) -> None:
        """Frees pages before they are needed: a long prompt takes more at once than the link can carry."""
        lacking = self._reserve - self._pool.num_free
        if lacking > 0:
            pages = self._tree.demote(lacking, self._now, cold.demote)
            self._num_evicted += len(pages)
            self._pool.release(pages)
            cold.drop()

    def load_s(self, num_pages: int) -> float:
        """Implements `Loader`."""
        return math.inf if self._cold is None else self._cold.load_s(num_pages)

    def preload(self, nodes: list[Node], below: float) -> bool:
        """Implements `Loader`."""
        assert self._cold is not None
        num_pages = sum(len(node.pages) for node in nodes)
        self._tree.hold(nodes[-1])
        if not self._make_room(num_pages, below):
            self._tree.unlock(nodes[-1])
            return False
        self._cold.begin(nodes, self._pool.allocate(num_pages), is_preload=True)
        return True

    def _pressure(self) -> float:
        """1 over the share of the pages that no running request holds."""
        unused = self._pool.num_free + self._tree.num_evictable
        return self._pool.num_usable / max(unused, 1)

    def _drop_host_pages(self) -> None:
        if self._cold is not None:
            self._cold.drop()

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            lookup_tokens=self._lookup_tokens,
            hit_tokens=self._hit_tokens,
            host_hit_tokens=self._host_hit_tokens,
            resumed_hit_tokens=self._resumed_hit_tokens,
            num_evicted_pages=self._num_evicted,
            num_pages=self._tree.num_pages,
            num_evictable_pages=self._tree.num_evictable,
            num_nodes=self._tree.num_nodes,
            num_promotions=self._discovery.num_promotions,
            shared_prefixes=self._discovery.promoted(self._now),
            host=None if self._cold is None else self._cold.stats(),
            preloading=None if self._preloading is None else self._preloading.stats(),
            template_breaks=self._breaks.worst(),
        )

    def page_tables(self) -> list[list[int]]:
        """The pages of each node on the device: the references that the tree holds."""
        return [node.pages for node in self._tree.nodes() if not node.on_host]

    def check_integrity(self) -> None:
        """Raises RuntimeError unless locks are those of the paths, and what can be evicted is nobody's."""
        self._tree.check_integrity()
        if any(
            path.claim is not None and path.claim not in path.node.claims for path in self._paths.values()
        ):
            raise RuntimeError("a claim is lost")
        ends = [path.node for path in self._paths.values()]
        locks: Counter[Node] = Counter()
        for end in ends if self._cold is None else ends + self._cold.held():
            node: Node | None = end
            while node is not None:
                locks[node] += 1
                node = node.parent
        for node in self._tree.nodes():
            if node.num_locks != locks[node]:
                raise RuntimeError(f"{node.num_locks} locks on {node.pages}, {locks[node]} paths through it")
            if (
                not node.num_locks
                and not node.on_host
                and any(self._pool.ref_count(page) != 1 for page in node.pages)
            ):
                raise RuntimeError(f"a request holds pages of {node.pages} without a lock")

    def _insert_computed(self, request: Request, path: _Path, now: float) -> None:
        """Puts a request's full pages in the tree, up to what will certainly not be written again.

        Steps in flight may still write the position of the newest known token and later ones: a request that
        has ended may have had a row in them.
        """
        done, full = path.num_pages, _num_final_tokens(request) // self._page_size
        if full <= done:
            return
        self._drop_claim(path)
        path.node, taken = self._tree.insert(
            path.node,
            self._packed(request, done, full),
            request.page_ids[done:full],
            now,
            may_grow=path.owns_end,
        )
        self._pool.share(taken)
        self._drop_host_pages()
        path.num_pages, path.owns_end = full, bool(taken)
        self._claim(request, path)

    def _packed(self, request: Request, start: int, end: int) -> bytes:
        """The tokens of some of a request's pages, packed."""
        first, last, prompt = start * self._page_size, end * self._page_size, request.prompt_token_ids
        packed = pack(prompt[first:last])
        if last > len(prompt):
            packed += pack(request.output_token_ids[max(0, first - len(prompt)) : last - len(prompt)])
        return packed

    def _claim(self, request: Request, path: _Path) -> None:
        """Says that a request computes the next page of its prompt, if nobody has said so."""
        page = path.num_pages
        if page < request.num_known_tokens // self._page_size:
            tokens = self._packed(request, page, page + 1)
            if self._tree.claim(path.node, tokens, request):
                path.claim = tokens

    def _drop_claim(self, path: _Path) -> None:
        if path.claim is not None:
            self._tree.unclaim(path.node, path.claim)
            path.claim = None


def _num_final_tokens(request: Request) -> int:
    """Leading tokens that are computed, or will be by steps in flight, and never again."""
    final = max(request.num_prompt_tokens, request.num_known_tokens - 1)
    return min(request.num_computed_tokens, final)
