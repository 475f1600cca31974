"""Which tokens belong to which row of a step, and where each row's keys and values are."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's raggedness; a pytree, made once a step and shared by all layers.

    Attributes:
        page_table: int32 ``[rows, max_pages]``: the pages of each row in order; the rest is 0, the null page.
        kv_lens: int32 ``[rows]``: tokens in the row's cache once this step's are written; 0 for padding rows.
        cu_q_lens: int32 ``[rows + 1]``, from 0, not decreasing: row ``r`` owns the flattened tokens
            ``cu_q_lens[r]:cu_q_lens[r + 1]``, the last ones of its context; the rest is padding.
        max_q_len: static upper bound of a row's tokens in this step; 1 in a pure decode step.
    """

    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    max_q_len: int = dataclasses.field(metadata={"static": True})


class TokenPlaces(NamedTuple):
    """For each of the flattened tokens, int32 ``[tokens]``.

    Attributes:
        row: the row that owns it; undefined (but in range) for padding.
        position: its position in that row's context; -1 for padding.
        page: the page that holds its key and value; 0, the null page, for padding.
        offset: its index in that page.
    """

    row: jax.Array
    position: jax.Array
    page: jax.Array
    offset: jax.Array


def token_places(metadata: AttentionMetadata, num_tokens: int, page_size: int) -> TokenPlaces:
    """Looks up the row, position, page and offset of every flattened token of a step."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    starts, ends = metadata.cu_q_lens[:-1], metadata.cu_q_lens[1:]
    row = jnp.sum(token[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    real = row < ends.shape[0]
    row = jnp.minimum(row, ends.shape[0] - 1)
    first_position = metadata.kv_lens - (ends - starts)
    position = first_position[row] + token - starts[row]
    real = real & (position >= 0)
    page = metadata.page_table[row, jnp.maximum(position, 0) // page_size]
    return TokenPlaces(
        row=row,
        position=jnp.where(real, position, -1),
        page=jnp.where(real, page, 0),
        offset=jnp.where(real, position % page_size, 0),
    )
