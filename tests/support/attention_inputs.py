"""Hostile inputs for attention: every row from its own key, shuffled pages, NaN wherever no row owns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata
from jaxserve.pallas_kernels.ragged_paged_attention.arg_specs import ArgSpec
from tests.support.attention_oracle import Step, encode

NUM_SPARE_PAGES = 3


def make_step(
    spec: ArgSpec, dtype: jnp.dtype, kv_dtype: str = "", *, seed: int = 0
) -> tuple[Step, tuple[Any, ...], AttentionMetadata]:
    """The oracle's view of a step, the arrays (q, k, v, kv_pages) in ``dtype``, and the metadata.

    With an 8-bit ``kv_dtype`` the cache is `KVPages`; scales are NaN where nobody owns the token.
    """
    rng = np.random.default_rng(seed)
    page_counts = [-(-length // spec.page_size) for _, length in spec.rows]
    num_pages = 1 + sum(page_counts) + NUM_SPARE_PAGES
    free = rng.permutation(np.arange(1, num_pages)).astype(np.int32)
    page_table = np.zeros((len(spec.rows), max(*page_counts, 1) + 2), np.int32)
    kv_pages = np.full((num_pages, spec.page_size, 2 * spec.num_kv_heads, spec.head_dim), np.nan)
    queries, keys, values = [], [], []
    for row, (count, length) in enumerate(spec.rows):
        owned, free = np.split(free, [page_counts[row]])
        page_table[row, : len(owned)] = owned
        row_rng = np.random.default_rng([seed, row])
        for position in range(length - count):
            page, offset = owned[position // spec.page_size], position % spec.page_size
            kv_pages[page, offset] = row_rng.standard_normal(kv_pages.shape[2:])
        queries.append(row_rng.standard_normal((count, spec.num_q_heads, spec.head_dim)))
        keys.append(row_rng.standard_normal((count, spec.num_kv_heads, spec.head_dim)))
        values.append(row_rng.standard_normal((count, spec.num_kv_heads, spec.head_dim)))
    # Padding tokens are as hostile as unowned pages.
    queries.append(np.full((spec.padding_tokens, spec.num_q_heads, spec.head_dim), np.nan))
    keys.append(np.full((spec.padding_tokens, spec.num_kv_heads, spec.head_dim), np.nan))
    values.append(keys[-1])
    float_arrays = (np.concatenate(queries), np.concatenate(keys), np.concatenate(values), kv_pages)
    queries, keys, values, pages = (jnp.asarray(array, dtype) for array in float_arrays)
    cache, scales = (quantised(pages, kv_dtype, rng)) if kv_dtype else (pages, None)
    counts = [count for count, _ in spec.rows]
    kv_lens = np.array([length for _, length in spec.rows], np.int32)
    cu_q_lens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rounded = [np.asarray(array, np.float64) for array in (queries, keys, values, cache)]
    step = Step(
        *rounded,
        kv_scales=None if scales is None else np.asarray(scales, np.float64),
        kv_dtype=str(cache.dtype),
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
    )
    metadata = AttentionMetadata(
        page_table=jnp.asarray(page_table),
        kv_lens=jnp.asarray(kv_lens),
        cu_q_lens=jnp.asarray(cu_q_lens),
        max_q_len=max(spec.max_q_len, 1),
    )
    kv_pages = cache if scales is None else KVPages(cache, scales, spec.head_dim)
    return step, (queries, keys, values, kv_pages), metadata


def quantised(pages: jax.Array, kv_dtype: str, rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of pages; codes are noise, and scales NaN, where pages are NaN."""
    floats = np.asarray(pages, np.float64)
    noise = rng.integers(-128, 127, floats.shape, endpoint=True).astype(np.int8)
    codes = noise.view(jnp.dtype(kv_dtype))
    scales = np.full(floats.shape[:3], np.nan, np.float32)
    for index in zip(*np.nonzero(~np.isnan(floats[..., 0])), strict=True):
        codes[index], scales[index] = encode(floats[index], kv_dtype)
    return jnp.asarray(codes), jnp.asarray(scales.swapaxes(1, 2))
