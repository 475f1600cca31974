"""How far tokens go along a radix tree over KV pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.core.radix_node import TOKEN_BYTES, HostMatch, Match, Node, PrefixLoad, pack

_FIRST_WINDOW = 8  # pages of an edge that are compared at once, at first


@final
class Matcher:
    """Compares tokens with edges, page by page; changes nothing.

    Args:
        page_size: tokens of a page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES

    def match(self, root: Node, tokens: Sequence[int], most_pages: int) -> Match:
        """How many of the first ``most_pages`` pages of some tokens are below a root."""
        size, done, evictable, here, node = self._page_size, 0, 0, 0, root
        loads: tuple[PrefixLoad, ...] = ()
        while done < most_pages and here == len(node.pages):
            page = pack(tokens[done * size : (done + 1) * size])
            child = node.children.get(page)
            if child is None or child.on_host:
                far = None if child is None else self._match_host(child, tokens, done, most_pages)
                return Match(node, here, done, evictable, page in node.claims, loads, far)
            here = self._match_edge(child, tokens, done, min(len(child.pages), most_pages - done))
            done += here
            if child.num_locks == 0:
                evictable += here
            if child.load is not None and not child.load.is_done:
                loads += (child.load,)
            node = child
        return Match(node, here, done, evictable, is_claimed=False, loads=loads)

    def _match_host(self, child: Node, tokens: Sequence[int], start: int, most_pages: int) -> HostMatch:
        """The same behind a node on the host, whose first page the tokens match from page ``start`` on."""
        size, done, at = self._page_size, start, child
        while True:
            here = self._match_edge(at, tokens, done, min(len(at.pages), most_pages - done))
            done += here
            if here < len(at.pages) or done >= most_pages:
                break
            following = at.children.get(pack(tokens[done * size : (done + 1) * size]))
            if following is None:
                break
            at = following
        return HostMatch(at, here, done - start)

    def _match_edge(self, node: Node, tokens: Sequence[int], start: int, most_pages: int) -> int:
        """Pages of an edge that the tokens from page ``start`` on match; the first one does."""
        size, page_bytes, here, window = self._page_size, self._page_bytes, 1, _FIRST_WINDOW
        while here < most_pages:
            end = min(here + window, most_pages)
            packed = pack(tokens[(start + here) * size : (start + end) * size])
            same = self.common_pages(node.tokens[here * page_bytes : end * page_bytes], packed)
            here += same
            if here < end:
                break
            window *= 2  # what is looked at in vain stays in proportion to what is found
        return here

    def common_pages(self, a: bytes, b: bytes) -> int:
        """Leading pages that both have."""
        size = self._page_bytes
        if a.startswith(b):
            return len(b) // size
        low, high = 0, min(len(a), len(b)) // size
        while low < high:
            middle = (low + high + 1) // 2
            if a.startswith(b[: middle * size]):
                low = middle
            else:
                high = middle - 1
        return low
