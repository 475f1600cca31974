"""Who owns which KV page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.core.cold_prefixes import ColdPrefixes
from jaxserve.core.page_pool import PagePool
from jaxserve.core.policy import PagesView
from jaxserve.core.prefix_cache import PrefixCache, PrefixCacheStats
from jaxserve.core.radix_node import NO_MATCH, Match
from jaxserve.request import Request


class KVCacheManager:
    """Gives pages to requests and takes them back; a request's table is ``request.page_ids``.

    A page may be reused as soon as it is free: the executor runs steps in the order of their plans, so every
    step that still reads or writes the old owner's data was dispatched before the new owner's first write.

    Pages that only the prefix cache holds on to count as available: they are freed when somebody needs them.
    """

    def __init__(self, pool: PagePool, page_size: int, cache: PrefixCache | None = None) -> None:
        self._pool = pool
        self._cache = cache
        self.page_size = page_size

    @property
    def num_available(self) -> int:
        """Pages that can be given out now."""
        return self._pool.num_free + self.num_cached

    @property
    def num_cached(self) -> int:
        """Pages that the prefix cache alone holds on to."""
        return 0 if self._cache is None else self._cache.num_evictable

    @property
    def num_used(self) -> int:
        """Pages that running requests hold on to."""
        return self._pool.num_used - self.num_cached

    @property
    def num_usable(self) -> int:
        return self._pool.num_usable

    @property
    def occupancy(self) -> float:
        """Share of the pages in use."""
        return self.num_used / self._pool.num_usable

    def match(self, request: Request) -> Match:
        """What the prefix cache has of a waiting request."""
        return NO_MATCH if self._cache is None else self._cache.match(request)

    def matched_tokens(self, request: Request) -> int:
        """Leading tokens that a waiting request would not have to compute."""
        return self.match(request).num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def new_pages(self, request: Request, match: Match) -> int:
        """Pages that the whole of a waiting request needs besides what it would share."""
        return self.pages_for(request.num_tokens) - match.num_pages

    def view(self, match: Match, running: Sequence[Request], watermark_pages: int) -> PagesView:
        """What there is besides the pages that a waiting request would share."""
        return PagesView(
            running=running,
            num_usable=self.num_usable,
            num_used=self.num_used + match.num_evictable,
            num_available=self.num_available - match.num_evictable,
            watermark_pages=watermark_pages,
        )

    def admit(self, request: Request, match: Match, now: float, *, may_load: bool = True) -> int:
        """Gives a request that has room all of its pages; those of the match are computed or being loaded.

        Args:
            may_load: load what the match has on the host, if that is sooner done than computing it.

        Returns:
            Leading tokens that need not be computed.
        """
        found = 0
        if self._cache is not None:
            found = self._cache.enter(request, match, now, may_load=may_load)
        self.grow(request, request.num_tokens)
        return found

    def grow(self, request: Request, num_tokens: int) -> None:
        """Appends the pages that ``num_tokens`` tokens need. The caller has checked `num_available`."""
        missing = self.pages_for(num_tokens) - len(request.page_ids)
        if missing > 0:
            source = self._pool if self._cache is None else self._cache
            request.page_ids += source.allocate(missing)

    def computed(self, request: Request) -> None:
        """Says that the plan being made computes a chunk of a request."""
        if self._cache is not None:
            self._cache.advanced(request)

    def commit(self, now: float) -> None:
        """Lets others share what the last plan computes; call it before the next plan is made."""
        if self._cache is not None:
            self._cache.commit(now)

    def free(self, request: Request, now: float, *, keep: bool = True) -> None:
        """Gives back every page of a request; with ``keep``, full ones stay in the prefix cache."""
        if self._cache is not None:
            self._cache.leave(request, now, keep=keep)
        self._pool.release(request.page_ids)
        request.page_ids = []

    def forget(self) -> None:
        """Empties the prefix cache; no request may have pages."""
        if self._cache is not None:
            self._cache.forget()

    @property
    def cold(self) -> ColdPrefixes | None:
        """The host tier of the prefix cache, if there is one."""
        return None if self._cache is None else self._cache.cold

    def prefix_cache_stats(self) -> PrefixCacheStats | None:
        """None if there is no prefix cache."""
        return None if self._cache is None else self._cache.stats()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises RuntimeError unless the requests' tables and the prefix cache account for every page."""
        tables = [request.page_ids for request in requests]
        if self._cache is not None:
            self._cache.check_integrity()
            tables += self._cache.page_tables()
        self._pool.check_integrity(tables)
