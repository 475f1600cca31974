"""The attention kernel on Hopper: decodes, chunks of prompts, or both at once.

In a mixed batch some CTAs decode, which takes bandwidth, while the others prefill, which takes tensor cores:
POD-Attention (Kamath et al., ASPLOS 2025), where both kinds share a multiprocessor; here they share the chip.
How many do which is decided on the device, for every step (`work.divide`). Where that does not pay, all CTAs
decode first and prefill then.

    CTA       0 ......... d-1  d ............... 131       0 ..................... 131
    together  | decode       | | prefill           |       | decode ............... |
                                                    apart  | prefill .............. |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import decode, prefill
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import Heads, Launch, Tensors, heads_of
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import DecodeWork, PrefillWork
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant


def can_mix(head_dim: int) -> bool:
    """Whether one kernel can do both: for wide heads there are too few registers."""
    return head_dim <= 128


def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,
    decodes: DecodeWork | None,
    prefills: PrefillWork | None,
    variant: AttentionVariant,
    launch: Launch,
) -> tuple[jax.Array, ...]:
    """Runs the kernel.

    Args:
        q: ``[tokens, q_heads, head_dim]``.
        kv_pages: ``[num_pages, page_size, 2 * kv_heads, head_dim]``, this step's keys and values included.
        scales: float32 ``[num_pages, 2 * kv_heads, page_size]``, of an 8-bit cache.
        page_table: int32 ``[rows, max_pages]``.
        decodes: rows of one token.
        prefills: rows of several.

    Returns:
        The output, like q: tokens of rows that have several, and of rows' heads that one decode worker had
        whole; then, with decodes, what is left of the others (`decode.partial_results`).
    """
    tokens = q.shape[0]
    heads = heads_of(q, kv_pages)
    operands: list[jax.Array] = [q, kv_pages, page_table, *([] if scales is None else [scales])]
    of_prefills = () if prefills is None else prefill.operands(prefills)
    of_decodes = () if decodes is None else decode.operands(decodes)
    out_types: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    memory: list[Any] = []
    barriers: list[Any] = []
    if prefills is not None:
        operands[0] = jnp.pad(q, ((0, -tokens % 8), (0, 0), (0, 0)))  # whole tiles
        out_types[0] = jax.ShapeDtypeStruct(operands[0].shape, q.dtype)
        memory += prefill.shared_memory(heads)
        barriers += prefill.barriers(heads)
    if decodes is not None:
        out_types += decode.partial_results(heads, launch)
        memory += decode.shared_memory(heads)
        barriers += decode.barriers(heads)
    num_consumers = prefill.NUM_CONSUMERS if prefills is not None else decode.workers_per_cta(heads.head_dim)
    num_warpgroups = 2 * num_consumers if decodes is not None else num_consumers + 1

    def body(*refs: Any) -> None:
        left = iter(refs)

        def take(count: int) -> list[Any]:
            return list(itertools.islice(left, count))

        q_ref, kv_ref, table_ref = take(3)
        scales_ref = None if scales is None else next(left)
        prefill_work, decode_work = take(len(of_prefills)), take(len(of_decodes))
        out_ref, *parts = take(len(out_types))
        groups = iter(tuple(next(left)))
        tensors = Tensors(q_ref, kv_ref, scales_ref, table_ref, out_ref)
        roles = []
        if prefills is not None:
            refs_of = prefill_work, [next(groups) for _ in prefill.shared_memory(heads)]
            own = take(len(prefill.barriers(heads)))
            roles.append(prefill.roles(tensors, *refs_of, own, heads, variant, launch))
        if decodes is not None:
            refs_of = decode_work, parts, [next(groups) for _ in decode.shared_memory(heads)]
            own = take(len(decode.barriers(heads)))
            # First, where a CTA does both: others wait for what is left of cut rows.
            roles.insert(0, decode.roles(tensors, *refs_of, own, heads, variant, launch))
        few, many = _registers(num_warpgroups, heads)
        (changeover,) = take(1)
        thread = lax.axis_index("warpgroup")

        def play(parts_of_one: list[Callable[[], None]]) -> None:
            first, *others = parts_of_one
            first()
            for act in others:  # in the same shared memory
                plgpu.barrier_arrive(changeover)
                plgpu.barrier_wait(changeover)
                act()

        @pl.when(thread < num_consumers)
        def _consume() -> None:
            plgpu.set_max_registers(many, action="increase")
            play([consume for consume, _ in roles])

        @pl.when(thread >= num_consumers)
        def _produce() -> None:
            plgpu.set_max_registers(few, action="decrease")
            play([produce for _, produce in roles])

    kinds = [name for name, work in (("prefill", prefills), ("decode", decodes)) if work is not None]
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_types),
        scratch_types=(plgpu.RefUnion(*memory), *barriers, plgpu.Barrier(num_arrivals=num_warpgroups)),
        grid=(launch.num_ctas,),
        grid_names=("cta",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if launch.interpret else None,
        kernel_name="ragged_paged_" + "_and_".join(kinds),
    )
    out, *parts = kernel(*operands, *of_prefills, *of_decodes)
    return out[:tokens], *parts


def _registers(num_warpgroups: int, heads: Heads) -> tuple[int, int]:
    """Of a producer's and of a consumer's threads."""
    if heads.is_coded:  # producers hold the codes that they convert
        return (56, 200) if num_warpgroups == 4 else (56, 224)
    if num_warpgroups == 4:
        return 40, 216
    return (40, 232) if heads.head_dim <= 128 else (24, 240)
