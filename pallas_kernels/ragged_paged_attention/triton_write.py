"""Writes a step's keys and values into their pages, in place: a small Triton kernel, one program a token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.layout import KVPages, encode
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import TokenPlaces


def write(kv_pages: KVPages, k: jax.Array, v: jax.Array, places: TokenPlaces, *, interpret: bool) -> KVPages:
    """The cache with a step's tokens in it; the same memory, if the caller's jit donates it.

    Args:
        k, v: ``[tokens, kv_heads, head_dim]``, of any floating-point type.
        places: of the tokens; padding is skipped.
        interpret: runs in Pallas's interpreter, on any device.
    """
    if kv_pages.scales is None:
        new, old = [k, v], [kv_pages.data]
    else:
        codes, scales = encode(k, v, kv_pages.data.dtype)
        assert scales is not None
        new, old = [codes[:, 0::2], codes[:, 1::2], scales], [kv_pages.data, kv_pages.scales]
    data, *scales = _write(old, new, places, interpret=interpret)
    return dataclasses.replace(kv_pages, data=data, scales=scales[0] if scales else None)


def _write(
    old: list[jax.Array], new: list[jax.Array], places: TokenPlaces, *, interpret: bool
) -> list[jax.Array]:
    """Elements, and if there are any scales, in place of ``old``."""
    tokens, kv_heads, head_dim = new[0].shape
    rows, columns = pl.next_power_of_2(kv_heads), pl.next_power_of_2(head_dim)

    def body(position_ref: Any, page_ref: Any, offset_ref: Any, *refs: Any) -> None:
        new_refs, out_refs = refs[: len(new)], refs[-len(old) :]  # between them the outputs' memory
        token = pl.program_id(0)
        head, column = jnp.arange(rows), jnp.arange(columns)
        mask = (head < kv_heads)[:, None] & (column < head_dim)[None, :]

        @pl.when(position_ref[token] >= 0)
        def _write_token():
            page, offset = page_ref[token], offset_ref[token]
            for which, source_ref in enumerate(new_refs[:2]):
                value = plt.load(source_ref.at[token, pl.ds(0, rows), pl.ds(0, columns)], mask=mask)
                there = (page, offset, (2 * head + which)[:, None], column[None, :])
                plt.store(out_refs[0].at[there], value.astype(old[0].dtype), mask=mask)
            if len(old) > 1:
                both, is_one = jnp.arange(2 * rows), jnp.arange(2 * rows) < 2 * kv_heads
                value = plt.load(new_refs[2].at[token, pl.ds(0, 2 * rows)], mask=is_one)
                plt.store(out_refs[1].at[page, both, offset], value, mask=is_one)

    whole = pl.no_block_spec
    first = 3 + len(new)
    written = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in old],
        grid=(tokens,),
        in_specs=[whole] * (first + len(old)),
        out_specs=[whole] * len(old),
        input_output_aliases={first + i: i for i in range(len(old))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ragged_paged_write",
    )(places.position, places.page, places.offset, *new, *old)
    return list(written)
