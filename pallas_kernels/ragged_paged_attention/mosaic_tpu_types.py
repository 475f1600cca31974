"""What the parts of the TPU kernel hand to each other."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

LANES = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """What is fixed when the kernel is traced.

    Attributes:
        variant: scale, sliding window, soft cap.
        page_size: tokens in a page.
        max_pages: columns of the page table.
        kv_heads: key/value heads on this device.
        group: rows of queries a key/value head has per token: its query heads, rounded up to whole words.
        width: elements of a row: of a head, or of its key and value side by side if ``is_packed``.
        folds: parts of a page whose tokens share rows (`KVLayout`).
        is_packed: a head's key and value are one row. Queries then have zeros where the values are, and of
            the output the half with the values counts: a matrix unit is wide enough for both at no cost.
        kv_dtype: of the cache; bfloat16, float32, int8 or float8_e4m3fn.
        kv_pages: pages in a KV block.
        q_tokens: tokens in a query block; 1 in a pure decode step.
        depth: slots in the ring.
        cores: that share the work; each has a work list and scratch of its own.
        items_per_core: entries of a core's work list.
    """

    variant: AttentionVariant
    page_size: int
    max_pages: int
    kv_heads: int
    group: int
    width: int
    is_packed: bool
    folds: int
    kv_dtype: Any
    kv_pages: int
    q_tokens: int
    depth: int
    cores: int
    items_per_core: int

    @property
    def has_scales(self) -> bool:
        """Whether the cache has scales: it is 8-bit."""
        return jnp.dtype(self.kv_dtype).itemsize == 1

    @property
    def kv_tokens(self) -> int:
        """Tokens in a KV block."""
        return self.kv_pages * self.page_size

    @property
    def part_size(self) -> int:
        """Tokens in a part of a page; a *line* of a page holds one token of each part."""
        return self.page_size // self.folds

    @property
    def rows_per_line(self) -> int:
        """Rows that the keys and values of a line's tokens take in a page."""
        return self.kv_heads * self.folds * (1 if self.is_packed else 2)

    @property
    def words_per_line(self) -> int:
        """The same in 32-bit rows: two of bfloat16 are one of those, or four of 8 bits."""
        return self.rows_per_line * jnp.dtype(self.kv_dtype).itemsize // 4

    @property
    def is_strided(self) -> bool:
        """Whether a head can be read from a block by one strided load.

        Needs lines without padding between them, so a power of two or whole registers of rows a line, and
        rows of one register; otherwise heads are picked row by row, which is slower.
        """
        rows = self.words_per_line
        return (rows in (1, 2, 4) or rows % 8 == 0) and self.width <= LANES


class Refs(NamedTuple):
    """The kernel's arguments: scalars in SMEM, arrays in HBM, scratch in VMEM, semaphores.

    ``words`` stands for the elements of a 32-bit word: 2 in bfloat16, 1 in float32. Those of scales are None
    unless the cache has scales.
    """

    item_row: Any  # [cores * items_per_core]
    item_first: Any  # like item_row
    num_items: Any  # [cores]
    page_table: Any  # [rows * max_pages]
    kv_lens: Any  # [rows]
    cu_q_lens: Any  # [rows + 1]
    q: Any  # [kv_heads, tokens, group / words, words, width]
    new_kv: Any  # [tokens, rows_per_line, width], each token's whole line
    pages_in: Any  # the same memory as `pages`
    out: Any  # like q
    pages: Any  # [num_pages, part_size, rows_per_line, width]
    kv_ring: Any  # [depth, kv_pages, part_size, rows_per_line, width]
    q_ring: Any  # [depth, kv_heads, q_tokens, group / words, words, width]
    out_ring: Any  # [2, kv_heads, q_tokens, group / words, words, width]
    keys: Any  # [kv_heads, kv_tokens, width], in the dtype of the products
    values: Any  # like keys
    best: Any  # [kv_heads, q_tokens * group, 128], each row's value in all lanes
    total: Any  # like best
    acc: Any  # [kv_heads, q_tokens * group, width]
    kv_sems: Any  # [depth]
    q_sems: Any  # [depth]
    out_sems: Any  # [2]
    write_sem: Any
    first_scales: Any = None  # [rows], as in `ScalePages`
    new_scales: Any = None  # [n, 2 * kv_heads, page_size], as in `ScalePages`
    scales_in: Any = None  # the same memory as `scales`
    scales: Any = None  # [num_pages, 2 * kv_heads, page_size]
    scale_ring: Any = None  # [depth, kv_pages, 2 * kv_heads, page_size]


class Item(NamedTuple):
    """One entry of the work list, spelled out; int32 scalars.

    Attributes:
        row: whose it is.
        token: its first flattened token.
        count: its tokens.
        position: the first token's position.
        first_key: the first position that any of its tokens sees.
        first_page: the page column with that position.
        num_blocks: KV blocks to walk, at least 1.
    """

    row: jax.Array
    token: jax.Array
    count: jax.Array
    position: jax.Array
    first_key: jax.Array
    first_page: jax.Array
    num_blocks: jax.Array

    @property
    def end(self) -> jax.Array:
        """The position after its last token's."""
        return self.position + self.count
