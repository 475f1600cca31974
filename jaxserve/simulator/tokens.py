"""Token ids of prompts of which only is known what they have in common: a prefix cache asks for no more."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import final, overload


@final
class BlockTokens(Sequence[int]):
    """Tokens that are equal where their blocks' numbers are.

    Args:
        numbers: of the leading blocks.
        block_size: tokens of a block.
        length: tokens in all.
        rest: the token of every position after the blocks.
    """

    __slots__ = ("_block_size", "_length", "_numbers", "_rest")

    def __init__(self, numbers: Sequence[int], block_size: int, length: int, rest: int) -> None:
        self._numbers = numbers
        self._block_size = block_size
        self._length = length
        self._rest = rest

    def at(self, position: int) -> int:
        """The token of a position, beyond the end as well."""
        block = position // self._block_size
        return self._numbers[block] if block < len(self._numbers) else self._rest

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, int):
            return self.at(range(self._length)[index])
        start, stop, step = index.indices(self._length)
        tokens = array("i")
        while start < stop:
            count = min(stop, (start // self._block_size + 1) * self._block_size) - start
            if start >= self._block_size * len(self._numbers):
                count = stop - start
            tokens += array("i", [self.at(start)]) * count
            start += count
        return tokens[::step]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockTokens) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, ...]:
        return (self._length, self._block_size, self._rest, *self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])
