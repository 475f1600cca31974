"""What a prefix cache that never evicts must find: a trie of pages that shares no code with the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PrefixTrie:
    """Nested dictionaries, one level a page."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._salts: dict[str, dict[tuple[int, ...], Any]] = {}

    def _pages(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = self._page_size
        return [tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)]

    def hit_tokens(self, prompt: Sequence[int], salt: str = "") -> int:
        """Tokens of a prompt that are there; never its last one."""
        level, found = self._salts.get(salt, {}), 0
        for page in self._pages(prompt[:-1]):
            if page not in level:
                break
            level, found = level[page], found + self._page_size
        return found

    def add(self, tokens: Sequence[int], salt: str = "") -> None:
        """Remembers the full pages of some tokens."""
        level = self._salts.setdefault(salt, {})
        for page in self._pages(tokens):
            level = level.setdefault(page, {})
