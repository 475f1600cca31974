"""Ragged paged attention on TPUs: one Pallas kernel (Mosaic) for a whole mixed batch, the KV write included.

This module checks the input, lays it out for the kernel and calls it; `mosaic_tpu_work` orders the work,
`mosaic_tpu_kernel` moves the data, `mosaic_tpu_attend` computes, `mosaic_tpu_blocks` has the sizes. After
Ragged Paged Attention (jax-ml/jax, `jax.experimental.pallas.ops.tpu.ragged_paged_attention`), which reads its
cache in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.layout import KVLayout, KVPages, encode
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata, token_places
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import VMEM_LIMIT_BYTES, choose_blocks
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_kernel import kernel
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import LANES, KernelConfig
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_work import WorkList, make_work
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_writes import (
    ScalePages,
    merge_lines,
    merge_scales,
)
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

NAME = "ragged_paged_attention_tpu"

# Half of the scalar memory that a core has: the rest is the compiler's.
_SMEM_BYTES = 512 * 2**10
_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
_KV_DTYPES = (*_DTYPES, jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: KVPages,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
) -> tuple[jax.Array, KVPages]:
    """See `jaxserve.pallas_kernels.ragged_paged_attention.api.ragged_paged_attention`.

    A cache is best stored in `best_order`, and an 8-bit one in pages of a multiple of 128 tokens: otherwise
    XLA copies it, or its scales.

    Raises:
        NotImplementedError: for float16, heads below 64 or above 256 elements, pages that cannot be folded
            (`best_order`), page tables that do not fit in scalar memory, and blocks that do not fit in vector
            memory.
    """
    stored = kv_pages.layout
    layout = _check(q, stored, metadata)
    kv_pages = kv_pages.ordered(is_packed=layout.is_packed, folds=layout.folds)
    num_tokens, q_heads, head_dim = q.shape
    words = 4 // q.dtype.itemsize
    group = -(-(q_heads // layout.num_kv_heads) // words) * words
    blocks = choose_blocks(layout, group, q.dtype.itemsize, metadata)
    work = make_work(metadata, num_tokens, blocks.q_tokens, blocks.cores)
    config = KernelConfig(
        variant=variant,
        page_size=layout.page_size,
        max_pages=metadata.page_table.shape[1],
        kv_heads=layout.num_kv_heads,
        group=group,
        width=2 * head_dim if layout.is_packed else head_dim,
        is_packed=layout.is_packed,
        folds=layout.folds,
        kv_dtype=layout.dtype,
        kv_pages=blocks.kv_pages,
        q_tokens=blocks.q_tokens,
        depth=blocks.depth,
        cores=blocks.cores,
        items_per_core=work.row.shape[0] // blocks.cores,
    )
    rows = (config.rows_per_line, config.width)
    cache = {"pages": kv_pages.data.reshape(-1, config.part_size, *rows)}
    elements, new_scales = encode(k, v, layout.dtype)
    merged = None
    if kv_pages.scales is not None and new_scales is not None:
        cache["scales"] = kv_pages.scales
        merged = merge_scales(kv_pages.scales, new_scales, metadata)
    new_kv = merge_lines(kv_pages, elements, metadata).reshape(num_tokens, *rows)
    out, cache = _call(config, work, metadata, _pack_queries(q, config, words), new_kv, merged, cache)
    out = _unpack_output(out, config, q.shape)
    is_real = token_places(metadata, num_tokens, layout.page_size).position >= 0
    data = cache["pages"].reshape(kv_pages.data.shape)
    written = dataclasses.replace(kv_pages, data=data, scales=cache.get("scales"))
    written = written.ordered(is_packed=stored.is_packed, folds=stored.folds)
    return jnp.where(is_real[:, None, None], out, 0), written


def best_order(layout: KVLayout) -> KVLayout:
    """The same layout in the order that the kernel reads: whole rows of lanes, whole 32-bit words of rows."""
    is_packed = 2 * layout.head_dim == LANES
    rows = layout.num_kv_heads * (1 if is_packed else 2)
    folds = 4 // math.gcd(rows * layout.dtype.itemsize, 4)
    return dataclasses.replace(layout, is_packed=is_packed, folds=folds)


def _check(q: jax.Array, layout: KVLayout, metadata: AttentionMetadata) -> KVLayout:
    """The layout that the kernel wants; raises NotImplementedError for what it does not take."""
    if q.dtype not in _DTYPES:
        raise NotImplementedError(f"q is {q.dtype}: needs bfloat16 or float32")
    if layout.dtype not in _KV_DTYPES:
        raise NotImplementedError(f"kv_pages is {layout.dtype}: needs {', '.join(map(str, _KV_DTYPES))}")
    if not (64 <= layout.head_dim <= LANES or layout.head_dim == 2 * LANES):
        raise NotImplementedError(f"head_dim={layout.head_dim}: needs 64 to 128, or 256")
    rows, max_pages = metadata.page_table.shape
    if 4 * rows * max_pages > _SMEM_BYTES:
        raise NotImplementedError(
            f"page_table is [{rows}, {max_pages}], {4 * rows * max_pages} bytes: scalar memory has room for "
            f"{_SMEM_BYTES}; a larger page_size needs fewer pages"
        )
    try:
        return best_order(layout)
    except ValueError as error:
        raise NotImplementedError(
            f"{layout.num_kv_heads} kv heads of {layout.head_dim} {layout.dtype} on a device: {error}"
        ) from None


def _pack_queries(q: jax.Array, config: KernelConfig, words: int) -> jax.Array:
    """Queries ``[tokens, q_heads, head_dim]`` by kv head, in whole 32-bit words: as in `Refs.q`.

    A token is then a row of its own that a copy can begin at, whatever the tiling.
    """
    num_tokens, q_heads, head_dim = q.shape
    own = q_heads // config.kv_heads
    q = q.reshape(num_tokens, config.kv_heads, own, head_dim).swapaxes(0, 1)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, config.group - own), (0, config.width - head_dim)))
    return q.reshape(config.kv_heads, num_tokens, config.group // words, words, config.width)


def _unpack_output(out: jax.Array, config: KernelConfig, shape: tuple[int, ...]) -> jax.Array:
    num_tokens, q_heads, head_dim = shape
    out = out.reshape(config.kv_heads, num_tokens, config.group, config.width)
    out = out[:, :, : q_heads // config.kv_heads, config.width - head_dim :]
    return out.swapaxes(0, 1).reshape(shape)


def _call(
    config: KernelConfig,
    work: WorkList,
    metadata: AttentionMetadata,
    q: jax.Array,
    new_kv: jax.Array,
    new_scales: ScalePages | None,
    cache: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The output as in `Refs.out`, and the arrays of the cache, which are written in place."""
    scalars = {
        "item_row": work.row,
        "item_first": work.first,
        "num_items": work.count,
        "page_table": metadata.page_table.reshape(-1),
        "kv_lens": metadata.kv_lens,
        "cu_q_lens": metadata.cu_q_lens,
    }
    inputs = {"q": q, "new_kv": new_kv}
    rows = config.q_tokens * config.group
    queries = (config.kv_heads, config.q_tokens, *q.shape[2:])
    pages = cache["pages"]
    product_dtype = q.dtype if config.has_scales else jnp.promote_types(q.dtype, pages.dtype)
    keys = pltpu.VMEM((config.kv_heads, config.kv_tokens, config.width), product_dtype)
    statistic = pltpu.VMEM((config.kv_heads, rows, LANES), jnp.float32)
    scratch = {
        "kv_ring": pltpu.VMEM((config.depth, config.kv_pages, *pages.shape[1:]), pages.dtype),
        "q_ring": pltpu.VMEM((config.depth, *queries), q.dtype),
        "out_ring": pltpu.VMEM((2, *queries), q.dtype),
        "keys": keys,
        "values": keys,
        "best": statistic,
        "total": statistic,
        "acc": pltpu.VMEM((config.kv_heads, rows, config.width), jnp.float32),
        "kv_sems": pltpu.SemaphoreType.DMA((config.depth,)),
        "q_sems": pltpu.SemaphoreType.DMA((config.depth,)),
        "out_sems": pltpu.SemaphoreType.DMA((2,)),
        "write_sem": pltpu.SemaphoreType.DMA,
    }
    if new_scales is not None:
        scalars["first_scales"], inputs["new_scales"] = new_scales
        ring = (config.depth, config.kv_pages, *new_scales.pages.shape[1:])
        scratch["scale_ring"] = pltpu.VMEM(ring, jnp.float32)
    # XLA may keep what is small near the core; the cache stays where it is, however small.
    anywhere, in_hbm = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.HBM)
    out, *written = pl.pallas_call(
        functools.partial(
            kernel,
            names=(*scalars, *inputs, *(f"{name}_in" for name in cache), "out", *cache, *scratch),
            config=config,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[*[anywhere] * len(inputs), *[in_hbm] * len(cache)],
            out_specs=[anywhere, *[in_hbm] * len(cache)],
            grid=(config.cores,),
            scratch_shapes=tuple(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            *(pltpu.HBM(array.shape, array.dtype) for array in cache.values()),
        ],
        input_output_aliases={len(scalars) + len(inputs) + i: 1 + i for i in range(len(cache))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        name=NAME,
    )(*scalars.values(), *inputs.values(), *cache.values())
    return out, dict(zip(cache, written, strict=True))
