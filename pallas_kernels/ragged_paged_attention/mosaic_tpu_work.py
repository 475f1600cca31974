"""The work list of the TPU kernel: which query block of which row is attended when."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata


class WorkList(NamedTuple):
    """Items in the order in which a core walks them; one item is one query block of one row.

    Attributes:
        row: int32 ``[cores * items_per_core]``.
        first: like ``row``, the item's first token, counted within its row.
        count: int32 ``[cores]``, how many items a core has; what lies behind them is undefined.
    """

    row: jax.Array
    first: jax.Array
    count: jax.Array


def make_work(metadata: AttentionMetadata, num_tokens: int, block_tokens: int, cores: int = 1) -> WorkList:
    """Cuts every row into query blocks, and spreads the single tokens evenly among the blocks of chunks.

    A core walks its items one after the other and fetches pages for the next ones meanwhile. A chunk's block
    keeps the matrix units busy for long and needs few bytes; a single token needs many bytes and little
    arithmetic. In alternation (Bresenham's line) the pages of the latter arrive under the arithmetic of the
    former: POD-Attention (Kamath et al. 2025) for a core that runs one thing at a time.

    Args:
        metadata: the step's rows.
        num_tokens: flattened tokens, padding included.
        block_tokens: tokens of a query block.
        cores: that share the work: each kind of item is dealt out in turn.
    """
    counts = metadata.cu_q_lens[1:] - metadata.cu_q_lens[:-1]
    rows = counts.shape[0]
    single = counts == 1
    singles = _items(jnp.where(single, 1, 0), 1, min(rows, num_tokens))
    if metadata.max_q_len == 1:
        return _stack([_every(singles, core, cores) for core in range(cores)])
    capacity = min(rows + num_tokens // block_tokens, num_tokens)
    blocks = jnp.where(single, 0, (counts + block_tokens - 1) // block_tokens)
    chunks = _items(blocks, block_tokens, capacity)
    return _stack(
        [
            _spread(_every(singles, core, cores), _every(chunks, core, cores), -(-capacity // cores) + 1)
            for core in range(cores)
        ]
    )


def _every(work: WorkList, core: int, cores: int) -> WorkList:
    """What one core is dealt."""
    padded = [jnp.pad(array, (0, cores - 1)) for array in (work.row, work.first)]
    size = -(-work.row.shape[0] // cores)
    row, first = (array[core::cores][:size] for array in padded)
    return WorkList(row, first, (work.count - core + cores - 1) // cores)


def _stack(lists: list[WorkList]) -> WorkList:
    return WorkList(*(jnp.concatenate(arrays) for arrays in zip(*lists, strict=True)))


def _items(blocks_of_row: jax.Array, block_tokens: int, capacity: int) -> WorkList:
    """The blocks of some rows, in their order."""
    until = jnp.cumsum(blocks_of_row, dtype=jnp.int32)
    item = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(item[:, None] >= until[None, :], axis=1, dtype=jnp.int32), until.shape[0] - 1)
    first = (item - until[row] + blocks_of_row[row]) * block_tokens
    return WorkList(row, first, until[-1:])


def _spread(singles: WorkList, chunks: WorkList, capacity: int) -> WorkList:
    """Both lists in one: item i is a chunk's where the line ``i * chunks / all`` reaches an integer."""
    num_chunks = chunks.count[0]
    total = singles.count[0] + num_chunks
    item = jnp.arange(capacity, dtype=jnp.int32)
    # A chunk's block goes first: the pages of the tokens after it are fetched while it is computed.
    chunks_before = (item * num_chunks + total - 1) // jnp.maximum(total, 1)
    chunks_after = ((item + 1) * num_chunks + total - 1) // jnp.maximum(total, 1)
    is_chunk = chunks_after > chunks_before
    from_chunks = jnp.minimum(chunks_before, chunks.row.shape[0] - 1)
    from_singles = jnp.clip(item - chunks_before, 0, singles.row.shape[0] - 1)
    return WorkList(
        jnp.where(is_chunk, chunks.row[from_chunks], singles.row[from_singles]),
        jnp.where(is_chunk, chunks.first[from_chunks], singles.first[from_singles]),
        total[None],
    )
