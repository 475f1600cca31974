"""Attention for NVIDIA GPUs older than Hopper, in Pallas's Triton.

JAX means to drop this backend of Pallas, so there is one kernel and little in it: a program attends with the
queries of one *query block* (some tokens of one row, the heads of one key/value head) over the row's context,
a *KV block* at a time, with an online softmax (Milakov & Gimelshein 2018, algorithm 3). A decode is a block
of one token. Long contexts of few rows are not split.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import (
    AttentionMetadata,
    token_places,
)
from jaxserve.pallas_kernels.ragged_paged_attention.triton_write import write
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

_AMPERE = 8.0  # compute capability
_SMALLEST_DOT = 16  # rows of a product
_QUERY_ROWS = 64  # tokens x query heads of a chunk's block
_KV_BLOCK_BYTES = 16384  # of keys in shared memory, and as many of values
_LOG2E = math.log2(math.e)
_MASKED = -1e30  # finite: the difference of two infinities is NaN


class _QueryBlocks(NamedTuple):
    """Where each query block is, int32 ``[blocks]``.

    Attributes:
        row: the row that it belongs to.
        token: its first token.
        count: how many tokens it has; 0 for blocks that nobody needs.
        position: of its first token, in the row's context.
    """

    row: jax.Array
    token: jax.Array
    count: jax.Array
    position: jax.Array


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KVPages]:
    """See `jaxserve.pallas_kernels.ragged_paged_attention.api.ragged_paged_attention`.

    Args:
        interpret: runs in Pallas's interpreter, on any device.
    """
    _check(q, kv_pages, interpret=interpret)
    places = token_places(metadata, q.shape[0], kv_pages.layout.page_size)
    kv_pages = write(kv_pages, k, v, places, interpret=interpret)
    return _attend(q, kv_pages, metadata, variant, interpret=interpret), kv_pages


def _check(q: jax.Array, kv_pages: KVPages, *, interpret: bool) -> None:
    """Raises NotImplementedError for what this kernel does not take."""
    layout = kv_pages.layout
    if layout.is_packed or layout.folds > 1:
        raise NotImplementedError("kv_pages is packed or folded: must not be")
    if layout.head_dim > 256:
        raise NotImplementedError(f"head_dim={layout.head_dim}: must be at most 256")
    if layout.dtype == jnp.float8_e4m3fn:
        raise NotImplementedError(f"kv_pages is {layout.dtype}: of 8-bit types it must be int8")
    if interpret:
        return
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "gpu":
        return
    device = jax.local_devices()[0]
    capability = float(getattr(device, "compute_capability", None) or 0.0)
    if capability < _AMPERE:
        raise NotImplementedError(f"{device.device_kind}: must be an NVIDIA Ampere GPU or newer")


def _query_blocks(metadata: AttentionMetadata, num_tokens: int, size: int) -> _QueryBlocks:
    """Cuts every row's tokens into blocks of at most ``size``."""
    starts = metadata.cu_q_lens[:-1]
    counts = metadata.cu_q_lens[1:] - starts
    blocks_of_row = (counts + size - 1) // size
    blocks_until = jnp.cumsum(blocks_of_row)
    rows = starts.shape[0]
    block = jnp.arange(min(rows + num_tokens // size, num_tokens), dtype=jnp.int32)
    row = jnp.sum(block[:, None] >= blocks_until[None, :], axis=1, dtype=jnp.int32)
    is_real = row < rows
    row = jnp.minimum(row, rows - 1)
    first = (block - blocks_until[row] + blocks_of_row[row]) * size  # within the row
    return _QueryBlocks(
        row=row,
        token=starts[row] + first,
        count=jnp.where(is_real, jnp.clip(counts[row] - first, 0, size), 0),
        position=metadata.kv_lens[row] - counts[row] + first,
    )


def _attend(
    q: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
    *,
    interpret: bool,
) -> jax.Array:
    layout = kv_pages.layout
    tokens, q_heads, head_dim = q.shape
    group = q_heads // layout.num_kv_heads
    heads = pl.next_power_of_2(group)  # arrays in Triton have powers of two
    columns = pl.next_power_of_2(head_dim)
    size = 1 if metadata.max_q_len == 1 else max(1, _QUERY_ROWS // heads)
    query_rows = max(size * heads, _SMALLEST_DOT)
    dtype = _product_dtype(q.dtype, kv_pages)
    kv_block = max(_SMALLEST_DOT, _KV_BLOCK_BYTES // (columns * dtype.itemsize))
    blocks = _query_blocks(metadata, tokens, size)
    body = functools.partial(
        _body,
        variant=variant,
        page_size=layout.page_size,
        group=group,
        heads=heads,
        head_dim=head_dim,
        shape=(query_rows, kv_block, columns),
        dtype=dtype,
    )
    # Without scales a kernel still takes the argument; it reads none.
    scales = jnp.zeros((1, 1, 1), jnp.float32) if kv_pages.scales is None else kv_pages.scales
    return pl.pallas_call(
        functools.partial(body, has_scales=kv_pages.scales is not None),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(blocks.row.shape[0], layout.num_kv_heads),
        in_specs=[pl.no_block_spec] * 9,
        out_specs=pl.no_block_spec,
        input_output_aliases={8: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="ragged_paged_attend",
    )(*blocks, metadata.page_table, q, kv_pages.data, scales, jnp.zeros_like(q))


def _product_dtype(queries: jnp.dtype, kv_pages: KVPages) -> jnp.dtype:
    """Of products: bfloat16 holds every code; float16 could not hold a small weight times a scale."""
    if kv_pages.scales is None:
        return jnp.promote_types(queries, kv_pages.data.dtype)
    return queries if queries == jnp.bfloat16 else jnp.dtype(jnp.float32)


def _body(
    row_ref, token_ref, count_ref, position_ref, table_ref, q_ref, kv_ref, scales_ref, zeros_ref, out_ref,
    *, variant: AttentionVariant, page_size: int, group: int, heads: int, head_dim: int,
    shape: tuple[int, int, int], dtype: jnp.dtype, has_scales: bool,
):  # fmt: skip
    del zeros_ref  # the same memory as the output
    query_rows, kv_block, columns = shape
    block, kv_head = pl.program_id(0), pl.program_id(1)
    row, count, first = row_ref[block], count_ref[block], position_ref[block]
    index, in_group = jnp.arange(query_rows) // heads, jnp.arange(query_rows) % heads
    column = jnp.arange(columns)
    in_head = (column < head_dim)[None, :]
    is_query = ((index < count) & (in_group < group))[:, None] & in_head
    here = ((token_ref[block] + index)[:, None], (kv_head * group + in_group)[:, None], column[None, :])
    end = first + count
    seen_from = 0 if variant.sliding_window is None else jnp.maximum(first - variant.sliding_window + 1, 0)

    def product(a, b, *, trans_b: bool = False):
        return plt.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST)

    @pl.when(count > 0)
    def _walk():
        queries = plt.load(q_ref.at[here], mask=is_query, other=0.0).astype(dtype)
        query_position = (first + index)[:, None]

        def step(number, carry):
            best, total, acc = carry
            position = number * kv_block + jnp.arange(kv_block)
            needed = (position >= seen_from) & (position < end)
            page = plt.load(table_ref.at[row, lax.div(position, page_size)], mask=needed, other=0)
            offset = lax.rem(position, page_size)
            in_block = needed[:, None] & in_head

            def fetch(which):
                there = (page[:, None], offset[:, None], 2 * kv_head + which, column[None, :])
                return plt.load(kv_ref.at[there], mask=in_block, other=0).astype(dtype)

            def fetch_scales(which):
                there = (page, 2 * kv_head + which, offset)
                return plt.load(scales_ref.at[there], mask=needed, other=0.0)[None, :]

            scores = product(queries, fetch(0), trans_b=True) * variant.scale
            if has_scales:  # on scores and weights: codes are multiplied as they are
                scores *= fetch_scales(0)
            if variant.soft_cap is not None:
                scores = variant.soft_cap * jnp.tanh(scores / variant.soft_cap)
            seen = needed[None, :] & (position[None, :] <= query_position)
            if variant.sliding_window is not None:
                seen &= position[None, :] > query_position - variant.sliding_window
            scores = jnp.where(seen, scores * _LOG2E, _MASKED)
            new_best = jnp.maximum(best, jnp.max(scores, axis=1))
            decay = jnp.exp2(best - new_best)
            weights = jnp.exp2(scores - new_best[:, None])
            total = total * decay + jnp.sum(weights, axis=1)
            if has_scales:
                weights *= fetch_scales(1)
            acc = acc * decay[:, None] + product(weights.astype(dtype), fetch(1))
            return new_best, total, acc

        carry = (
            jnp.full((query_rows,), _MASKED, jnp.float32),
            jnp.zeros((query_rows,), jnp.float32),
            jnp.zeros((query_rows, columns), jnp.float32),
        )
        begin = 0 if variant.sliding_window is None else lax.div(seen_from, kv_block)
        _, total, acc = lax.fori_loop(begin, lax.div(end + kv_block - 1, kv_block), step, carry)
        plt.store(out_ref.at[here], (acc / total[:, None]).astype(out_ref.dtype), mask=is_query)
