"""Writes a step's keys and values into their pages, in place: a small Triton kernel, one program a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.ragged_paged_attention.metadata import TokenPlaces


def write(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, places: TokenPlaces, *, interpret: bool
) -> jax.Array:
    """The cache with a step's tokens in it; the same memory, if the caller's jit donates it.

    Args:
        kv_pages: ``[num_pages, page_size, 2 * kv_heads, head_dim]``.
        k, v: ``[tokens, kv_heads, head_dim]``, of any floating-point type.
        places: of the tokens; padding is skipped.
        interpret: runs in Pallas's interpreter, on any device.
    """
    tokens, kv_heads, head_dim = k.shape
    rows, columns = pl.next_power_of_2(kv_heads), pl.next_power_of_2(head_dim)

    def body(position_ref, page_ref, offset_ref, k_ref, v_ref, old_ref, kv_ref):
        del old_ref  # the same memory as the output
        token = pl.program_id(0)
        mask = (jnp.arange(rows) < kv_heads)[:, None] & (jnp.arange(columns) < head_dim)[None, :]

        @pl.when(position_ref[token] >= 0)
        def _write():
            for which, source_ref in enumerate((k_ref, v_ref)):
                value = plt.load(source_ref.at[token, pl.ds(0, rows), pl.ds(0, columns)], mask=mask, other=0)
                heads = (2 * jnp.arange(rows) + which)[:, None]
                there = (page_ref[token], offset_ref[token], heads, jnp.arange(columns)[None, :])
                plt.store(kv_ref.at[there], value.astype(kv_ref.dtype), mask=mask)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        grid=(tokens,),
        in_specs=[pl.no_block_spec] * 6,
        out_specs=pl.no_block_spec,
        input_output_aliases={5: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ragged_paged_write",
    )(places.position, places.page, places.offset, k, v, kv_pages)
