"""The operation on Hopper: write, decode, prefill and merge kernels put together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.hopper import num_multiprocessors
from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata, token_places
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import decode, prefill
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.kernel import attend, can_mix
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.merge import merge
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Launch, heads_of
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import divide, share_out, tile_out
from jaxserve.pallas_kernels.ragged_paged_attention.triton_write import write
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

_INTERPRETED_CTAS = 2
_LEAST_CODED_PAGE = 32  # tokens; their scales are a copy, which starts at whole 128 bytes


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KVPages]:
    """See `jaxserve.pallas_kernels.ragged_paged_attention.api.ragged_paged_attention`.

    Args:
        interpret: runs in Pallas's interpreters, on any device.
    """
    _check(q, kv_pages)
    num_ctas = _INTERPRETED_CTAS if interpret else num_multiprocessors()
    launch = Launch(num_ctas, interpret)
    tokens, heads = q.shape[0], heads_of(q, kv_pages.data)
    places = token_places(metadata, tokens, kv_pages.layout.page_size)
    kv_pages = write(kv_pages, k, v, places, interpret=interpret)
    all_workers = decode.num_workers(heads.head_dim, launch)
    cut = functools.partial(
        share_out,
        metadata,
        most_workers=all_workers,
        kv_heads=heads.kv_heads,
        tile=decode.TILE,
        sliding_window=variant.sliding_window,
    )
    tiles_of = functools.partial(
        tile_out, metadata, heads, variant, num_tokens=tokens, queries=prefill.ITEM_QUERIES
    )
    run = functools.partial(
        attend, q, kv_pages.data, kv_pages.scales, metadata.page_table, variant=variant, launch=launch
    )
    if metadata.max_q_len == 1:
        shares = cut(num_workers=all_workers)
        decoded, *parts = run(shares, None)
        base = decoded
    elif can_mix(heads.head_dim):
        division = divide(metadata, heads, variant, queries=prefill.ITEM_QUERIES, num_ctas=num_ctas)
        shares = cut(num_workers=division.decode_ctas * decode.workers_per_cta(heads.head_dim))
        decoded, *parts = run(shares, tiles_of(first_cta=division.first_prefill))
        base = decoded
    else:
        shares = cut(num_workers=all_workers)
        decoded, *parts = run(shares, None)
        (base,) = run(None, tiles_of())
    out = merge(base, decoded, *parts, shares, metadata.cu_q_lens[-1], interpret=interpret)
    return out, kv_pages


def _check(q: jax.Array, kv_pages: KVPages) -> None:
    """Raises NotImplementedError for what these kernels do not take."""
    layout = kv_pages.layout
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not (layout.has_scales or layout.dtype == q.dtype):
        raise NotImplementedError(
            f"q is {q.dtype} and kv_pages {layout.dtype}: must both be bfloat16 or float16, or kv_pages 8-bit"
        )
    page_size, head_dim = layout.page_size, layout.head_dim
    if layout.is_packed or layout.folds > 1:
        raise NotImplementedError("kv_pages is packed or folded: must not be")
    if page_size < 8 or page_size & (page_size - 1):
        raise NotImplementedError(f"page_size={page_size}: must be a power of two, 8 or more")
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"head_dim={head_dim}: must be a multiple of 32 up to 256")
    if layout.has_scales and jax.default_backend() == "gpu":
        raise NotImplementedError(f"kv_pages is {layout.dtype}: 8-bit caches have not run on a device yet")
    if layout.has_scales and page_size < _LEAST_CODED_PAGE:
        raise NotImplementedError(
            f"page_size={page_size}: must be {_LEAST_CODED_PAGE} or more in an 8-bit cache"
        )
    if layout.has_scales and head_dim > 128:
        raise NotImplementedError(f"head_dim={head_dim}: must be at most 128 in an 8-bit cache")
    group = q.shape[1] // layout.num_kv_heads
    if group > QUERY_TILE:
        raise NotImplementedError(f"{group} query heads a kv head: must be at most {QUERY_TILE}")
