"""The first half of a gated feed-forward layer in one Hopper kernel: product and gate.

    x [T, D], weight [F / 128, 2, 128, D]  ->  activation(x @ gate.T) * (x @ up.T)  [T, F]

XLA would write the product, 2 F values a token, and read it again.

Persistent CTAs walk over tiles of 128 tokens and 128 columns of the result, which are 256 rows of the
weight: a block of gate and its block of up. Of a CTA's three warpgroups one loads by TMA, and runs ahead into
the next tile; each of the other two multiplies 64 tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.hopper import num_multiprocessors

BLOCK = 128  # columns of gate that alternate with as many of up
_CONSUMERS = 2
_ROWS = 64  # tokens of a warpgroup
_TILE_ROWS = _CONSUMERS * _ROWS
_STEP = 64  # of the sum: 128 bytes
_STAGES = 4
_BUNCH = 16  # tiles of tokens that share weights while the second-level cache has them
_FEWEST_TOKENS = 128  # a tile; below, much of it would be padding
_INTERPRETED_CTAS = 2


def gated_product(
    x: jax.Array, weight: jax.Array, activation: Literal["silu", "gelu_tanh"], *, interpret: bool = False
) -> jax.Array:
    """Multiplies, accumulating in float32, and gates before it rounds.

    Args:
        x: bfloat16 or float16 [T, D].
        weight: [F / 128, 2, 128, D], x's dtype: blocks of gate and of up in turn.
        activation: of the gate.
        interpret: runs in Pallas's interpreter, on any device.

    Returns:
        [T, F] in x's dtype.

    Raises:
        NotImplementedError: for what it does not take, while it is traced.
    """
    _check(x, weight)
    num_ctas = _INTERPRETED_CTAS if interpret else num_multiprocessors()
    tokens, hidden = x.shape
    num_blocks = weight.shape[0]
    rows_of_tiles, steps = pl.cdiv(tokens, _TILE_ROWS), hidden // _STEP
    num_tiles = rows_of_tiles * num_blocks
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def place_of(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A tile's place among those of tokens, and its block. CTAs that run at the same time share both."""
        bunch = lax.div(index, _BUNCH * num_blocks)
        within = lax.rem(index, _BUNCH * num_blocks)
        wide = jnp.minimum(_BUNCH, rows_of_tiles - bunch * _BUNCH)
        return bunch * _BUNCH + lax.rem(within, wide), lax.div(within, wide)

    def body(
        x_ref: Any, w_ref: Any, out_ref: Any, x_smem: Any, w_smem: Any, out_smem: Any, full: Any, free: Any
    ) -> None:
        thread, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        rounds = lax.div(num_tiles - cta + num_ctas - 1, num_ctas)

        @pl.when(thread < _CONSUMERS)
        def _consume() -> None:
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, rounds)
            def _tile(turn):
                row, block = place_of(turn * num_ctas + cta)

                def product(acc_ref: Any) -> jax.Array:
                    @pl.loop(0, steps)
                    def _step(step):
                        at = turn * steps + step
                        slot = lax.rem(at, _STAGES)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(
                            acc_ref,
                            x_smem.at[slot, pl.ds(thread * _ROWS, _ROWS)],
                            w_smem.at[slot].transpose((1, 0)),
                        )
                        plgpu.wgmma_wait(1)  # for the step before
                        pl.when(step > 0)(
                            lambda: plgpu.barrier_arrive(free.at[lax.rem(at + _STAGES - 1, _STAGES)])
                        )

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem((turn + 1) * steps - 1, _STAGES)])
                    return acc_ref[...]

                both = pl.run_scoped(product, plgpu.ACC((_ROWS, 2 * BLOCK), jnp.float32))
                gate, up = both[:, :BLOCK], both[:, BLOCK:]
                result = (_activate(gate, activation) * up).astype(out_ref.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[thread][...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_smem.at[thread],
                    out_ref.at[pl.ds(row * _TILE_ROWS + thread * _ROWS, _ROWS), pl.ds(block * BLOCK, BLOCK)],
                )

            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == _CONSUMERS)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, rounds)
            def _tile(turn):
                row, block = place_of(turn * num_ctas + cta)

                @pl.loop(0, steps)
                def _step(step):
                    at = turn * steps + step
                    slot = lax.rem(at, _STAGES)
                    pl.when(at >= _STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                    summed = pl.ds(step * _STEP, _STEP)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(row * _TILE_ROWS, _TILE_ROWS), summed], x_smem.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[pl.ds(block * 2 * BLOCK, 2 * BLOCK), summed], w_smem.at[slot], full.at[slot]
                    )

            total = rounds * steps

            @pl.loop(jnp.maximum(total - _STAGES, 0), total)
            def _drain(at):
                plgpu.barrier_wait(free.at[lax.rem(at, _STAGES)])

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, num_blocks * BLOCK), x.dtype),
        scratch_types=(
            plgpu.SMEM((_STAGES, _TILE_ROWS, _STEP), x.dtype, transforms=transforms),
            plgpu.SMEM((_STAGES, 2 * BLOCK, _STEP), x.dtype, transforms=transforms),
            plgpu.SMEM((_CONSUMERS, _ROWS, BLOCK), x.dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=_STAGES),
        ),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="gated_product",
    )
    return kernel(x, weight.reshape(num_blocks * 2 * BLOCK, hidden))


def _activate(gate: jax.Array, activation: Literal["silu", "gelu_tanh"]) -> jax.Array:
    match activation:
        case "silu":
            return gate / (1.0 + jnp.exp(-gate))
        case "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * gate * (1.0 + 0.044715 * gate * gate)
            return 0.5 * gate * (1.0 + jnp.tanh(inner))


def _check(x: jax.Array, weight: jax.Array) -> None:
    """Raises NotImplementedError for what the kernel does not take."""
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        raise NotImplementedError(
            f"x is {x.dtype} and weight {weight.dtype}: must both be bfloat16 or float16"
        )
    if weight.shape[1:3] != (2, BLOCK):
        raise NotImplementedError(f"weight is {list(weight.shape)}: must be [F / {BLOCK}, 2, {BLOCK}, D]")
    if x.shape[1] % _STEP:
        raise NotImplementedError(f"{x.shape[1]} columns of x: must be a multiple of {_STEP}")
    if x.shape[0] < _FEWEST_TOKENS or x.shape[0] % 8:  # copies take groups of 8 rows
        raise NotImplementedError(f"{x.shape[0]} tokens: must be a multiple of 8, {_FEWEST_TOKENS} or more")
