"""Prefill and decode overlap on a TPU core: pages of single tokens arrive under the products of chunks.

A core runs one thing at a time, so the order of items decides (POD-Attention on TPUs). The simulator's log of
copies says which KV blocks are on their way while which others are computed.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu, mosaic_tpu_work
from jaxserve.pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.arg_specs import ArgSpec
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_work import WorkList
from tests.support.attention_inputs import make_step
from tests.support.implementations import small_blocks
from tests.support.tpu_interpreter import simulated_tpu

DEPTH, QUERY_TOKENS, KV_BLOCK_TOKENS = 3, 8, 32  # of `small_blocks`
# Two chunks of three query blocks each, and two single tokens, of a KV block each, for every one of those.
SPEC = ArgSpec(name="pod", rows=(*((1, length) for length in range(20, 32)), (24, 24), (24, 70)))


class Log:
    """What the simulated kernel did, in order: ("start" or "wait", semaphore)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        patch.setattr(simulator, "dma_start", self._logged("start", simulator.dma_start, argument=9))
        patch.setattr(simulator, "dma_wait", self._logged("wait", simulator.dma_wait, argument=3))

    def _logged(self, what, original, argument):
        @functools.wraps(original)
        def call(*args, **kwargs):
            self.events.append((what, int(args[argument])))
            return original(*args, **kwargs)

        return call

    def blocks_in_flight(self) -> list[set[int]]:
        """For each KV block, those that are computed while its pages are on their way.

        Semaphores are numbered as the kernel lists them: pages, queries, outputs, and that of the write,
        which is used first.
        """
        pages = range(self.events[0][1] - 2 * DEPTH - 2, self.events[0][1] - DEPTH - 2)
        starts, ends = self._runs("start", pages), self._runs("wait", pages)
        assert len(starts) == len(ends)
        return [
            {other for other in range(block) if begins < ends[other][1]}
            for block, (begins, _) in enumerate(starts)
        ]

    def _runs(self, what: str, semaphores: range) -> list[tuple[int, int]]:
        """First and last event of each KV block: its pages share a semaphore, the next block has another."""
        runs: list[list[int]] = []
        last = -1
        for index, (kind, semaphore) in enumerate(self.events):
            if kind != what or semaphore not in semaphores:
                continue
            if semaphore != last:
                runs.append([])
            runs[-1].append(index)
            last = semaphore
        return [(run[0], run[-1]) for run in runs]


def share_under_chunks(monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the single tokens' KV blocks, how many are on their way while a chunk's block is computed."""
    monkeypatch.setattr(mosaic_tpu, "choose_blocks", small_blocks)
    _, (q, k, v, pages), metadata = make_step(SPEC, jnp.dtype("float32"))
    work = mosaic_tpu_work.make_work(metadata, q.shape[0], QUERY_TOKENS)
    is_chunk: list[bool] = []
    for row, first in zip(
        work.row[: work.count[0]].tolist(), work.first[: work.count[0]].tolist(), strict=True
    ):
        count, length = SPEC.rows[row]
        end = length - count + min(first + QUERY_TOKENS, count)
        is_chunk += [count > 1] * -(-end // KV_BLOCK_TOKENS)
    with monkeypatch.context() as patch, simulated_tpu():
        log = Log(patch)
        out, _ = ragged_paged_attention(q, k, v, pages, metadata, scale=0.1, implementation="mosaic_tpu")
        assert np.isfinite(np.asarray(out)).all()
    computed = log.blocks_in_flight()
    assert len(computed) == len(is_chunk)
    singles = [block for block, chunk in enumerate(is_chunk) if not chunk]
    assert len(singles) == 12
    return sum(any(is_chunk[other] for other in computed[block]) for block in singles) / len(singles)


def chunks_first(singles: WorkList, chunks: WorkList, capacity: int) -> WorkList:
    item = jnp.arange(capacity, dtype=jnp.int32)
    num_chunks = chunks.count[0]
    is_chunk = item < num_chunks
    of_chunks = jnp.minimum(item, chunks.row.shape[0] - 1)
    of_singles = jnp.clip(item - num_chunks, 0, singles.row.shape[0] - 1)
    return WorkList(
        jnp.where(is_chunk, chunks.row[of_chunks], singles.row[of_singles]),
        jnp.where(is_chunk, chunks.first[of_chunks], singles.first[of_singles]),
        singles.count + chunks.count,
    )


def test_pages_of_single_tokens_arrive_under_the_products_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_under_chunks(monkeypatch) == 1.0


def test_in_sorted_order_they_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks first: only the tokens that the ring reaches ahead for are fetched under products."""
    monkeypatch.setattr(mosaic_tpu_work, "_spread", chunks_first)
    assert share_under_chunks(monkeypatch) == (DEPTH - 1) / 12
