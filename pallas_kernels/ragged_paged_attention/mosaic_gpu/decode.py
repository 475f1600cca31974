"""Decode attention on Hopper: one token a row, all contexts cut into equal shares for the tensor cores.

A *tile* is 64 tokens of one row's context for one kv head. All tiles of a step stand in one line, row by row,
head by head; every *worker* gets the same number of neighbours (Stream-K, Osama et al. 2023, section 4.1).
A row's head whose tiles lie with one worker is finished there. One that is cut is left as partial results,
which `jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.merge` puts together.

    tiles    | row 0, head 0 ... | row 0, head 1 ... | row 1, head 0 . | row 1, head 1 . |
    workers  |     0     |     1     |     2     |     3     |     4     |     5     |
    partial    last->ws    ws<-first-last->ws ...

A CTA has two workers, each of two warpgroups: a producer, whose one thread keeps a ring of tiles full by TMA,
page by page, and a consumer. The consumer's tensor-core tile has 64 query rows, of which a group of query
heads fills a few: that costs a quarter of the tensor cores' time while memory is the limit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import tile
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Launch
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import DecodeWork
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

TILE = 64  # tokens of context


def stages_for(head_dim: int) -> int:
    """Tiles in a worker's ring, as many as shared memory holds."""
    return 3


def workers_per_cta(head_dim: int) -> int:
    """Two hide each other's waits; with wide heads the registers of a CTA are enough for one."""
    return 2 if head_dim <= 128 else 1


def num_workers(head_dim: int, launch: Launch) -> int:
    """Workers of the whole grid."""
    return launch.num_ctas * workers_per_cta(head_dim)


def decode(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    work: DecodeWork,
    variant: AttentionVariant,
    launch: Launch,
    *,
    stages: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends with one query a row.

    Args:
        q: ``[tokens, q_heads, head_dim]``.
        kv_pages: ``[num_pages, page_size, 2 * kv_heads, head_dim]``, this step's keys and values included.
        page_table: int32 ``[rows, max_pages]``.
        work: which tiles each worker has.
        variant, launch: see there.
        stages: tiles in a worker's ring.

    Returns:
        ``out`` like q, written where one worker had a whole row's head; normalised partial results, float32
        ``[workers, 2, group, head_dim]``, entry 0 of a worker for a row that began before its share; and the
        base-2 logarithms of their weights, float32 ``[workers, 2, group, rounded up to 4]``.
    """
    _, q_heads, head_dim = q.shape
    page_size, kv_heads = kv_pages.shape[1], kv_pages.shape[2] // 2
    group = q_heads // kv_heads
    query_rows = -(-group // 8) * 8  # whole tiles of shared memory; those too many are another group's
    weight_rows = -(-group // 4) * 4  # copies are of whole 16 bytes
    copies = max(1, TILE // page_size)
    workers = workers_per_cta(head_dim)
    tiled = tile.smem_transforms(head_dim, q.dtype)

    def body(
        q_ref, kv_ref, table_ref, token_ref, length_ref, first_ref, count_ref, share_ref,
        out_ref, part_ref, weight_ref,
        k_smem, v_smem, unions, weight_smem, k_full, v_full, k_free, v_free, q_full,
    ):  # fmt: skip
        q_smem, half_smem, out_smem = unions
        thread = lax.axis_index("warpgroup")
        pair = lax.rem(thread, workers)
        worker = lax.axis_index("cta") * workers + pair

        def for_each_segment(run) -> None:
            """Calls ``run(row, head, block, num, blocks, done)`` for each row's head in this worker's share:
            tiles ``block : block + num`` of the row's ``blocks``, after ``done`` tiles of the share."""
            share = share_ref[3, worker]

            def step(carry):
                done, row, head, block = carry
                blocks = count_ref[row]
                num = jnp.minimum(blocks - block, share - done)
                pl.when(num > 0)(lambda: run(row, head, block, num, blocks, done))
                row_is_done = (head == kv_heads - 1) | (blocks == 0)
                return (
                    done + num,
                    jnp.where(row_is_done, row + 1, row),
                    jnp.where(row_is_done, 0, head + 1),
                    jnp.int32(0),
                )

            start = (jnp.int32(0), share_ref[0, worker], share_ref[1, worker], share_ref[2, worker])
            lax.while_loop(lambda carry: carry[0] < share, step, start)

        def place(slot):
            return pair * stages + slot

        @pl.when(thread < workers)
        def _consume():
            plgpu.set_max_registers(208 if workers == 2 else 240, action="increase")

            def run(row, head, block, num, blocks, done):
                token, length, first = token_ref[row], length_ref[row], first_ref[row]
                plgpu.copy_gmem_to_smem(
                    q_ref.at[token, pl.ds(head * group, query_rows)],
                    out_smem.at[pair, pl.ds(0, query_rows)],
                    q_full.at[pair],
                    oob_mode=plgpu.OOBFillMode.ZEROS,  # the last group's rows too many
                )
                plgpu.barrier_wait(q_full.at[pair])
                tile.swizzle_in_place(out_smem.at[pair], q_smem.at[pair])

                def attend(index, carry):
                    acc, best, total = carry
                    slot = place(lax.rem(done + index, stages))
                    start = (first + block + index) * TILE

                    def scores_of(acc_ref):
                        plgpu.barrier_wait(k_full.at[slot])
                        plgpu.wgmma(acc_ref, q_smem.at[pair], k_smem.at[slot].transpose((1, 0)))
                        return acc_ref[...]

                    scores = pl.run_scoped(scores_of, plgpu.ACC((QUERY_TILE, TILE), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    scores, unit = tile.capped(scores, variant)
                    position = start + tile.index_along(scores.shape, 1)
                    seen = position < length
                    if variant.sliding_window is not None:
                        seen &= position >= length - variant.sliding_window
                    scores = jnp.where(seen, scores, tile.MASKED)
                    weights, decay, best, total = tile.online_softmax(scores, unit, best, total)
                    plgpu.barrier_wait(v_full.at[slot])
                    window_begin = 0 if variant.sliding_window is None else length - variant.sliding_window
                    tile.clear_outside(v_smem.at[slot], window_begin - start, length - start)
                    added = tile.multiply_registers(weights.astype(q.dtype), v_smem.at[slot], launch)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc * tile.spread(decay, acc) + added, best, total

                acc, best, total = lax.fori_loop(0, num, attend, tile.empty_rows(head_dim))
                acc = acc / tile.spread(total, acc)
                whole = num == blocks

                @pl.when(whole)
                def _finish():
                    out_smem.at[pair][...] = acc.astype(q.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[pair, pl.ds(0, group)],
                        out_ref.at[token, pl.ds(head * group, group)],
                    )
                    plgpu.wait_smem_to_gmem(0)

                @pl.when(jnp.logical_not(whole))
                def _leave_partial():
                    entry = jnp.where(block == 0, 1, 0)
                    weight_smem.at[pair][...] = best + jnp.log2(total)
                    for half in range(2):
                        columns = slice(half * head_dim // 2, (half + 1) * head_dim // 2)
                        half_smem.at[pair][...] = acc[:, columns]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            half_smem.at[pair, pl.ds(0, group)],
                            part_ref.at[worker, entry, :, pl.ds(columns.start, head_dim // 2)],
                        )
                        if half == 0:
                            plgpu.copy_smem_to_gmem(
                                weight_smem.at[pair, pl.ds(0, weight_rows)],
                                weight_ref.at[worker, entry],
                            )
                        plgpu.wait_smem_to_gmem(0)

            for_each_segment(run)

        @pl.when(thread >= workers)
        def _produce():
            plgpu.set_max_registers(40 if workers == 2 else 24, action="decrease")

            def run(row, head, block, num, blocks, done):
                length, first = length_ref[row], first_ref[row]
                last_page = lax.div(length - 1, page_size)

                def fetch(index, _):
                    slot = place(lax.rem(done + index, stages))
                    start = (first + block + index) * TILE
                    columns = [jnp.minimum(lax.div(start, page_size) + i, last_page) for i in range(copies)]
                    pages = [table_ref[row, column] for column in columns]
                    rows_per_copy = min(TILE, page_size)
                    within = pl.ds(lax.rem(start, page_size) if page_size > TILE else 0, rows_per_copy)
                    for smem, full, free, which in ((k_smem, k_full, k_free, 0), (v_smem, v_full, v_free, 1)):
                        pl.when(done + index >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        for i, page in enumerate(pages):
                            plgpu.copy_gmem_to_smem(
                                kv_ref.at[page, within, 2 * head + which],
                                smem.at[slot, pl.ds(i * rows_per_copy, rows_per_copy)],
                                full.at[slot],
                            )
                    return _

                lax.fori_loop(0, num, fetch, None)

            for_each_segment(run)
            share = share_ref[3, worker]

            @pl.loop(jnp.maximum(share - stages, 0), share)
            def _drain(done):
                slot = place(lax.rem(done, stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    ring = (workers * stages, TILE, head_dim)
    num_slots = workers * stages
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_workers(head_dim, launch), 2, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_workers(head_dim, launch), 2, weight_rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM(ring, q.dtype, transforms=tiled),
            plgpu.SMEM(ring, q.dtype, transforms=tiled),
            plgpu.RefUnion(
                plgpu.SMEM((workers, TILE, head_dim), q.dtype, transforms=tiled),
                plgpu.SMEM((workers, TILE, head_dim // 2), jnp.float32),
                plgpu.SMEM((workers, TILE, head_dim), q.dtype),
            ),
            plgpu.SMEM((workers, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=num_slots),
            plgpu.Barrier(num_arrivals=copies, num_barriers=num_slots),
            plgpu.Barrier(num_barriers=num_slots),
            plgpu.Barrier(num_barriers=num_slots),
            plgpu.Barrier(num_barriers=workers),
        ),
        grid=(launch.num_ctas,),
        grid_names=("cta",),
        num_threads=2 * workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if launch.interpret else None,
        kernel_name="ragged_paged_decode",
    )
    return kernel(
        q, kv_pages, page_table, work.token, work.length, work.first_tile, work.num_tiles, work.share
    )
