"""Lowers attention, or any function, for a GPU on a machine that has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention.api import (
    AttentionMetadata,
    Implementation,
    ragged_paged_attention,
)

_CUSTOM_CALLS = ("mosaic_gpu_v2", "mosaic_gpu", "triton_kernel_call", "__gpu$xla.gpu.triton")


def lower_for_h100(
    implementation: Implementation,
    *,
    max_q_len: int,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page_size: int = 64,
    dtype: str = "bfloat16",
    kv_dtype: str = "",
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> str:
    """The exported module's text, of 64 tokens in 8 rows; nothing is compiled or run."""
    q_heads, kv_heads = heads
    rows = 8
    tokens = 64
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    kv = shape((tokens, kv_heads, head_dim))
    layout = KVLayout(page_size, kv_heads, head_dim, jnp.dtype(kv_dtype or dtype))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    table: Any = integers((rows, 16))
    lengths: Any = integers((rows,))
    starts: Any = integers((rows + 1,))
    metadata = AttentionMetadata(table, lengths, starts, max_q_len)
    attend = functools.partial(
        ragged_paged_attention,
        scale=head_dim**-0.5,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        implementation=implementation,
    )
    return on_abstract_h100(
        attend,
        shape((tokens, q_heads, head_dim)),
        kv,
        kv,
        layout.shapes(100),
        metadata,
    )


def on_abstract_h100(function: Callable[..., Any], *args: Any) -> str:
    """The exported module's text of a function lowered for an H100."""
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h100)
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _CUSTOM_CALLS]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*args)
    return exported.mlir_module()
