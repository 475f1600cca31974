"""Prefill attention on Hopper: chunks of prompts over their paged contexts, as in FlashAttention-3.

A work item is 128 queries of one query head. Persistent CTAs walk over the items, the longest first, in a
snake, so that their sums are nearly equal. Of a CTA's three warpgroups one loads tiles of keys and values by
TMA, page by page; each of the other two owns 64 queries. A barrier between those makes one compute its
softmax while the other has the tensor cores (Shah et al. 2024, section 3.1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import tile
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Launch
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import PrefillWork
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

NUM_CONSUMERS = 2
ITEM_QUERIES = NUM_CONSUMERS * QUERY_TILE


def kv_tile(head_dim: int) -> int:
    """Tokens of context in a tile."""
    return 128 if head_dim <= 128 else 64


def stages_for(head_dim: int) -> int:
    """Tiles in flight, as many as shared memory holds beside the queries."""
    return 3 if head_dim <= 64 else 2


def prefill(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    work: PrefillWork,
    variant: AttentionVariant,
    launch: Launch,
    *,
    stages: int,
) -> jax.Array:
    """Attends with the tokens of rows that have several.

    Args:
        q: ``[tokens, q_heads, head_dim]``.
        kv_pages: ``[num_pages, page_size, 2 * kv_heads, head_dim]``, this step's keys and values included.
        page_table: int32 ``[rows, max_pages]``.
        work: the items.
        variant, launch: see there.
        stages: tiles of keys and values in flight.

    Returns:
        Like q; only tokens of the work's items are written.
    """
    num_tokens, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_pages.shape[1], kv_pages.shape[2] // 2
    group = q_heads // kv_heads
    block = kv_tile(head_dim)
    copies, rows_per_copy = max(1, block // page_size), min(block, page_size)
    padded = jnp.pad(q, ((0, -num_tokens % 8), (0, 0), (0, 0)))  # whole tiles
    tiled = tile.smem_transforms(head_dim, q.dtype)

    def body(
        q_ref, kv_ref, table_ref, tile_row_ref, tile_first_ref, start_ref, count_ref, length_ref, tiles_ref,
        out_ref,
        k_smem, v_smem, unions, k_full, v_full, k_free, v_free, q_full, turn,
    ):  # fmt: skip
        q_smem, plain_smem = unions
        thread = lax.axis_index("warpgroup")
        cta = lax.axis_index("cta")
        num_items = tiles_ref[0] * q_heads
        rounds = lax.div(num_items + launch.num_ctas - 1, launch.num_ctas)

        def for_each_item(run) -> None:
            """Calls ``run(row, first, head, begin, end, done)``: queries from the row's ``first`` on see
            blocks ``begin : end``; ``done`` blocks went before in this CTA. Returns the number of all."""

            def step(index, done):
                forth = index * launch.num_ctas + cta
                back = (index + 1) * launch.num_ctas - 1 - cta
                item = jnp.where(lax.rem(index, 2) == 0, forth, back)
                return lax.cond(item < num_items, lambda: take(item, done), lambda: done)

            def take(item, done):
                which = lax.div(item, q_heads)
                row, first = tile_row_ref[which], tile_first_ref[which]
                before = length_ref[row] - count_ref[row]  # tokens of context before the chunk
                last = jnp.minimum(first + ITEM_QUERIES, count_ref[row])
                end = lax.div(before + last + block - 1, block)
                begin = jnp.int32(0)
                if variant.sliding_window is not None:
                    begin = lax.div(jnp.maximum(before + first - variant.sliding_window + 1, 0), block)
                run(row, first, lax.rem(item, q_heads), begin, end, done)
                return done + end - begin

            return lax.fori_loop(0, rounds, step, jnp.int32(0))

        @pl.when(thread < NUM_CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232 if head_dim <= 128 else 240, action="increase")

            def change_turns() -> None:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def run(row, first, head, begin, end, done):
                length, count = length_ref[row], count_ref[row]
                window_begin = jnp.int32(0)
                if variant.sliding_window is not None:
                    window_begin = length - count + first - variant.sliding_window + 1
                first = first + thread * QUERY_TILE
                token = start_ref[row] + first
                position = length - count + first  # of this warpgroup's first query
                plgpu.copy_gmem_to_smem(
                    q_ref.at[pl.ds(token, QUERY_TILE), head],
                    plain_smem.at[thread],
                    q_full.at[thread],
                    oob_mode=plgpu.OOBFillMode.ZEROS,
                )
                plgpu.barrier_wait(q_full.at[thread])
                tile.swizzle_in_place(plain_smem.at[thread], q_smem.at[thread])
                pl.when(thread == 1)(change_turns)

                def attend(index, carry, *, masked):
                    acc, best, total = carry
                    slot = lax.rem(done + index - begin, stages)
                    start = index * block

                    def scores_of(acc_ref):
                        plgpu.barrier_wait(k_full.at[slot])
                        plgpu.wgmma(acc_ref, q_smem.at[thread], k_smem.at[slot].transpose((1, 0)))
                        change_turns()
                        return acc_ref[...]

                    scores = pl.run_scoped(scores_of, plgpu.ACC((QUERY_TILE, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    scores, unit = tile.capped(scores, variant)
                    if masked:
                        ahead = start - position  # of the block's first key to the first query
                        distance = tile.index_along(scores.shape, 0) - tile.index_along(scores.shape, 1)
                        seen = distance >= ahead
                        if variant.sliding_window is not None:
                            seen &= distance < ahead + variant.sliding_window
                        scores = jnp.where(seen, scores, tile.MASKED)
                    weights, decay, best, total = tile.online_softmax(scores, unit, best, total)
                    acc = acc * tile.spread(decay, acc)
                    weights = weights.astype(q.dtype)
                    acc, best, total, weights = lax.optimization_barrier((acc, best, total, weights))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)
                    if masked:
                        # Of all the CTA's queries, since its warpgroups share the tile.
                        tile.clear_outside(v_smem.at[slot], window_begin - start, length - start)
                    acc = tile.add_product(acc, weights, v_smem.at[slot], launch)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, best, total

                # A block that lies wholly before the first query needs no mask.
                clear = begin if variant.sliding_window is not None else lax.div(position + 1, block)
                clear = jnp.clip(clear, begin, end)
                carry = tile.empty_rows(head_dim)
                carry = lax.fori_loop(begin, clear, lambda i, c: attend(i, c, masked=False), carry)
                acc, _, total = lax.fori_loop(clear, end, lambda i, c: attend(i, c, masked=True), carry)
                pl.when(thread == 0)(change_turns)
                result = (acc / tile.spread(total, acc)).astype(q.dtype)
                left = count - first

                is_tiled = (left >= QUERY_TILE) & (lax.rem(token, 8) == 0)

                @pl.when(is_tiled)
                def _store_tiled():
                    q_smem.at[thread][...] = result
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(q_smem.at[thread], out_ref.at[pl.ds(token, QUERY_TILE), head])
                    plgpu.wait_smem_to_gmem(0)

                @pl.when((left > 0) & jnp.logical_not(is_tiled))
                def _store_plain():  # copies have static sizes: one for each bit of the number of rows
                    plain_smem.at[thread][...] = result
                    plgpu.commit_smem()
                    rows = jnp.minimum(left, QUERY_TILE)
                    for size in (64, 32, 16, 8, 4, 2, 1):

                        @pl.when(rows & size != 0)
                        def _copy(size=size):
                            at = rows & ~(2 * size - 1)
                            plgpu.copy_smem_to_gmem(
                                plain_smem.at[thread, pl.ds(at, size)],
                                out_ref.at[pl.ds(token + at, size), head],
                            )

                    plgpu.wait_smem_to_gmem(0)

            for_each_item(run)

        @pl.when(thread == NUM_CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40 if head_dim <= 128 else 24, action="decrease")

            def run(row, first, head, begin, end, done):
                last_page = lax.div(length_ref[row] - 1, page_size)
                kv_head = lax.div(head, group)

                def fetch(index, carry):
                    at = done + index - begin
                    slot = lax.rem(at, stages)
                    first_page = lax.div(index * block, page_size)
                    pages = [table_ref[row, jnp.minimum(first_page + i, last_page)] for i in range(copies)]
                    offset = lax.rem(index * block, page_size) if page_size > block else 0
                    for smem, full, free, which in ((k_smem, k_full, k_free, 0), (v_smem, v_full, v_free, 1)):
                        pl.when(at >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        for i, page in enumerate(pages):
                            plgpu.copy_gmem_to_smem(
                                kv_ref.at[page, pl.ds(offset, rows_per_copy), 2 * kv_head + which],
                                smem.at[slot, pl.ds(i * rows_per_copy, rows_per_copy)],
                                full.at[slot],
                            )
                    return carry

                lax.fori_loop(begin, end, fetch, None)

            total = for_each_item(run)

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(at):
                plgpu.barrier_wait(k_free.at[lax.rem(at, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(at, stages)])

    ring = plgpu.SMEM((stages, block, head_dim), q.dtype, transforms=tiled)
    queries = (NUM_CONSUMERS, QUERY_TILE, head_dim)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=NUM_CONSUMERS, num_barriers=stages)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(padded.shape, q.dtype),
        scratch_types=(
            ring,
            ring,
            plgpu.RefUnion(plgpu.SMEM(queries, q.dtype, transforms=tiled), plgpu.SMEM(queries, q.dtype)),
            full,
            full,
            free,
            free,
            plgpu.Barrier(num_barriers=NUM_CONSUMERS),
            plgpu.Barrier(num_arrivals=NUM_CONSUMERS),
        ),
        grid=(launch.num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if launch.interpret else None,
        kernel_name="ragged_paged_prefill",
    )
    out = kernel(
        padded, kv_pages, page_table, work.tile_row, work.tile_first, work.start, work.count, work.length,
        work.num_tiles[None],
    )  # fmt: skip
    return out[:num_tokens]
