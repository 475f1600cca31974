"""Prefill attention on Hopper: chunks of prompts over their paged contexts, as in FlashAttention-3.

A work item is 128 queries of one query head. Persistent CTAs walk over the items, the longest first, in a
snake, so that their sums are nearly equal. Of a CTA's three warpgroups one loads tiles of keys and values by
TMA, page by page; each of the other two owns 64 queries. A barrier between those makes one compute its
softmax while the other has the tensor cores (Shah et al. 2024, section 3.1).
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


def operands(work: PrefillWork) -> tuple[jax.Array, ...]:
    """What `roles` reads beside queries, cache and page table."""
    return (
        work.tile_row,
        work.tile_first,
        work.start,
        work.count,
        work.length,
        work.num_tiles[None],
        work.bunch[None],
        work.first_cta[None],
    )


def ring_shape(heads: Heads) -> RingShape:
    """What lies between a CTA's producer and its consumers."""
    return RingShape(heads, kv_tile(heads.head_dim), stages_for(heads.head_dim), 1, NUM_CONSUMERS)


def shared_memory(heads: Heads) -> tuple[tuple[plgpu.GPUMemoryRef, ...], ...]:
    """What lies in shared memory at the same time, and takes turns there: the ring, and then queries or
    outputs, in the order of tensor cores or of rows."""
    transforms = tile.smem_transforms(heads.head_dim, heads.dtype)
    queries = (NUM_CONSUMERS, QUERY_TILE, heads.head_dim)
    ring = ring_shape(heads).memory()
    return (
        (*ring, plgpu.SMEM(queries, heads.dtype, transforms=transforms)),
        (*ring, plgpu.SMEM(queries, heads.dtype)),
    )


def barriers(heads: Heads) -> tuple[plgpu.Barrier, ...]:
    """Those of the ring, the arrival of queries, and whose turn it is."""
    arrival, turn = plgpu.Barrier(num_barriers=NUM_CONSUMERS), plgpu.Barrier(num_arrivals=NUM_CONSUMERS)
    return *ring_shape(heads).barriers(), arrival, turn


def roles(
    tensors: tile.Tensors, work_refs: Sequence[Any], memory: Sequence[Any], barrier_refs: Sequence[Any],
    heads: Heads, variant: AttentionVariant, launch: Launch,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """What a CTA's consumers and producers do to attend with the tokens of rows that have several.

    Args:
        tensors: in device memory; whole tiles of queries.
        work_refs, memory, barrier_refs: as of `operands`, `shared_memory`, `barriers`.
    """
    tile_row_ref, tile_first_ref, start_ref, count_ref, length_ref, tiles_ref, bunch_ref, first_cta_ref = (
        work_refs
    )
    (*ring_memory, q_smem), (*_, plain_smem) = memory
    *ring_barriers, q_full, turn = barrier_refs
    page_size, group, head_dim = heads.page_size, heads.group, heads.head_dim
    q_heads = heads.kv_heads * group
    block = kv_tile(head_dim)
    ring = ring_shape(heads).open(ring_memory, ring_barriers, 0)
    thread = lax.axis_index("warpgroup")
    cta, num_ctas = lax.axis_index("cta") - first_cta_ref[0], launch.num_ctas - first_cta_ref[0]
    num_items = tiles_ref[0] * q_heads
    rounds = lax.div(num_items + num_ctas - 1, num_ctas)

    def place_of(item):
        """An item's tile and head. CTAs that run at the same time read the same keys, while the second-level
        cache has them: of a bunch of tiles in a row, all that need one kv head, then the next head."""
        most = bunch_ref[0]
        bunch, within = lax.div(item, most * q_heads), lax.rem(item, most * q_heads)
        per_head = jnp.minimum(most, tiles_ref[0] - bunch * most) * group
        kv_head, within = lax.div(within, per_head), lax.rem(within, per_head)
        return bunch * most + lax.div(within, group), kv_head * group + lax.rem(within, group)

    def for_each_item(run) -> None:
        """Calls ``run(row, first, head, begin, end, done)``: queries from the row's ``first`` on see
        blocks ``begin : end``; ``done`` blocks went before in this CTA. Returns the number of all."""

        def step(index, done):
            forth = index * num_ctas + cta
            back = (index + 1) * num_ctas - 1 - cta
            item = jnp.where(lax.rem(index, 2) == 0, forth, back)
            return lax.cond((cta >= 0) & (item < num_items), lambda: take(item, done), lambda: done)

        def take(item, done):
            which, head = place_of(item)
            row, first = tile_row_ref[which], tile_first_ref[which]
            before = length_ref[row] - count_ref[row]  # tokens of context before the chunk
            last = jnp.minimum(first + ITEM_QUERIES, count_ref[row])
            end = lax.div(before + last + block - 1, block)
            begin = jnp.int32(0)
            if variant.sliding_window is not None:
                begin = lax.div(jnp.maximum(before + first - variant.sliding_window + 1, 0), block)
            run(row, first, head, begin, end, done)
            return done + end - begin

        return lax.fori_loop(0, rounds, step, jnp.int32(0))

    def consume() -> None:

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
                tensors.q.at[pl.ds(token, QUERY_TILE), head],
                plain_smem.at[thread],
                q_full.at[thread],
                oob_mode=plgpu.OOBFillMode.ZEROS,
            )
            plgpu.barrier_wait(q_full.at[thread])
            tile.swizzle_in_place(plain_smem.at[thread], q_smem.at[thread])
            pl.when(thread == 1)(change_turns)

            def attend(index, carry, *, masked):
                acc, best, total = carry
                number = done + index - begin
                start = index * block

                def scores_of(acc_ref):
                    keys = ring.wait(ring.keys, number)
                    plgpu.wgmma(acc_ref, q_smem.at[thread], keys.transpose((1, 0)))
                    change_turns()
                    return acc_ref[...]

                scores = pl.run_scoped(scores_of, plgpu.ACC((QUERY_TILE, block), jnp.float32))
                ring.release(ring.keys, number)
                scores, unit = tile.capped(ring.scaled(scores, number), variant)
                seen = None
                if masked:
                    ahead = start - position  # of the block's first key to the first query
                    distance = tile.index_along(scores.shape, 0) - tile.index_along(scores.shape, 1)
                    seen = distance >= ahead
                    if variant.sliding_window is not None:
                        seen &= distance < ahead + variant.sliding_window
                    scores = jnp.where(seen, scores, tile.MASKED)
                weights, decay, best, total = tile.online_softmax(scores, unit, best, total)
                acc = acc * tile.spread(decay, acc)
                weights = ring.weighted(weights, number, seen).astype(heads.dtype)
                acc, best, total, weights = lax.optimization_barrier((acc, best, total, weights))
                plgpu.barrier_arrive(turn)
                values = ring.wait(ring.values, number)
                plgpu.barrier_wait(turn)
                if masked:
                    # Of all the CTA's queries, since its warpgroups share the tile.
                    tile.clear_outside(values, window_begin - start, length - start)
                acc = tile.add_product(acc, weights, values, launch)
                ring.release(ring.values, number)
                return acc, best, total

            # A block that lies wholly before the first query needs no mask.
            clear = begin if variant.sliding_window is not None else lax.div(position + 1, block)
            clear = jnp.clip(clear, begin, end)
            carry = tile.empty_rows(head_dim)
            carry = lax.fori_loop(begin, clear, lambda i, c: attend(i, c, masked=False), carry)
            acc, _, total = lax.fori_loop(clear, end, lambda i, c: attend(i, c, masked=True), carry)
            pl.when(thread == 0)(change_turns)
            result = (acc / tile.spread(total, acc)).astype(heads.dtype)
            left = count - first

            is_tiled = (left >= QUERY_TILE) & (lax.rem(token, 8) == 0)

            @pl.when(is_tiled)
            def _store_tiled():
                q_smem.at[thread][...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem.at[thread], tensors.out.at[pl.ds(token, QUERY_TILE), head])
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
                            tensors.out.at[pl.ds(token + at, size), head],
                        )

                plgpu.wait_smem_to_gmem(0)

        for_each_item(run)

    def produce() -> None:
        pl.when(thread == NUM_CONSUMERS)(fetch_items)

    def fetch_items() -> None:

        def run(row, first, head, begin, end, done):
            last_page = lax.div(length_ref[row] - 1, page_size)
            kv_head = lax.div(head, group)

            def fetch(index, carry):
                ring.fetch(done + index - begin, tensors, row, kv_head, index * block, last_page)
                return carry

            lax.fori_loop(begin, end, fetch, None)

        ring.finish(for_each_item(run))

    return consume, produce
