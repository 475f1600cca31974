"""Who does what in a step: made by a few small XLA operations, once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import Heads
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

# Of an H100, measured by `bench/kernels.py`; only their ratio counts.
_BYTES_PER_S = 2.95e12
_FLOPS_PER_S = 5.7e14
# On this share of the CTAs decodes are as fast as on all of them, if nothing else runs.
_SATURATING_SHARE = 0.5
# How much longer they take beside prefills, which read much from the second-level cache.
_CONTENTION = 1.25
# Keys and values of one row that stay in the second-level cache whatever the order of items.
_CACHED_BYTES = 24 << 20
# Tiles in a row that otherwise share a kv head's before it is the next head's turn.
_BUNCH = 8
# Overlap must be expected to save this much.
_WORTHWHILE = 0.97


class DecodeWork(NamedTuple):
    """Rows, and the share of each worker; int32.

    Attributes:
        token: ``[rows]``, the flattened token of the row's query.
        length: ``[rows]``, tokens of its context.
        first_tile: ``[rows]``, the first tile that its query sees.
        num_tiles: ``[rows]``, tiles from there on; 0 for rows that are empty or have several queries.
        first_unit: ``[rows]``, tiles of all heads of the rows before it.
        share: ``[4, workers]``: row, head and tile at which a worker starts, and how many tiles it has.
        division: ``[2]``: tiles of a smaller share, and how many workers, the first ones, have one more.
    """

    token: jax.Array
    length: jax.Array
    first_tile: jax.Array
    num_tiles: jax.Array
    first_unit: jax.Array
    share: jax.Array
    division: jax.Array


class PrefillWork(NamedTuple):
    """Items of the prefill kernel, one for each tile and query head; int32.

    Attributes:
        tile_row, tile_first: ``[tiles]``, a tile's row and its first query within it, longest context first.
        num_tiles: ``[]``, how many of them are real.
        bunch: ``[]``, how many tiles in a row are done head by head. With 1 items go strictly by length, so
            that CTAs end together; more, where one row's context is more than the second-level cache holds.
        first_cta: ``[]``, from which CTA on they are done.
        start, count, length: ``[rows]``: first flattened token, tokens in this step, tokens of context.
    """

    tile_row: jax.Array
    tile_first: jax.Array
    num_tiles: jax.Array
    bunch: jax.Array
    first_cta: jax.Array
    start: jax.Array
    count: jax.Array
    length: jax.Array


class Division(NamedTuple):
    """Who of the CTAs does what; int32 scalars.

    Attributes:
        decode_ctas: the first so many decode.
        first_prefill: from this one on they prefill.
    """

    decode_ctas: jax.Array
    first_prefill: jax.Array


def divide(
    metadata: AttentionMetadata, heads: Heads, variant: AttentionVariant, *, queries: int, num_ctas: int
) -> Division:
    """Lets decodes and chunks overlap, each on CTAs of its own, if that is expected to pay.

    Decodes take the time of their bytes, whoever does them, if enough CTAs do. Chunks take that of their
    products, in whole rounds of items. Of all ways to divide, the one whose longer side is shortest competes
    with doing one after the other.
    """
    count, seen = jnp.diff(metadata.cu_q_lens), _seen(metadata, variant)
    q_heads = heads.kv_heads * heads.group
    decoded = jnp.sum(jnp.where(count == 1, seen, 0).astype(jnp.float32))
    decode_s = decoded * (_row_bytes(heads) / _BYTES_PER_S)
    chunk, context = jnp.where(count > 1, count, 0).astype(jnp.float32), seen.astype(jnp.float32)
    flops = jnp.sum(chunk * (context - 0.5 * chunk)) * (4 * q_heads * heads.head_dim)
    items = jnp.ceil(chunk / queries).sum() * q_heads
    item_s = flops * (num_ctas / _FLOPS_PER_S) / jnp.maximum(items, 1.0)
    ctas = jnp.arange(1, num_ctas, dtype=jnp.float32)
    slowed = jnp.maximum(_CONTENTION, num_ctas * _SATURATING_SHARE / ctas)
    together = jnp.maximum(decode_s * slowed, jnp.ceil(items / (num_ctas - ctas)) * item_s)
    best = jnp.argmin(together).astype(jnp.int32)
    apart = decode_s + jnp.ceil(items / num_ctas) * item_s
    pays = together[best] < _WORTHWHILE * apart
    return Division(jnp.where(pays, best + 1, num_ctas), jnp.where(pays, best + 1, 0))


def tile_out(
    metadata: AttentionMetadata,
    heads: Heads,
    variant: AttentionVariant,
    *,
    num_tokens: int,
    queries: int,
    first_cta: jax.Array | int = 0,
) -> PrefillWork:
    """Cuts the chunks of a step into tiles of so many queries."""
    start, count = metadata.cu_q_lens[:-1], jnp.diff(metadata.cu_q_lens)
    rows = count.shape[0]
    tiles = jnp.where(count > 1, -(-count // queries), 0)
    until = jnp.cumsum(tiles, dtype=jnp.int32)
    most = num_tokens // queries + min(rows, num_tokens // 2)  # every row has at most one that is not full
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(index[:, None] >= until[None, :], axis=1, dtype=jnp.int32), rows - 1)
    first = (index - (until - tiles)[row]) * queries
    seen = jnp.where(index < until[-1], metadata.kv_lens[row] - count[row] + first + queries, 0)
    _, row, first = jax.lax.sort((-seen, row, first), num_keys=1)
    longest = jnp.max(jnp.where(count > 1, _seen(metadata, variant), 0))
    bunch = jnp.where(longest > _CACHED_BYTES // _row_bytes(heads), _BUNCH, 1)
    first_cta = jnp.asarray(first_cta, jnp.int32)
    return PrefillWork(row, first, until[-1], bunch, first_cta, start, count, metadata.kv_lens)


def _seen(metadata: AttentionMetadata, variant: AttentionVariant) -> jax.Array:
    """Tokens of context that each row's queries see together, [rows]."""
    if variant.sliding_window is None:
        return metadata.kv_lens
    return jnp.minimum(metadata.kv_lens, variant.sliding_window + jnp.diff(metadata.cu_q_lens))


def _row_bytes(heads: Heads) -> int:
    """Of one token's keys and values."""
    scale_bytes = 4 if heads.is_coded else 0
    return 2 * heads.kv_heads * (heads.head_dim * jnp.dtype(heads.kv_dtype).itemsize + scale_bytes)


def share_out(
    metadata: AttentionMetadata,
    *,
    most_workers: int,
    num_workers: jax.Array | int,
    kv_heads: int,
    tile: int,
    sliding_window: int | None,
) -> DecodeWork:
    """Cuts the decodes of a step into equal shares, for the first ``num_workers`` of ``most_workers``."""
    length = metadata.kv_lens
    token, counts = metadata.cu_q_lens[:-1], jnp.diff(metadata.cu_q_lens)
    first_tile = jnp.zeros_like(length)
    if sliding_window is not None:
        first_tile = jnp.maximum(length - sliding_window, 0) // tile
    num_tiles = jnp.where(counts == 1, -(-length // tile) - first_tile, 0)
    units = num_tiles * kv_heads
    until = jnp.cumsum(units, dtype=jnp.int32)
    first_unit = until - units
    total = until[-1]
    least, extra = total // num_workers, total % num_workers
    worker = jnp.arange(most_workers, dtype=jnp.int32)
    start = worker * least + jnp.minimum(worker, extra)
    row = jnp.sum(start[:, None] >= until[None, :], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, length.shape[0] - 1)
    within, per_head = start - first_unit[row], jnp.maximum(num_tiles[row], 1)
    share = jnp.where(worker < num_workers, least + (worker < extra).astype(jnp.int32), 0)
    shares = jnp.stack([row, within // per_head, within % per_head, share])
    division = jnp.stack([least, extra])
    return DecodeWork(token, length, first_tile, num_tiles, first_unit, shares, division)


def worker_of(unit: jax.Array, least: jax.Array, extra: jax.Array) -> jax.Array:
    """Who has a unit, given the two numbers of `DecodeWork.division`."""
    large = extra * (least + 1)  # units in shares with one more
    in_large = jax.lax.div(unit, least + 1)
    return jnp.where(unit < large, in_large, extra + jax.lax.div(unit - large, jnp.maximum(least, 1)))
