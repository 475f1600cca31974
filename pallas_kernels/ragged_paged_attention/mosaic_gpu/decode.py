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
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.ring import RingShape
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import QUERY_TILE, Heads, Launch
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import DecodeWork
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant

TILE = 64  # tokens of context
_STAGES = 3  # tiles on their way to a worker, as many as shared memory holds


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


def ring_shape(heads: Heads) -> RingShape:
    """What lies between a worker's two warpgroups."""
    return RingShape(heads, TILE, _STAGES, workers_per_cta(heads.head_dim), num_consumers=1)


def shared_memory(heads: Heads) -> tuple[tuple[plgpu.GPUMemoryRef, ...], ...]:
    """What lies in shared memory at the same time, and takes turns there: the rings, and then queries, half a
    partial result with its weights, or an output."""
    workers, head_dim = workers_per_cta(heads.head_dim), heads.head_dim
    transforms = tile.smem_transforms(head_dim, heads.dtype)
    rings = ring_shape(heads).memory()
    return (
        (*rings, plgpu.SMEM((workers, TILE, head_dim), heads.dtype, transforms=transforms)),
        (
            *rings,
            plgpu.SMEM((workers, TILE, head_dim // 2), jnp.float32),
            plgpu.SMEM((workers, TILE), jnp.float32),
        ),
        (*rings, plgpu.SMEM((workers, TILE, head_dim), heads.dtype)),
    )


def barriers(heads: Heads) -> tuple[plgpu.Barrier, ...]:
    """Those of the rings, and the arrival of queries."""
    return *ring_shape(heads).barriers(), plgpu.Barrier(num_barriers=workers_per_cta(heads.head_dim))


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
    (*ring_memory, q_smem), (*_, half_smem, weight_smem), (*_, out_smem) = memory
    *ring_barriers, q_full = barrier_refs
    kv_heads, group, head_dim = heads.kv_heads, heads.group, heads.head_dim
    query_rows = -(-group // 8) * 8  # whole tiles of shared memory; those too many are another group's
    workers = workers_per_cta(head_dim)
    pair = lax.rem(lax.axis_index("warpgroup"), workers)
    worker = lax.axis_index("cta") * workers + pair
    ring = ring_shape(heads).open(ring_memory, ring_barriers, pair)

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

    def consume() -> None:

        def run(row, head, block, num, blocks, done):
            token, length, first = token_ref[row], length_ref[row], first_ref[row]
            plgpu.copy_gmem_to_smem(
                tensors.q.at[token, pl.ds(head * group, query_rows)],
                out_smem.at[pair, pl.ds(0, query_rows)],
                q_full.at[pair],
                oob_mode=plgpu.OOBFillMode.ZEROS,  # the last group's rows too many
            )
            plgpu.barrier_wait(q_full.at[pair])
            tile.swizzle_in_place(out_smem.at[pair], q_smem.at[pair])

            def attend(index, carry):
                acc, best, total = carry
                number = done + index
                start = (first + block + index) * TILE

                def scores_of(acc_ref):
                    keys = ring.wait(ring.keys, number)
                    plgpu.wgmma(acc_ref, q_smem.at[pair], keys.transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((QUERY_TILE, TILE), jnp.float32))
                ring.release(ring.keys, number)
                scores, unit = tile.capped(ring.scaled(scores, number), variant)
                position = start + tile.index_along(scores.shape, 1)
                seen = position < length
                if variant.sliding_window is not None:
                    seen &= position >= length - variant.sliding_window
                scores = jnp.where(seen, scores, tile.MASKED)
                weights, decay, best, total = tile.online_softmax(scores, unit, best, total)
                weights = ring.weighted(weights, number, seen).astype(heads.dtype)
                values = ring.wait(ring.values, number)
                window_begin = 0 if variant.sliding_window is None else length - variant.sliding_window
                tile.clear_outside(values, window_begin - start, length - start)
                added = tile.multiply_registers(weights, values, launch)
                ring.release(ring.values, number)
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
                    tensors.out.at[token, pl.ds(head * group, group)],
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
            last_page = lax.div(length - 1, heads.page_size)

            def fetch(index, carry):
                start = (first + block + index) * TILE
                ring.fetch(done + index, tensors, row, head, start, last_page)
                return carry

            lax.fori_loop(0, num, fetch, None)

        for_each_segment(run)
        ring.finish(share_ref[3, worker])

    return consume, produce
