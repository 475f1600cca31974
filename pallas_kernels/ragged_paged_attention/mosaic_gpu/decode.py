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

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import tile
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Heads, Launch
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


def operands(work: DecodeWork) -> tuple[jax.Array, ...]:
    """What `roles` reads beside queries, cache and page table."""
    return work.token, work.length, work.first_tile, work.num_tiles, work.share


def partial_results(heads: Heads, launch: Launch) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What rows that are cut leave for the merge.

    Returns:
        Normalised results, float32 ``[workers, 2, group, head_dim]``, entry 0 of a worker for a row that
        began before its share, and the base-2 logarithms of their weights, ``[workers, 2, group, rounded up
        to 4]``.
    """
    lead = (num_workers(heads.head_dim, launch), 2)
    return (
        jax.ShapeDtypeStruct((*lead, heads.group, heads.head_dim), jnp.float32),
        jax.ShapeDtypeStruct((*lead, _weight_rows(heads)), jnp.float32),
    )


def shared_memory(heads: Heads) -> tuple[tuple[plgpu.GPUMemoryRef, ...], ...]:
    """What lies in shared memory at the same time, and takes turns there: rings of keys and of values, and
    then queries, half a partial result with its weights, or an output."""
    workers, head_dim = workers_per_cta(heads.head_dim), heads.head_dim
    transforms = tile.smem_transforms(head_dim, heads.dtype)
    ring = plgpu.SMEM((workers * stages_for(head_dim), TILE, head_dim), heads.dtype, transforms=transforms)
    return (
        (ring, ring, plgpu.SMEM((workers, TILE, head_dim), heads.dtype, transforms=transforms)),
        (
            ring,
            ring,
            plgpu.SMEM((workers, TILE, head_dim // 2), jnp.float32),
            plgpu.SMEM((workers, TILE), jnp.float32),
        ),
        (ring, ring, plgpu.SMEM((workers, TILE, head_dim), heads.dtype)),
    )


def barriers(heads: Heads) -> tuple[plgpu.Barrier, ...]:
    """Full and free slots of both rings, and the arrival of queries."""
    workers = workers_per_cta(heads.head_dim)
    num_slots = workers * stages_for(heads.head_dim)
    full = plgpu.Barrier(num_arrivals=_copies(heads), num_barriers=num_slots)
    free = plgpu.Barrier(num_barriers=num_slots)
    return full, full, free, free, plgpu.Barrier(num_barriers=workers)


def _copies(heads: Heads) -> int:
    """Pages that make up a tile."""
    return max(1, TILE // heads.page_size)


def _weight_rows(heads: Heads) -> int:
    return -(-heads.group // 4) * 4  # copies are of whole 16 bytes


def roles(
    tensors: tile.Tensors, work_refs: Sequence[Any], parts: Sequence[Any], memory: Sequence[Any],
    barrier_refs: Sequence[Any], heads: Heads, variant: AttentionVariant, launch: Launch,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """What a CTA's consumers and producers do to attend with one query a row.

    Rows' heads that one worker has whole are written to ``tensors.out``, others to ``parts``.

    Args:
        tensors: in device memory.
        work_refs, parts, memory, barrier_refs: as of `operands`, `partial_results`, `shared_memory`,
            `barriers`.
    """
    token_ref, length_ref, first_ref, count_ref, share_ref = work_refs
    part_ref, weight_ref = parts
    (k_smem, v_smem, q_smem), (_, _, half_smem, weight_smem), (_, _, out_smem) = memory
    k_full, v_full, k_free, v_free, q_full = barrier_refs
    q_ref, kv_ref, table_ref, out_ref = tensors
    page_size, kv_heads, group, head_dim = heads.page_size, heads.kv_heads, heads.group, heads.head_dim
    query_rows = -(-group // 8) * 8  # whole tiles of shared memory; those too many are another group's
    copies, stages = _copies(heads), stages_for(head_dim)
    workers = workers_per_cta(head_dim)
    pair = lax.rem(lax.axis_index("warpgroup"), workers)
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

    def consume() -> None:

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
                added = tile.multiply_registers(weights.astype(heads.dtype), v_smem.at[slot], launch)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc * tile.spread(decay, acc) + added, best, total

            acc, best, total = lax.fori_loop(0, num, attend, tile.empty_rows(head_dim))
            acc = acc / tile.spread(total, acc)
            whole = num == blocks

            @pl.when(whole)
            def _finish():
                out_smem.at[pair][...] = acc.astype(heads.dtype)
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
                            weight_smem.at[pair, pl.ds(0, _weight_rows(heads))],
                            weight_ref.at[worker, entry],
                        )
                    plgpu.wait_smem_to_gmem(0)

        for_each_segment(run)

    def produce() -> None:

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

    return consume, produce
