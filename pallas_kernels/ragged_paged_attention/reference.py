"""The specification: dense attention, one row at a time, in float32. Slow on purpose.

Vaswani et al. 2017, equation 1, with the causal mask of generation; sliding window as in Mistral 7B (Jiang et
al. 2023), soft cap as in Gemma 2 (2024), grouped queries as in Ainslie et al. 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layout import KVPages, encode
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata, token_places
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
) -> tuple[jax.Array, KVPages]:
    """See `jaxserve.pallas_kernels.ragged_paged_attention.api.ragged_paged_attention`."""
    layout, kv_pages = kv_pages.layout, kv_pages.ordered()
    places = token_places(metadata, q.shape[0], layout.page_size)
    elements, new_scales = encode(k, v, layout.dtype)
    data = kv_pages.data.at[places.page, places.offset].set(elements, mode="drop")
    scales = kv_pages.scales
    if scales is not None:
        scales = scales.at[places.page, :, places.offset].set(new_scales, mode="drop")
    num_rows = metadata.kv_lens.shape[0]
    queries = q.astype(jnp.float32)

    def add_row(row: jax.Array, out: jax.Array) -> jax.Array:
        context = data[metadata.page_table[row]].reshape(-1, *data.shape[2:]).astype(jnp.float32)
        if scales is not None:
            scale = scales[metadata.page_table[row]].swapaxes(1, 2)
            context *= scale.reshape(-1, data.shape[2], 1)
        positions = jnp.where(places.row == row, places.position, -1)
        key_position = jnp.arange(context.shape[0])
        needed = key_position < metadata.kv_lens[row]
        if variant.sliding_window is not None:
            first_query = metadata.kv_lens[row] - (metadata.cu_q_lens[row + 1] - metadata.cu_q_lens[row])
            needed &= key_position > first_query - variant.sliding_window
        context = jnp.where(needed[:, None, None], context, 0.0)  # what lies elsewhere may be NaN
        attended = _dense_attention(queries, context, positions, variant)
        return jnp.where((positions >= 0)[:, None, None], attended, out)

    out = jax.lax.fori_loop(0, num_rows, add_row, jnp.zeros(q.shape, jnp.float32))
    written = KVPages(data, scales, kv_pages.head_dim)
    return out.astype(q.dtype), written.ordered(is_packed=layout.is_packed, folds=layout.folds)


def _dense_attention(
    queries: jax.Array,  # [tokens, q_heads, head_dim]
    context: jax.Array,  # [length, 2 * kv_heads, head_dim]
    positions: jax.Array,  # [tokens]; a token at -1 sees nothing and gets zeros
    variant: AttentionVariant,
) -> jax.Array:
    group = queries.shape[1] // (context.shape[1] // 2)
    keys = jnp.repeat(context[:, 0::2], group, axis=1)
    values = jnp.repeat(context[:, 1::2], group, axis=1)
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("thd,khd->htk", queries, keys, precision=highest) * variant.scale
    if variant.soft_cap is not None:
        scores = variant.soft_cap * jnp.tanh(scores / variant.soft_cap)
    key_position = jnp.arange(context.shape[0])
    seen = key_position[None, :] <= positions[:, None]
    if variant.sliding_window is not None:
        seen &= key_position[None, :] > positions[:, None] - variant.sliding_window
    seen = seen[None]
    best = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf, where=seen)
    weights = jnp.where(seen, jnp.exp(scores - best), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)  # a NaN stays one: it must be noticed
    return jnp.einsum("htk,khd->thd", weights, values, precision=highest)
