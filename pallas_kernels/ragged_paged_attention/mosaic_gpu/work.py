"""Who does what in a decode: made by a few small XLA operations, once a step for all layers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata


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
        start, count, length: ``[rows]``: first flattened token, tokens in this step, tokens of context.
    """

    tile_row: jax.Array
    tile_first: jax.Array
    num_tiles: jax.Array
    start: jax.Array
    count: jax.Array
    length: jax.Array


def tile_out(metadata: AttentionMetadata, *, num_tokens: int, queries: int) -> PrefillWork:
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
    return PrefillWork(row, first, until[-1], start, count, metadata.kv_lens)


def share_out(
    metadata: AttentionMetadata,
    *,
    num_workers: int,
    kv_heads: int,
    tile: int,
    sliding_window: int | None,
) -> DecodeWork:
    """Cuts the decodes of a step into equal shares."""
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
    worker = jnp.arange(num_workers, dtype=jnp.int32)
    start = worker * least + jnp.minimum(worker, extra)
    row = jnp.sum(start[:, None] >= until[None, :], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, length.shape[0] - 1)
    within, per_head = start - first_unit[row], jnp.maximum(num_tiles[row], 1)
    share = least + (worker < extra).astype(jnp.int32)
    shares = jnp.stack([row, within // per_head, within % per_head, share])
    division = jnp.stack([least, extra])
    return DecodeWork(token, length, first_tile, num_tiles, first_unit, shares, division)


def worker_of(unit: jax.Array, least: jax.Array, extra: jax.Array) -> jax.Array:
    """Who has a unit, given the two numbers of `DecodeWork.division`."""
    large = extra * (least + 1)  # units in shares with one more
    in_large = jax.lax.div(unit, least + 1)
    return jnp.where(unit < large, in_large, extra + jax.lax.div(unit - large, jnp.maximum(least, 1)))
