"""A step's scales as the TPU kernel writes them: whole pages.

A page's scales lie by head, so one token's are a column, and a copy on a TPU moves rows. The pages that a step
touches are few, so XLA reads their scales, puts the new ones in, and the kernel copies them back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata


class ScalePages(NamedTuple):
    """Scales of the pages that a step writes to.

    Attributes:
        first: int32 ``[rows]``: which of ``pages`` is the first that a row writes to; its others follow.
        pages: float32 ``[n, 2 * kv_heads, page_size]``.
    """

    first: jax.Array
    pages: jax.Array


def merge_scales(scales: jax.Array, new: jax.Array, metadata: AttentionMetadata) -> ScalePages:
    """Puts a step's scales into those of its pages; the cache is only read.

    Args:
        scales: float32 ``[num_pages, 2 * kv_heads, page_size]``.
        new: float32 ``[tokens, 2 * kv_heads]``.
        metadata: the step's rows.
    """
    page_size, num_tokens = scales.shape[2], new.shape[0]
    starts, ends = metadata.cu_q_lens[:-1], metadata.cu_q_lens[1:]
    counts, num_rows = ends - starts, starts.shape[0]
    position = metadata.kv_lens - counts
    column = position // page_size
    pages_of_row = jnp.where(counts > 0, (metadata.kv_lens - 1) // page_size - column + 1, 0)
    until = jnp.cumsum(pages_of_row, dtype=jnp.int32)
    first = until - pages_of_row
    most = num_rows if metadata.max_q_len == 1 else 2 * num_rows + num_tokens // page_size
    page = jnp.arange(min(most, num_tokens), dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(page[:, None] >= until[None, :], axis=1, dtype=jnp.int32), num_rows - 1)
    column = column[row] + page - first[row]
    begin = column * page_size - position[row]  # of the page, counted from the row's first new token
    index = begin[:, None] + jnp.arange(page_size, dtype=jnp.int32)
    is_new = (index >= 0) & (index < counts[row][:, None]) & (page < until[-1])[:, None]
    padded = jnp.pad(new, ((page_size, page_size), (0, 0)))
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(padded, start, page_size))(
        page_size + starts[row] + begin
    )
    old = scales[metadata.page_table.at[row, column].get(mode="clip")]
    return ScalePages(first, jnp.where(is_new[:, None, :], windows.swapaxes(1, 2), old))
