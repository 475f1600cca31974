"""Attention in plain XLA operations, for every platform; what the CPU runs.

Queries are handled as *query blocks*, each inside one row. A block walks over its row's context a *KV block*
at a time, with an online softmax (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022), as many times as
the context needs: a step costs what its contexts cost and not what the page table could hold.

Rows of one token are blocks of one query and walk together, in batches of rows of like length: a batch
walks as far as its longest context. The blocks of longer chunks walk one after the other: they differ in
length, and each of them is enough work for the whole machine.

    tokens   |d|d|d| chunk of row 3 .......... | chunk of row 4 .. | padding |
    blocks    1 1 1 |  Q   |  Q   |  Q   | Q   |  Q   |  Q
             together       one after the other
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxserve.pallas_kernels.layout import KVLayout, KVPages, encode
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import (
    AttentionMetadata,
    TokenPlaces,
    token_places,
)
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

# Tokens of context per iteration, and queries per block of a chunk; measured, see README.md. Small steps have
# short chunks, for which a large block would be padding for the most part.
_KV_BLOCK_TOKENS = 128
_QUERY_BLOCK_TOKENS = 64
_SMALLEST_QUERY_BLOCK = 16
# Of single queries in float32: what a row has too little for a block is copied for nothing.
_SMALL_KV_BLOCK_TOKENS = 64
# Rows of one token that walk together, at least, and how many such batches there are at most.
_ROWS_TOGETHER = 16
_MAX_BATCHES = 4

# Below every score of finite inputs, and finite: the difference of two infinities is NaN.
_MASKED = -1e30


class _QueryBlocks(NamedTuple):
    """Some query blocks that walk over their contexts together.

    Attributes:
        queries: ``[blocks, block, q_heads, head_dim]``.
        positions: int32 ``[blocks, block]``, rising by one from the first; -1 where there is no token.
        page_table: int32 ``[blocks, max_pages]`` of the block's row.
    """

    queries: jax.Array
    positions: jax.Array
    page_table: jax.Array


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
) -> tuple[jax.Array, KVPages]:
    """See `jaxserve.pallas_kernels.ragged_paged_attention.api.ragged_paged_attention`."""
    stored = kv_pages.layout
    places = token_places(metadata, q.shape[0], stored.page_size)
    kv_pages = _write(kv_pages.ordered(), k, v, places)
    if metadata.max_q_len == 1:
        out = _attend_rows(q, places.position, metadata.page_table[places.row], kv_pages, variant)
    else:
        out = _attend_chunks(q, kv_pages, metadata, variant)
        token, decoded = _attend_single_tokens(q, kv_pages, metadata, variant)
        out = out.at[token].set(decoded, mode="drop")
    return out, kv_pages.ordered(is_packed=stored.is_packed, folds=stored.folds)


def _write(kv_pages: KVPages, k: jax.Array, v: jax.Array, places: TokenPlaces) -> KVPages:
    """Puts each token's keys and values in its place, in place; padding lands in the null page."""
    data, scales = kv_pages.data, kv_pages.scales
    elements, new_scales = encode(k, v, data.dtype)
    if k.shape[0] == 1:
        # XLA:CPU expands a scatter of one row into a select over the whole pool. Of this it would make two
        # writes, one for the reader and one for the result, and so copy the pool: hence the barrier.
        page, offset = places.page[0], places.offset[0]
        data = jax.lax.dynamic_update_slice(data, elements[None], (page, offset, 0, 0))
        if scales is not None and new_scales is not None:
            scales = jax.lax.dynamic_update_slice(scales, new_scales[..., None], (page, 0, offset))
        data, scales = jax.lax.optimization_barrier((data, scales))
    else:
        data = data.at[places.page, places.offset].set(elements, mode="promise_in_bounds")
        if scales is not None and new_scales is not None:
            scales = scales.at[places.page, :, places.offset].set(new_scales, mode="promise_in_bounds")
    return KVPages(data, scales, kv_pages.head_dim)


def _attend_single_tokens(
    q: jax.Array, kv_pages: KVPages, metadata: AttentionMetadata, variant: AttentionVariant
) -> tuple[jax.Array, jax.Array]:
    """The rows of one token in a step that also has chunks.

    Returns:
        For each row its token, out of range if it has not exactly one, int32 ``[rows]``, and the output
        ``[rows, q_heads, head_dim]``.
    """
    starts = metadata.cu_q_lens[:-1]
    single = metadata.cu_q_lens[1:] - starts == 1
    token = jnp.where(single, starts, q.shape[0])
    position = jnp.where(single, metadata.kv_lens - 1, -1)
    queries = q.at[token].get(mode="fill", fill_value=0)
    return token, _attend_rows(queries, position, metadata.page_table, kv_pages, variant)


def _attend_rows(
    q: jax.Array, position: jax.Array, page_table: jax.Array, kv_pages: KVPages, variant: AttentionVariant
) -> jax.Array:
    """Rows of one token, ``[rows, q_heads, head_dim]``; ``position`` int32 ``[rows]``, -1 for none."""
    rows = q.shape[0]
    size = max(_ROWS_TOGETHER, -(-rows // _MAX_BATCHES))
    if rows <= size:
        return _attend(_QueryBlocks(q[:, None], position[:, None], page_table), kv_pages, variant)[:, 0]
    by_length = jnp.argsort(position)

    def attend_batch(batch: jax.Array, out: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(by_length, batch * size, size)  # the last may overlap
        blocks = _QueryBlocks(q[row][:, None], position[row][:, None], page_table[row])
        return out.at[row].set(_attend(blocks, kv_pages, variant)[:, 0], unique_indices=True)

    return jax.lax.fori_loop(0, -(-rows // size), attend_batch, jnp.zeros_like(q))


def _attend_chunks(
    q: jax.Array, kv_pages: KVPages, metadata: AttentionMetadata, variant: AttentionVariant
) -> jax.Array:
    """The rows of more than one token, block after block; zeros for all other tokens, ``[tokens, ...]``."""
    num_tokens = q.shape[0]
    size = min(_QUERY_BLOCK_TOKENS, max(_SMALLEST_QUERY_BLOCK, num_tokens // 4), num_tokens)
    starts = metadata.cu_q_lens[:-1]
    counts = metadata.cu_q_lens[1:] - starts
    blocks_of_row = jnp.where(counts > 1, (counts + size - 1) // size, 0)
    blocks_until = jnp.cumsum(blocks_of_row)
    padded = jnp.pad(q, ((0, size), (0, 0), (0, 0)))
    index_in_block = jnp.arange(size, dtype=jnp.int32)

    def attend_block(block: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.sum(blocks_until <= block, dtype=jnp.int32)
        first = (block - blocks_until[row] + blocks_of_row[row]) * size  # within the row
        index = first + index_in_block
        position = jnp.where(index < counts[row], metadata.kv_lens[row] - counts[row] + index, -1)
        token = starts[row] + first
        blocks = _QueryBlocks(
            queries=jax.lax.dynamic_slice_in_dim(padded, token, size)[None],
            positions=position[None],
            page_table=metadata.page_table[row][None],
        )
        # The block's end may reach into the next row: zeros, which that row's own block overwrites later.
        return jax.lax.dynamic_update_slice_in_dim(out, _attend(blocks, kv_pages, variant)[0], token, 0)

    out = jax.lax.fori_loop(0, blocks_until[-1], attend_block, jnp.zeros_like(padded))
    return out[:num_tokens]


def _attend(blocks: _QueryBlocks, kv_pages: KVPages, variant: AttentionVariant) -> jax.Array:
    """Walks query blocks over their contexts; like their queries, with zeros where there is no token."""
    layout = kv_pages.layout
    page_size, kv_heads, head_dim = layout.page_size, layout.num_kv_heads, layout.head_dim
    num_blocks, size, q_heads, _ = blocks.queries.shape
    group = q_heads // kv_heads
    dtype = _product_dtype(blocks.queries.dtype, layout)
    # One product per kv head has all queries of its group: [blocks, kv_heads, group * block, head_dim].
    queries = blocks.queries.reshape(num_blocks, size, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(num_blocks, kv_heads, group * size, head_dim).astype(dtype)
    positions = jnp.tile(blocks.positions, (1, group))[:, None, :, None]
    end = jnp.max(blocks.positions, axis=1) + 1
    first_seen = _first_seen_position(blocks.positions, variant.sliding_window)
    first_page = first_seen // page_size
    is_small = size == 1 and dtype == jnp.float32
    block_tokens = _SMALL_KV_BLOCK_TOKENS if is_small else _KV_BLOCK_TOKENS
    num_columns = max(1, min(block_tokens // page_size, blocks.page_table.shape[1]))
    length = num_columns * page_size
    columns = jnp.arange(num_columns, dtype=jnp.int32)[None, :]
    offsets = jnp.arange(length, dtype=jnp.int32)[None, :]

    def fetch(page_ids: jax.Array, which: int) -> jax.Array:
        """Keys (0) or values (1), copied once: ``[blocks, kv_heads, length, head_dim]``."""
        fetched = _fetch(kv_pages.data, page_ids, which, rows=2).transpose(0, 3, 1, 2, 4)
        return fetched.reshape(num_blocks, kv_heads, length, head_dim).astype(dtype)

    def fetch_scales(scales: jax.Array, page_ids: jax.Array, which: int) -> jax.Array:
        """Scales of keys (0) or values (1), ``[blocks, kv_heads, 1, length]``."""
        fetched = _fetch(scales, page_ids, which, rows=1).transpose(0, 2, 1, 3)
        return fetched.reshape(num_blocks, kv_heads, 1, length)

    def walk(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        best, total, acc = carry
        first_column = first_page[:, None] + index * num_columns
        page_ids = jnp.take_along_axis(blocks.page_table, first_column + columns, axis=1, mode="clip")
        key_position = first_column * page_size + offsets
        needed = (key_position >= first_seen[:, None]) & (key_position < end[:, None])
        values = jnp.where(needed[:, None, :, None], fetch(page_ids, 1), 0)  # 0 * NaN is NaN
        scores = _product("bhqd,bhkd->bhqk", queries, fetch(page_ids, 0)) * variant.scale
        if kv_pages.scales is not None:  # on scores and weights: codes are multiplied as they are
            scores *= fetch_scales(kv_pages.scales, page_ids, 0)
        if variant.soft_cap is not None:
            scores = variant.soft_cap * jnp.tanh(scores / variant.soft_cap)
        key_position = key_position[:, None, None, :]
        seen = key_position <= positions
        if variant.sliding_window is not None:
            seen &= key_position > positions - variant.sliding_window
        scores = jnp.where(seen, scores, _MASKED)
        new_best = jnp.maximum(best, jnp.max(scores, axis=-1, keepdims=True))
        decay = jnp.exp(best - new_best)
        weights = jnp.exp(scores - new_best)  # of a query that saw nothing yet: ones, which decay to 0 later
        total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
        if kv_pages.scales is not None:
            weights *= jnp.where(needed[:, None, None, :], fetch_scales(kv_pages.scales, page_ids, 1), 0.0)
        return new_best, total, acc * decay + _product("bhqk,bhkd->bhqd", weights.astype(dtype), values)

    pages = (end + page_size - 1) // page_size - first_page
    steps = (jnp.max(pages) + num_columns - 1) // num_columns
    zeros = jnp.zeros((num_blocks, kv_heads, group * size, 1), jnp.float32)
    carry = (zeros + _MASKED, zeros, jnp.zeros(queries.shape, jnp.float32))
    _, total, acc = jax.lax.fori_loop(0, steps, walk, carry)
    out = jnp.where(positions >= 0, acc / total, 0.0)  # a query sees itself at least; a NaN must be noticed
    out = out.reshape(num_blocks, kv_heads, group, size, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(blocks.queries.shape).astype(blocks.queries.dtype)


def _fetch(pages: jax.Array, page_ids: jax.Array, which: int, *, rows: int) -> jax.Array:
    """Keys (0) or values (1) of some pages, or their scales.

    Args:
        pages: ``[num_pages, ...]``, whose axis ``rows`` has ``2 * kv_heads``.
        page_ids: int32 ``[blocks, columns]``.

    Returns:
        ``[blocks, columns, ...]`` with ``kv_heads`` in that axis.
    """
    return jax.lax.platform_dependent(
        pages,
        page_ids,
        tpu=functools.partial(_fetch_whole, which=which, rows=rows),
        default=functools.partial(_fetch_half, which=which, rows=rows),
    )


def _fetch_half(pages: jax.Array, page_ids: jax.Array, *, which: int, rows: int) -> jax.Array:
    """Copies nothing else."""
    index = (page_ids, *[slice(None)] * rows, which)
    return _split(pages, rows).at[index].get(mode="promise_in_bounds")


def _fetch_whole(pages: jax.Array, page_ids: jax.Array, *, which: int, rows: int) -> jax.Array:
    """Copies whole pages as they lie: for a part of each XLA:TPU lays out the whole pool anew, every step."""
    fetched = pages.at[page_ids].get(mode="promise_in_bounds")
    as_stored = with_layout_constraint(fetched, Layout(tuple(range(fetched.ndim))))
    return jax.lax.index_in_dim(_split(as_stored, rows + 1), which, axis=rows + 2, keepdims=False)


def _split(array: jax.Array, axis: int) -> jax.Array:
    """An axis of heads' keys and values as two."""
    *lead, size = array.shape[: axis + 1]
    return array.reshape(*lead, size // 2, 2, *array.shape[axis + 1 :])


def _product_dtype(queries: jnp.dtype, layout: KVLayout) -> jnp.dtype:
    """Of products: bfloat16 holds every code; float16 could not hold a small weight times a scale."""
    if not layout.has_scales:
        return jnp.promote_types(queries, layout.dtype)
    return queries if queries == jnp.bfloat16 else jnp.dtype(jnp.float32)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Accumulates in float32; float32 operands are not rounded to fewer bits, as a GPU would by default."""
    return jnp.einsum(
        subscripts, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _first_seen_position(positions: jax.Array, sliding_window: int | None) -> jax.Array:
    """The lowest position that any query of a block sees, ``[blocks]``."""
    if sliding_window is None:
        return jnp.zeros(positions.shape[0], jnp.int32)
    return jnp.maximum(positions[:, 0] - sliding_window + 1, 0)  # a block's first query is its lowest
