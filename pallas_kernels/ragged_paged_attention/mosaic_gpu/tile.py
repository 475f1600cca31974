"""What the decode and the prefill kernel do alike with one tile: shared memory, products, online softmax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

QUERY_TILE = 64  # rows of a tensor-core tile
MASKED = -1e30  # finite: the difference of two infinities is NaN
_LOG2E = math.log2(math.e)
_ROWS = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """How the kernels run.

    Attributes:
        num_ctas: as many as run at once, one for each multiprocessor.
        interpret: runs in Pallas's interpreter, on any device.
    """

    num_ctas: int
    interpret: bool


class Heads(NamedTuple):
    """Sizes that a kernel is built for.

    Attributes:
        kv_heads: key/value heads.
        group: query heads of each of them.
        head_dim: elements of a head.
        page_size: tokens in a page.
        dtype: of queries and output.
        kv_dtype: of the cache.
    """

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: Any
    kv_dtype: Any

    @property
    def is_coded(self) -> bool:
        """Whether the cache is 8-bit, and has scales."""
        return jnp.dtype(self.kv_dtype).itemsize == 1


def heads_of(q: jax.Array, kv_pages: jax.Array) -> Heads:
    """The sizes that arrays have."""
    kv_heads = kv_pages.shape[2] // 2
    sizes = kv_heads, q.shape[1] // kv_heads, q.shape[2], kv_pages.shape[1]
    return Heads(*sizes, q.dtype, kv_pages.dtype)


class Tensors(NamedTuple):
    """A kernel's arrays in device memory.

    Attributes:
        q: ``[tokens, q_heads, head_dim]``.
        kv_pages: ``[num_pages, page_size, 2 * kv_heads, head_dim]``, this step's keys and values included.
        scales: float32 ``[num_pages, 2 * kv_heads, page_size]``, of an 8-bit cache.
        page_table: int32 ``[rows, max_pages]``.
        out: like q.
    """

    q: Any
    kv_pages: Any
    scales: Any
    page_table: Any
    out: Any


def smem_transforms(head_dim: int, dtype: Any) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """How a tile lies in shared memory, so that tensor cores read it without bank conflicts."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(head_dim * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def empty_rows(head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of queries that saw nothing yet: values [64, head_dim], greatest score [64] and sum of weights [64]."""
    acc = plgpu.layout_cast(jnp.zeros((QUERY_TILE, head_dim), jnp.float32), plgpu.Layout.WGMMA)
    best = plgpu.layout_cast(jnp.full((QUERY_TILE,), MASKED, jnp.float32), _ROWS)
    total = plgpu.layout_cast(jnp.zeros((QUERY_TILE,), jnp.float32), _ROWS)
    return acc, best, total


def index_along(shape: tuple[int, int], axis: int) -> jax.Array:
    """Each element's index along an axis, int32, laid out like an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def capped(scores: jax.Array, variant: AttentionVariant) -> tuple[jax.Array, float]:
    """Scores before their unit, soft cap applied, and what makes them base-2 logarithms."""
    if variant.soft_cap is None:
        return scores, variant.scale * _LOG2E
    return jnp.tanh(scores * (variant.scale / variant.soft_cap)), variant.soft_cap * _LOG2E


def online_softmax(
    scores: jax.Array, unit: float, best: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of Milakov & Gimelshein 2018, algorithm 3, in base 2.

    Args:
        scores: float32 [64, K], MASKED where nothing is seen.
        unit: makes them base-2 logarithms.
        best, total: float32 [64]: greatest score so far, in that unit, and sum of weights.

    Returns:
        Weights [64, K], the factor [64] by which everything older shrinks, and the new best and total.
    """
    new_best = jnp.maximum(best, scores.max(axis=1) * unit)
    decay = jnp.exp2(best - new_best)
    weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(new_best, scores.shape, [0]))
    return weights, decay, new_best, total * decay + weights.sum(axis=1)


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A value a row, [64], for every column of an array [64, K]."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def multiply_registers(a: jax.Array, b_ref: Any, launch: Launch) -> jax.Array:
    """The product of a register tile [64, K] with one in shared memory [K, N], float32."""
    if launch.interpret:  # the interpreter takes both operands of a tensor-core product from shared memory
        return jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)

    def product(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, a, b_ref)
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC((a.shape[0], b_ref.shape[1]), jnp.float32))


def swizzle_in_place(plain_ref: Any, tiled_ref: Any) -> None:
    """Moves a tile [64, head_dim] to the order of `smem_transforms` in the same memory, by way of registers.

    A copy from device memory could do that itself, but only from rows that are multiples of 8.
    """
    values = plgpu.load(plain_ref, layout=plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()
    tiled_ref[...] = values
    plgpu.commit_smem()


def add_product(acc: jax.Array, a: jax.Array, b_ref: Any, launch: Launch) -> jax.Array:
    """``acc`` plus the product of a register tile [64, K] with one in shared memory [K, N], float32."""
    if launch.interpret:
        return acc + multiply_registers(a, b_ref, launch)
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def clear_outside(values_ref: Any, begin: jax.Array | int, end: jax.Array) -> None:
    """Zeroes a tile's rows outside of ``begin : end``, if there are any.

    Behind a row's end and before its window may be anything, NaN included, and 0 * NaN is NaN.
    """
    pl.when((begin > 0) | (end < values_ref.shape[0]))(lambda: _clear(values_ref, begin, end))


def _clear(values_ref: Any, begin: jax.Array | int, end: jax.Array) -> None:
    values = plgpu.load(values_ref, layout=plgpu.Layout.WGMMA)
    index = index_along(values.shape, 0)
    values_ref[...] = jnp.where((index >= begin) & (index < end), values, jnp.zeros_like(values))
    plgpu.commit_smem()
