"""The prefix cache: KV pages outlive their requests, and requests with the same beginning share them.

The tree holds one reference to each page in it, every request one to each page in its table. Pages are shared
as they are: a page in the tree is full and never written again, so nothing is copied. What a running request
computes of its prompt is put in the tree chunk by chunk; the rest when it leaves its slot, finished or
preempted. It claims the page that comes next: who needs that one waits for it, and nothing is computed twice.

    position   0 .............. matched ............... num_computed ...... num_tokens
    pages      [ shared, locked ][ own, in the tree soon ][ own, not full  ]

Further tiers would plug in here: `PrefixCache.evict` is where pages go before they are overwritten (a host
tier would copy them), `PrefixCache.match` where they would be missed (it would bring them back), and the
tree's changes are what a router of several engines would be told.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, final

from jaxserve.core.page_pool import PagePool
from jaxserve.core.radix_tree import HORIZON_S, NO_MATCH, Match, Node, RadixTree, pack
from jaxserve.core.template_breaks import TemplateBreak, TemplateBreaks
from jaxserve.request import Request


class PrefixCacheStats(NamedTuple):
    """Counters since start, and what is there now.

    Attributes:
        lookup_tokens: of requests that were admitted for the first time.
        hit_tokens: of these, how many were in the cache.
        resumed_hit_tokens: found again by requests that had been preempted.
        num_evicted_pages: pages taken out for others.
        num_pages: pages in the tree.
        num_evictable_pages: of these, those that no running request holds on to.
        num_nodes: edges of the tree.
        template_breaks: where prompts part that then go on alike; the most expensive first.
    """

    lookup_tokens: int
    hit_tokens: int
    resumed_hit_tokens: int
    num_evicted_pages: int
    num_pages: int
    num_evictable_pages: int
    num_nodes: int
    template_breaks: list[TemplateBreak]

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the share of tokens that were found."""
        breaks = [place._asdict() for place in self.template_breaks]
        hit_rate = self.hit_tokens / max(self.lookup_tokens, 1)
        return {**self._asdict(), "template_breaks": breaks, "hit_rate": hit_rate}


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
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        chunk_s: Callable[[int], float],
        horizon_s: float = HORIZON_S,
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._tree = RadixTree(page_size, chunk_s, horizon_s)
        self._paths: dict[Request, _Path] = {}
        self._advanced: dict[Request, None] = {}  # computed more of their prompts in the newest plan
        self._asked: tuple[Request, int, int] | None = None
        self._answer = NO_MATCH
        self._breaks = TemplateBreaks()
        self._lookup_tokens = 0
        self._hit_tokens = 0
        self._resumed_hit_tokens = 0
        self._num_evicted = 0

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

    def enter(self, request: Request, match: Match, now: float) -> None:
        """Gives a request, which owns nothing yet, the pages of its match."""
        if request.num_preemptions:
            self._resumed_hit_tokens += match.num_pages * self._page_size
        else:
            self._lookup_tokens += request.num_tokens
            self._hit_tokens += match.num_pages * self._page_size
            self._breaks.observe(match, request.prompt_token_ids, self._page_size)
        node = self._tree.lock(match, now)
        pages = self._tree.pages_to(node)
        self._pool.share(pages)
        request.page_ids += pages
        path = self._paths[request] = _Path(node, len(pages), len(pages))
        self._claim(request, path)

    def advanced(self, request: Request) -> None:
        """Says that the plan being made computes a chunk of a request; others may use it from the next on."""
        self._advanced[request] = None

    def commit(self, now: float) -> None:
        """Puts what the last plan computed in the tree; call it before the next plan is made."""
        if self._advanced:
            for request in self._advanced:
                self._insert_computed(request, self._paths[request], now)
            self._advanced.clear()

    def leave(self, request: Request, now: float, *, keep: bool) -> None:
        """Ends a request's stay in its slot; call it before its own references are dropped.

        Args:
            keep: leave its pages in the tree; if not, those that it brought are taken out.
        """
        path = self._paths.pop(request)
        self._advanced.pop(request, None)
        if keep:
            self._insert_computed(request, path, now)
        self._drop_claim(path)
        self._tree.unlock(path.node)
        if not keep:
            self._pool.release(self._tree.forget(path.node, path.num_matched))

    def evict(self, num_pages: int) -> None:
        """Frees so many pages, the least valuable first, or all that can be."""
        pages = self._tree.evict(num_pages)
        self._num_evicted += len(pages)
        self._pool.release(pages)

    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(
            lookup_tokens=self._lookup_tokens,
            hit_tokens=self._hit_tokens,
            resumed_hit_tokens=self._resumed_hit_tokens,
            num_evicted_pages=self._num_evicted,
            num_pages=self._tree.num_pages,
            num_evictable_pages=self._tree.num_evictable,
            num_nodes=self._tree.num_nodes,
            template_breaks=self._breaks.worst(),
        )

    def page_tables(self) -> list[list[int]]:
        """The pages of each node: the references that the tree holds."""
        return [node.pages for node in self._tree.nodes()]

    def check_integrity(self) -> None:
        """Raises RuntimeError unless locks are those of the paths, and what can be evicted is nobody's."""
        self._tree.check_integrity()
        locks: Counter[Node] = Counter()
        for path in self._paths.values():
            if path.claim is not None and path.claim not in path.node.claims:
                raise RuntimeError("a claim is lost")
            node: Node | None = path.node
            while node is not None:
                locks[node] += 1
                node = node.parent
        for node in self._tree.nodes():
            if node.num_locks != locks[node]:
                raise RuntimeError(f"{node.num_locks} locks on {node.pages}, {locks[node]} paths through it")
            if not node.num_locks and any(self._pool.ref_count(page) != 1 for page in node.pages):
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
