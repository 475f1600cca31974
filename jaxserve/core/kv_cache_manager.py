"""Who owns which KV page."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.core.page_pool import PagePool
from jaxserve.request import Request


class KVCacheManager:
    """Gives pages to requests and takes them back; a request's table is ``request.page_ids``.

    A page may be reused as soon as it is free: the executor runs steps in the order of their plans, so every
    step that still reads or writes the old owner's data was dispatched before the new owner's first write.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._owners: dict[str, Request] = {}
        self.page_size = page_size

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self._pool.num_used

    @property
    def num_usable(self) -> int:
        return self._pool.num_usable

    @property
    def occupancy(self) -> float:
        """Share of the pages in use."""
        return self._pool.num_used / self._pool.num_usable

    def matched_tokens(self, request: Request) -> int:
        """Leading prompt tokens that a waiting request would not have to compute: those of a sibling."""
        parent = self._owners.get(request.parent_id) if request.parent_id is not None else None
        if parent is None:
            return 0
        shareable = self.shareable_tokens(request.num_prompt_tokens)
        return shareable if parent.num_computed_tokens >= shareable else 0

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def missing_pages(self, request: Request, num_tokens: int) -> int:
        """Pages that the request lacks to hold ``num_tokens`` tokens."""
        return max(0, self.pages_for(num_tokens) - len(request.page_ids))

    def grow(self, request: Request, num_tokens: int) -> int:
        """Appends the pages that ``num_tokens`` tokens need, and returns how many.

        The caller has checked that so many are free.
        """
        missing = self.missing_pages(request, num_tokens)
        if missing:
            self._owners[request.id] = request
            request.page_ids += self._pool.allocate(missing)
        return missing

    def shareable_tokens(self, prompt_tokens: int) -> int:
        """Leading prompt tokens in full pages that a sibling can share.

        The last prompt token is always computed by each sibling itself: its logits give the first sample.
        """
        return (prompt_tokens - 1) // self.page_size * self.page_size

    def share_prefix(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Lets ``child``, which owns nothing yet, read the parent's first ``num_tokens`` (whole pages)."""
        pages = parent.page_ids[: num_tokens // self.page_size]
        self._pool.share(pages)
        child.page_ids += pages

    def free(self, request: Request) -> None:
        """Gives back every page of a request."""
        self._owners.pop(request.id, None)
        self._pool.release(request.page_ids)
        request.page_ids = []

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises RuntimeError unless the requests' tables account for every page."""
        self._pool.check_integrity(request.page_ids for request in requests)
