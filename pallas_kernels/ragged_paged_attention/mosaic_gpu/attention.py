"""The operation on Hopper: write, decode, prefill and merge kernels put together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata, token_places
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import decode, prefill
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.merge import merge
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Launch
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import share_out, tile_out
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.write import write
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

_HOPPER = 9.0
_H100_MULTIPROCESSORS = 132  # where only an abstract device is in scope
_INTERPRETED_CTAS = 2


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
    pages = kv_pages.data
    num_ctas = _INTERPRETED_CTAS if interpret else _num_multiprocessors()
    launch = Launch(num_ctas, interpret)
    tokens, _, head_dim = q.shape
    layout = kv_pages.layout
    places = token_places(metadata, tokens, layout.page_size)
    pages = write(pages, k, v, places, interpret=interpret)
    shares = share_out(
        metadata,
        num_workers=decode.num_workers(head_dim, launch),
        kv_heads=layout.num_kv_heads,
        tile=decode.TILE,
        sliding_window=variant.sliding_window,
    )
    stages = decode.stages_for(head_dim)
    decoded, parts, weights = decode.decode(
        q, pages, metadata.page_table, shares, variant, launch, stages=stages
    )
    base = decoded
    if metadata.max_q_len > 1:
        tiles = tile_out(metadata, num_tokens=tokens, queries=prefill.ITEM_QUERIES)
        stages = prefill.stages_for(head_dim)
        base = prefill.prefill(q, pages, metadata.page_table, tiles, variant, launch, stages=stages)
    out = merge(base, decoded, parts, weights, shares, metadata.cu_q_lens[-1], interpret=interpret)
    return out, dataclasses.replace(kv_pages, data=pages)


def _check(q: jax.Array, kv_pages: KVPages) -> None:
    """Raises NotImplementedError for what these kernels do not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or kv_pages.data.dtype != q.dtype:
        raise NotImplementedError(
            f"q is {q.dtype} and kv_pages {kv_pages.data.dtype}: must both be bfloat16 or float16"
        )
    layout = kv_pages.layout
    page_size, head_dim = layout.page_size, layout.head_dim
    if layout.is_packed or layout.folds > 1:
        raise NotImplementedError("kv_pages is packed or folded: must not be")
    if page_size < 8 or page_size & (page_size - 1):
        raise NotImplementedError(f"page_size={page_size}: must be a power of two, 8 or more")
    if head_dim % 32 or head_dim > 256:
        raise NotImplementedError(f"head_dim={head_dim}: must be a multiple of 32 up to 256")
    group = q.shape[1] // layout.num_kv_heads
    if group > QUERY_TILE:
        raise NotImplementedError(f"{group} query heads a kv head: must be at most {QUERY_TILE}")


def _num_multiprocessors() -> int:
    """Of the GPU that this is traced for. Raises NotImplementedError where it is no Hopper."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "gpu":
        return _H100_MULTIPROCESSORS
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) < _HOPPER:
        raise NotImplementedError(f"{device.device_kind}: must be an NVIDIA Hopper GPU or newer")
    return int(device.core_count)
