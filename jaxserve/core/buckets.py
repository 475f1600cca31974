"""The ladder of compiled shapes, and the choice of the one that wastes least."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class BucketLadder:
    """Shapes compiled at start.

    Attributes:
        decode_rows: row counts of pure decode steps (one token a row), increasing; the last covers all slots.
        mixed_tokens: token counts of steps with prefill, increasing; the last is the token budget.
        mixed_rows: row count of every step with prefill: all slots.
        decode_steps: tokens of a row in a decode loop; 1 for none.
    """

    decode_rows: tuple[int, ...]
    mixed_tokens: tuple[int, ...]
    mixed_rows: int
    decode_steps: int = 1

    @property
    def token_budget(self) -> int:
        """Most tokens that a step can hold."""
        return self.mixed_tokens[-1]

    def all(self) -> list[Bucket]:
        """Every shape, smallest first."""
        decode = [Bucket(rows, rows) for rows in self.decode_rows]
        loops = [Bucket(rows, rows, self.decode_steps) for rows in self.decode_rows if self.decode_steps > 1]
        return decode + loops + [Bucket(tokens, self.mixed_rows) for tokens in self.mixed_tokens]

    def choose_decode(self, num_rows: int, *, is_loop: bool = False) -> Bucket:
        """Smallest decode bucket that holds so many rows."""
        rows = self.decode_rows[bisect.bisect_left(self.decode_rows, num_rows)]
        return Bucket(rows, rows, self.decode_steps if is_loop else 1)

    def choose_mixed(self, num_tokens: int) -> Bucket:
        """Smallest bucket with prefill that holds so many tokens; the scheduler keeps within the budget."""
        return Bucket(self.mixed_tokens[bisect.bisect_left(self.mixed_tokens, num_tokens)], self.mixed_rows)


def check_decode_steps(decode_steps: int, page_size: int) -> None:
    """Raises ConfigError for a loop in which a row might need more than one new page."""
    if decode_steps > page_size:
        raise ConfigError(f"max_decode_steps={decode_steps}: must be at most page_size={page_size}")


def default_decode_rows(max_num_seqs: int, smallest: int) -> tuple[int, ...]:
    """Powers of two from ``smallest`` up to, and ending with, the number of slots."""
    return _ladder((smallest << i for i in range(32)), max(max_num_seqs, smallest))


def default_mixed_tokens(token_budget: int, max_num_seqs: int) -> tuple[int, ...]:
    """Powers of four from 64 that exceed the number of slots, ending with the budget.

    Longer than the slots, so that a bucket's shape tells a mixed step from a decode step.
    """
    return _ladder((size for size in (64 << 2 * i for i in range(16)) if size > max_num_seqs), token_budget)


def _ladder(sizes: Iterable[int], last: int) -> tuple[int, ...]:
    steps: list[int] = []
    for size in sizes:
        if size >= last:
            break
        steps.append(size)
    return (*steps, last)
