"""The operation as callers see it: checks, then the dispatch."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.dispatch import AUTO, Operation
from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata as AttentionMetadata
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

Implementation = Literal["auto", "reference", "xla", "mosaic_gpu", "triton", "mosaic_tpu"]

_FOLDER = "jaxserve.pallas_kernels.ragged_paged_attention"

RAGGED_PAGED_ATTENTION = Operation(
    name="ragged_paged_attention",
    implementations={
        "reference": f"{_FOLDER}.reference:ragged_paged_attention",
        "xla": f"{_FOLDER}.xla:ragged_paged_attention",
        "mosaic_gpu": f"{_FOLDER}.mosaic_gpu.attention:ragged_paged_attention",
        "triton": f"{_FOLDER}.triton:ragged_paged_attention",
        "mosaic_tpu": f"{_FOLDER}.mosaic_tpu:ragged_paged_attention",
    },
    order={"cpu": ("xla",), "gpu": ("mosaic_gpu", "triton", "xla"), "tpu": ("mosaic_tpu", "xla")},
)


def ragged_paged_attention[Cache: (jax.Array, KVPages)](
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: Cache,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = AUTO,
    platform: str | None = None,
) -> tuple[jax.Array, Cache]:
    """Writes a step's keys and values into their pages, then attends causally over each row's whole context.

    Rows may hold one token (decode) or many (a chunk of a prompt, which may continue a context). Softmax and
    accumulation are float32. Query head ``h`` reads key/value head ``h // (q_heads // kv_heads)``.

    Args:
        q: ``[tokens, q_heads, head_dim]``, rotary embedding applied.
        k: ``[tokens, kv_heads, head_dim]``, rotary embedding applied.
        v: ``[tokens, kv_heads, head_dim]``.
        kv_pages: one layer's cache, `KVPages`; of 16 or 32 bits also its bare array, ``[num_pages, page_size,
            2 * kv_heads, head_dim]`` or packed (`KVLayout`). It is returned as it came. Written in place if
            the caller's jit donates it. Pages that no row owns, and page 0, may hold anything, NaN included.
        metadata: which token belongs to which row, and where each row's pages are. Page ids and lengths are
            trusted: the caller checked them on the host.
        scale: multiplies the scores.
        sliding_window: a query at position p sees keys in (p - window, p]; None sees all of [0, p]. Pages
            that lie wholly before the window may have been given away.
        soft_cap: scores become ``cap * tanh(score / cap)``.
        implementation: ``"auto"`` picks for the platform; a name never falls back to another.
        platform: where this will run, ``cpu``, ``gpu`` or ``tpu``; None means on JAX's default backend.

    Returns:
        The attention output ``[tokens, q_heads, head_dim]`` in q's dtype, zeros for padding tokens, and the
        cache.

    Raises:
        ValueError: for shapes, dtypes or options that contradict each other (at trace time).
        NotImplementedError: if the named implementation does not take this input.
        NoImplementationError: if none of the platform's does.
    """
    cache = kv_pages if isinstance(kv_pages, KVPages) else KVPages(kv_pages, None, q.shape[-1])
    _check_arrays(q, k, v, cache)
    _check_metadata(metadata, num_tokens=q.shape[0])
    out, written = RAGGED_PAGED_ATTENTION(
        q,
        k,
        v,
        cache,
        metadata,
        AttentionVariant(scale=scale, sliding_window=sliding_window, soft_cap=soft_cap),
        implementation=implementation,
        platform=jax.default_backend() if platform is None else platform,
    )
    return out, written if isinstance(kv_pages, KVPages) else written.data


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array, kv_pages: KVPages) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 3 or 0 in array.shape:
            raise ValueError(
                f"{name} has shape {array.shape}: must be [tokens, heads, head_dim], none of them 0"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize not in (2, 4):
            raise ValueError(f"{name} is {array.dtype}: must be float32, bfloat16 or float16")
    layout = kv_pages.layout
    tokens, q_heads, head_dim = q.shape
    expected = (tokens, layout.num_kv_heads, head_dim)
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}: must be {expected}, from q and kv_pages")
    if layout.head_dim != head_dim:
        raise ValueError(f"kv_pages holds heads of {layout.head_dim} elements: q has {head_dim}")
    if q_heads % layout.num_kv_heads:
        raise ValueError(f"q has {q_heads} heads: must be a multiple of the {layout.num_kv_heads} kv heads")


def _check_metadata(metadata: AttentionMetadata, *, num_tokens: int) -> None:
    for name, ndim in (("page_table", 2), ("kv_lens", 1), ("cu_q_lens", 1)):
        array = getattr(metadata, name)
        if array.dtype != jnp.int32 or array.ndim != ndim or 0 in array.shape:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}: must be int32 with {ndim} axes, not empty"
            )
    rows = metadata.kv_lens.shape[0]
    if metadata.page_table.shape[0] != rows or metadata.cu_q_lens.shape[0] != rows + 1:
        raise ValueError(
            f"page_table has {metadata.page_table.shape[0]} rows and cu_q_lens {metadata.cu_q_lens.shape[0]}"
            f" entries: kv_lens says {rows} rows, so {rows} and {rows + 1}"
        )
    if not 1 <= metadata.max_q_len <= num_tokens:
        raise ValueError(
            f"max_q_len={metadata.max_q_len}: must be in [1, {num_tokens}], the number of tokens"
        )
