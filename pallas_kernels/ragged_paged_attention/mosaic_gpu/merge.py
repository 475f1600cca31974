"""Puts together what the decode kernel left in parts; a small Triton kernel, since the parts are ragged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import DecodeWork, worker_of

_NOTHING = -1e30
_AT_ONCE = 16  # parts that are read together
_COLUMNS = 32  # of a head, in one program
_PADDING_TOKENS = 64  # in one program


def merge(
    base: jax.Array,
    decoded: jax.Array,
    parts: jax.Array,
    weights: jax.Array,
    work: DecodeWork,
    num_real: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Completes a step's output, in place of ``base``.

    Args:
        base: ``[tokens, q_heads, head_dim]``, right for the tokens of rows with several queries.
        decoded, parts, weights: what the decode kernel returned; ``decoded`` may be ``base`` itself.
        work: what the decode kernel was given.
        num_real: int32 ``[]``; tokens from there on are padding, and get zeros.
        interpret: runs in Pallas's interpreter, on any device.
    """
    tokens, q_heads, head_dim = base.shape
    group = parts.shape[2]
    rows = pl.next_power_of_2(group)
    num_rows = work.token.shape[0]
    copies = decoded is not base
    # XLA would copy an array that is both written over and read.
    copied = decoded if copies else work.token

    def body(
        token_ref, tiles_ref, first_ref, division_ref, real_ref, copied_ref, parts_ref, weights_ref,
        base_ref, out_ref,
    ):  # fmt: skip
        del base_ref  # the same memory as the output
        program, head = pl.program_id(0), pl.program_id(1)
        columns = pl.ds(pl.program_id(2) * _COLUMNS, _COLUMNS)
        in_group = jnp.arange(rows) < group
        in_tile = jnp.broadcast_to(in_group[:, None], (rows, _COLUMNS))
        heads = pl.ds(head * group, rows)

        @pl.when(program < num_rows)
        def _complete_row():
            row = program
            tiles = tiles_ref[row]
            here = (token_ref[row], heads, columns)
            begin = first_ref[row] + head * tiles
            least, extra = division_ref[0], division_ref[1]
            first_worker = worker_of(begin, least, extra)
            last_worker = worker_of(begin + jnp.maximum(tiles, 1) - 1, least, extra)

            @pl.when((tiles > 0) & (first_worker == last_worker))
            def _copy():
                if copies:
                    values = plt.load(copied_ref.at[here], mask=in_tile, other=0.0)
                    plt.store(out_ref.at[here], values, mask=in_tile)

            @pl.when((tiles > 0) & (first_worker < last_worker))
            def _combine():
                def add(index, carry):
                    acc, best, total = carry
                    worker = first_worker + index * _AT_ONCE + jnp.arange(_AT_ONCE)
                    is_there = worker <= last_worker
                    entry = jnp.where(worker == first_worker, 1, 0)
                    own = (worker[:, None], entry[:, None], jnp.arange(rows)[None, :])
                    there = is_there[:, None] & in_group[None, :]
                    weight = plt.load(weights_ref.at[own], mask=there, other=_NOTHING)
                    column = columns.start + jnp.arange(_COLUMNS)
                    own = (*(index[:, :, None] for index in own), column[None, None, :])
                    there = jnp.broadcast_to(there[:, :, None], (_AT_ONCE, rows, _COLUMNS))
                    part = plt.load(parts_ref.at[own], mask=there, other=0.0)
                    new_best = jnp.maximum(best, jnp.max(weight, axis=0))
                    decay, share = jnp.exp2(best - new_best), jnp.exp2(weight - new_best[None, :])
                    acc = acc * decay[:, None] + jnp.sum(part * share[:, :, None], axis=0)
                    return acc, new_best, total * decay + jnp.sum(share, axis=0)

                nothing = jnp.full((rows,), _NOTHING, jnp.float32)
                carry = (jnp.zeros((rows, _COLUMNS), jnp.float32), nothing, jnp.zeros((rows,), jnp.float32))
                times = lax.div(last_worker - first_worker, _AT_ONCE) + 1
                acc, _, total = lax.fori_loop(0, times, add, carry)
                plt.store(out_ref.at[here], (acc / total[:, None]).astype(out_ref.dtype), mask=in_tile)

        @pl.when(program >= num_rows)
        def _clear_padding():
            first = (program - num_rows) * _PADDING_TOKENS
            zeros = jnp.zeros((rows, _COLUMNS), out_ref.dtype)

            def clear(token, _):
                plt.store(out_ref.at[token, heads, columns], zeros, mask=in_tile)

            lax.fori_loop(
                jnp.maximum(first, real_ref[0]), jnp.minimum(first + _PADDING_TOKENS, tokens), clear, None
            )

    whole = pl.no_block_spec
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
        grid=(num_rows + pl.cdiv(tokens, _PADDING_TOKENS), q_heads // group, head_dim // _COLUMNS),
        in_specs=[whole] * 9,
        out_specs=whole,
        input_output_aliases={8: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ragged_paged_merge",
    )(
        work.token,
        work.num_tiles,
        work.first_unit,
        work.division,
        num_real[None],
        copied,
        parts,
        weights,
        base,
    )
