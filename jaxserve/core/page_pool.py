"""Reference-counted KV pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

NULL_PAGE = 0


class PagePool:
    """Hands out page ids 1 .. num_pages - 1; page 0 is the null page that padding points at.

    A page is free exactly when its reference count is zero. ``free + referenced + 1 == num_pages`` always.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: needs the null page and at least one more")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._refs = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that requests can own: all but the null page."""
        return self.num_pages - 1

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    def ref_count(self, page: int) -> int:
        return self._refs[page]

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free pages, each with one reference. The caller has checked ``num_free``."""
        if count > len(self._free):
            raise RuntimeError(
                f"allocate({count}) with {len(self._free)} free pages: the caller must check first"
            )
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a reference to pages that somebody owns."""
        for page in pages:
            if self._refs[page] == 0:
                raise RuntimeError(f"share of page {page}, which nobody owns")
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drops a reference from each page; the last one frees it."""
        for page in reversed(pages):
            if self._refs[page] == 0:
                raise RuntimeError(f"double free of page {page}")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises RuntimeError unless reference counts equal the owners' tables and no page is lost."""
        owned = Counter(page for table in tables for page in table)
        if len(set(self._free)) != len(self._free):
            raise RuntimeError("a page is on the free list twice")
        for page in range(1, self.num_pages):
            if self._refs[page] != owned[page]:
                raise RuntimeError(f"page {page}: {self._refs[page]} references, {owned[page]} owners")
        if NULL_PAGE in owned or NULL_PAGE in self._free:
            raise RuntimeError("the null page is owned or free")
        if len(self._free) + len(owned) != self.num_usable:
            raise RuntimeError(f"{len(self._free)} free + {len(owned)} owned != {self.num_usable} pages")
