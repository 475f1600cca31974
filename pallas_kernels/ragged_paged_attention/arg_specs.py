"""The inputs that every implementation is tested and measured on. Plain numbers: no arrays, no jax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArgSpec:
    """One step's shape.

    Attributes:
        name: unique, for test ids and reports.
        rows: per row (tokens in this step, context length afterwards); (0, 0) is an empty slot.
        num_q_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_q_heads``.
        head_dim: elements of a head.
        page_size: tokens in a page.
        padding_tokens: tokens at the end that belong to no row.
        sliding_window: see `ragged_paged_attention`.
        soft_cap: see `ragged_paged_attention`.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    padding_tokens: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the flattened token axis, padding included."""
        return sum(tokens for tokens, _ in self.rows) + self.padding_tokens

    @property
    def max_q_len(self) -> int:
        """Most tokens of a row."""
        return max(tokens for tokens, _ in self.rows)


def _decode(*context_lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((min(length, 1), length) for length in context_lengths)


# Small and hostile: lengths around page borders, empty slots in the middle, every grouping and head size.
CORRECTNESS_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec(name="decode_page_borders", rows=_decode(1, 15, 16, 17, 31, 32, 33)),
    ArgSpec(name="decode_one_row", rows=_decode(37)),
    ArgSpec(name="decode_empty_slots", rows=_decode(0, 9, 0, 0, 40, 0), padding_tokens=4),
    ArgSpec(name="decode_all_empty", rows=_decode(0, 0), padding_tokens=2),
    ArgSpec(name="decode_many_kv_blocks", rows=_decode(300, 2, 129)),
    ArgSpec(name="prefill_page_borders", rows=((1, 1), (15, 15), (16, 16), (17, 17), (33, 33))),
    ArgSpec(name="prefill_padded", rows=((20, 20), (0, 0), (5, 5)), padding_tokens=7),
    ArgSpec(name="chunk_continues", rows=((16, 48), (10, 43), (33, 70)), padding_tokens=5),
    ArgSpec(name="mixed", rows=((1, 30), (1, 17), (0, 0), (19, 19), (35, 150), (0, 0)), padding_tokens=9),
    ArgSpec(  # lengths in no order, some alike
        name="many_rows",
        rows=(*_decode(*(1 + 37 * row % 90 for row in range(30))), (19, 50), (0, 0)),
        padding_tokens=3,
    ),
    ArgSpec(name="mha", rows=((1, 20), (6, 18)), num_q_heads=3, num_kv_heads=3),
    ArgSpec(name="gqa_3", rows=((1, 20), (6, 18)), num_q_heads=9, num_kv_heads=3),
    ArgSpec(name="gqa_4_one_kv_head", rows=((1, 20), (6, 18)), num_q_heads=4, num_kv_heads=1),
    ArgSpec(name="gqa_8", rows=((1, 20), (6, 18)), num_q_heads=16, num_kv_heads=2),
    ArgSpec(name="head_dim_96", rows=((1, 20), (6, 18)), head_dim=96),
    ArgSpec(name="head_dim_128", rows=((1, 20), (6, 18)), head_dim=128),
    ArgSpec(name="head_dim_256", rows=((1, 20), (6, 18)), head_dim=256, num_q_heads=4, num_kv_heads=1),
    ArgSpec(name="page_size_8", rows=((1, 8), (1, 9), (12, 31)), page_size=8),
    ArgSpec(name="page_size_64", rows=((1, 64), (1, 65), (12, 70)), page_size=64),
    ArgSpec(name="window_decode", rows=_decode(1, 7, 8, 9, 33, 200), sliding_window=8),
    ArgSpec(name="window_one", rows=((1, 20), (6, 18)), sliding_window=1),
    ArgSpec(name="window_chunk", rows=((40, 40), (20, 90), (1, 260)), sliding_window=24, padding_tokens=3),
    ArgSpec(name="soft_cap", rows=((1, 30), (18, 40)), soft_cap=5.0),
    ArgSpec(name="window_and_soft_cap", rows=((1, 30), (18, 40)), sliding_window=10, soft_cap=5.0),
)

# For caches of 8 bits where pages must not be small.
LARGE_PAGE_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec(
        name="mixed_pages_of_32",
        rows=((1, 30), (1, 17), (0, 0), (19, 19), (35, 150), (0, 0), (1, 400)),
        page_size=32,
        padding_tokens=9,
    ),
    ArgSpec(name="decode_pages_of_64", rows=_decode(1, 63, 64, 65, 0, 700), head_dim=128, page_size=64),
    ArgSpec(
        name="window_pages_of_64",
        rows=((40, 40), (150, 290), (1, 260), (1, 20)),
        page_size=64,
        num_q_heads=9,
        num_kv_heads=3,
        sliding_window=70,
        soft_cap=5.0,
    ),
    ArgSpec(name="pages_of_256", rows=((1, 600), (20, 300)), head_dim=96, page_size=256),
)

# SmolLM2-135M's heads, as served: what the numbers in README.md are measured on.
SPEED_SPECS: tuple[ArgSpec, ...] = (
    ArgSpec(name="decode_1", rows=_decode(128), num_q_heads=9, num_kv_heads=3),
    ArgSpec(name="decode_16", rows=_decode(*(128,) * 16), num_q_heads=9, num_kv_heads=3),
    ArgSpec(name="prefill_256", rows=((256, 256), *((0, 0),) * 15), num_q_heads=9, num_kv_heads=3),
)
