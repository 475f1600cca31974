"""Block sizes of the TPU kernel."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """Attributes: pages of a KV block, tokens of a query block, slots of the ring."""

    kv_pages: int
    q_tokens: int
    depth: int


def choose_blocks(layout: KVLayout, group: int, q_dtype: jnp.dtype, metadata: AttentionMetadata) -> Blocks:
    token_bytes = layout.bytes_per_page() // layout.page_size
    tokens = min(max(2 * 2**20 // token_bytes, 128), 512)
    pages = max(1, min(tokens // layout.page_size, metadata.page_table.shape[1]))
    q = 1 if metadata.max_q_len == 1 else min(max(8, 512 // group), metadata.max_q_len)
    return Blocks(pages, q, 3)
