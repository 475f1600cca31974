"""What the TPU kernel writes where a token's own bytes are no rows that a copy could move.

Then XLA reads the little that is around them, puts the new in, and the kernel copies all of it back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata, token_places


class ScalePages(NamedTuple):
    """Scales of the pages that a step writes to.

    Attributes:
        first: int32 ``[rows]``: which of ``pages`` is the first that a row writes to; its others follow.
        pages: float32 ``[n, 2 * kv_heads, page_size]``.
    """

    first: jax.Array
    pages: jax.Array


def merge_scales(scales: jax.Array, new: jax.Array, metadata: AttentionMetadata) -> ScalePages:
    """Puts a step's scales, which are columns of their pages', into whole pages; the cache is only read.

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
    index = begin[:, None] + jnp.arange(page_size, dtype=jnp.int32)[None, :]
    is_new = (index >= 0) & (index < counts[row][:, None]) & (page < until[-1])[:, None]
    padded = jnp.pad(new, ((page_size, page_size), (0, 0)))
    windows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(padded, start, page_size))(
        page_size + starts[row] + begin
    )
    old = scales[metadata.page_table.at[row, column].get(mode="clip")]
    return ScalePages(first, jnp.where(is_new[:, None, :], windows.swapaxes(1, 2), old))


def merge_lines(kv_pages: KVPages, elements: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """Every token's line: its own keys and values, and those of the tokens that share its rows (`KVLayout`).

    Args:
        kv_pages: the cache, which is only read.
        elements: ``[tokens, 2 * kv_heads, head_dim]``, as the cache stores them.
        metadata: the step's rows.

    Returns:
        ``[tokens, kv_heads, folds, 2 * head_dim]``.
    """
    layout, num_tokens = kv_pages.layout, elements.shape[0]
    new = elements.reshape(num_tokens, layout.num_kv_heads, 2 * layout.head_dim)
    if layout.folds == 1:
        return new[:, :, None]
    places = token_places(metadata, num_tokens, layout.page_size)
    size = layout.page_size // layout.folds
    old = kv_pages.data[places.page, places.offset % size].reshape(*new.shape[:2], layout.folds, -1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    parts: list[jax.Array] = []
    for part in range(layout.folds):
        index = token + (part - places.offset // size) * size
        is_new = (index >= metadata.cu_q_lens[places.row]) & (index < metadata.cu_q_lens[places.row + 1])
        theirs = new.at[index].get(mode="clip")
        parts.append(jnp.where(is_new[:, None, None], theirs, old[:, :, part]))
    return jnp.stack(parts, axis=2)
