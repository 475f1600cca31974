"""The Hopper kernels: they lower for an H100 on any machine, work is shared out once, the rest is refused."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import Heads
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.work import share_out, tile_out, worker_of
from jaxserve.pallas_kernels.ragged_paged_attention.variant import AttentionVariant
from tests.support.gpu_lowering import lower_for_h100


# Write and merge are Triton kernels, which JAX means to drop.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"max_q_len": 1},
        {"max_q_len": 64},
        {"max_q_len": 64, "heads": (9, 3), "head_dim": 64, "page_size": 16},
        {"max_q_len": 64, "heads": (4, 1), "head_dim": 256, "sliding_window": 512},
        {"max_q_len": 64, "heads": (8, 8), "head_dim": 96, "page_size": 32, "dtype": "float16"},
        {"max_q_len": 64, "heads": (16, 2), "page_size": 256, "soft_cap": 50.0},
        {"max_q_len": 1, "kv_dtype": "int8"},
        {"max_q_len": 64, "heads": (9, 3), "head_dim": 64, "page_size": 32, "kv_dtype": "int8"},
        {"max_q_len": 64, "kv_dtype": "float8_e4m3fn", "sliding_window": 512},
        {"max_q_len": 64, "head_dim": 96, "dtype": "float16", "kv_dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_it_lowers_for_an_h100(options: dict[str, object]) -> None:
    text = lower_for_h100("mosaic_gpu", **options)  # pyright: ignore[reportArgumentType]
    names = r"ragged_paged_(write|merge|prefill_and_decode|prefill|decode)(?=_mosaic_gpu|\b)"
    kernels = set(re.findall(names, text))
    attention = {"decode"} if options["max_q_len"] == 1 else {"prefill_and_decode"}
    if options.get("head_dim") == 256:  # too wide for one kernel
        attention = {"prefill", "decode"}
    assert kernels == {"write", "merge", *attention}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float32"},
            "q is float32 and kv_pages float32: must both be bfloat16 or float16, or kv_pages 8-bit",
        ),
        ({"page_size": 16, "kv_dtype": "int8"}, "page_size=16: must be 32 or more in an 8-bit cache"),
        ({"head_dim": 256, "kv_dtype": "int8"}, "head_dim=256: must be at most 128 in an 8-bit cache"),
        ({"page_size": 24}, "page_size=24: must be a power of two, 8 or more"),
        ({"head_dim": 80}, "head_dim=80: must be a multiple of 32 up to 256"),
        ({"heads": (128, 1)}, "128 query heads a kv head: must be at most 64"),
    ],
)
def test_what_it_does_not_take_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        lower_for_h100("mosaic_gpu", max_q_len=1, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="this machine may have what is refused here")
def test_a_device_that_is_no_hopper_is_refused() -> None:
    q, kv = jnp.zeros((1, 8, 64), jnp.bfloat16), jnp.zeros((1, 8, 64), jnp.bfloat16)
    integers = jnp.zeros(1, jnp.int32)
    metadata = AttentionMetadata(integers[None], integers, jnp.zeros(2, jnp.int32), 1)
    cache = jnp.zeros((2, 16, 16, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="must be an NVIDIA Hopper GPU or newer"):
        ragged_paged_attention(q, kv, kv, cache, metadata, scale=1.0, implementation="mosaic_gpu")


# 4 KiB a token.
HEADS = Heads(
    kv_heads=8,
    group=4,
    head_dim=128,
    page_size=64,
    dtype=jnp.dtype("bfloat16"),
    kv_dtype=jnp.dtype("bfloat16"),
)

step_rows = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 2, 64, 130]), st.integers(0, 900)), min_size=1, max_size=6
)


def metadata_of(rows: list[tuple[int, int]]) -> tuple[AttentionMetadata, list[tuple[int, int]]]:
    """Metadata of rows (tokens, context before them), and (tokens, length) of each."""
    lengths = [(count, count + before if count else 0) for count, before in rows]
    counts = [count for count, _ in lengths]
    return (
        AttentionMetadata(
            jnp.zeros((len(rows), 20), jnp.int32),
            jnp.asarray([length for _, length in lengths], jnp.int32),
            jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            max(*counts, 1),
        ),
        lengths,
    )


@pytest.mark.slow
@given(step_rows, st.sampled_from([1, 3, 16]), st.sampled_from([None, 1, 70]))
def test_decode_tiles_are_shared_out_once_and_evenly(
    rows: list[tuple[int, int]], num_workers: int, window: int | None
) -> None:
    metadata, lengths = metadata_of(rows)
    kv_heads, tile = 3, 64
    work = share_out(
        metadata,
        most_workers=num_workers + 2,
        num_workers=num_workers,
        kv_heads=kv_heads,
        tile=tile,
        sliding_window=window,
    )
    wanted = []  # row, head, tile from the row's first, in line
    for row, (count, length) in enumerate(lengths):
        if count == 1:
            first = 0 if window is None else max(length - window, 0) // tile
            assert int(work.first_tile[row]) == first
            wanted += [(row, head, i) for head in range(kv_heads) for i in range(-(-length // tile) - first)]
    got, shares = [], np.asarray(work.share)
    tiles = np.asarray(work.num_tiles)
    for worker in range(num_workers):
        row, head, at, share = (int(x) for x in shares[:, worker])
        for _ in range(share):
            while at == tiles[row]:  # as the kernel walks
                row, head, at = (row, head + 1, 0) if tiles[row] and head + 1 < kv_heads else (row + 1, 0, 0)
            unit = jnp.int32(len(got))
            assert int(worker_of(unit, work.division[0], work.division[1])) == worker
            got.append((row, head, at))
            at += 1
    assert got == wanted
    own = shares[3, :num_workers]
    assert own.max() - own.min() <= 1
    assert not shares[3, num_workers:].any()


@pytest.mark.slow
@given(step_rows)
def test_prefill_tiles_cover_every_query_once_longest_first(rows: list[tuple[int, int]]) -> None:
    metadata, lengths = metadata_of(rows)
    num_tokens = sum(count for count, _ in lengths) + 5
    work = tile_out(metadata, HEADS, AttentionVariant(scale=1.0), num_tokens=num_tokens, queries=128)
    tiles = list(zip(np.asarray(work.tile_row), np.asarray(work.tile_first), strict=True))
    real = [(int(row), int(first)) for row, first in tiles[: int(work.num_tiles)]]
    wanted = {
        (row, first) for row, (count, _) in enumerate(lengths) if count > 1 for first in range(0, count, 128)
    }
    assert len(real) == len(wanted)
    assert set(real) == wanted
    seen = [lengths[row][1] - lengths[row][0] + first for row, first in real]
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(
    ("rows", "window", "bunch"),
    [
        ([(128, 6016)], None, 1),  # 24 MiB of keys and values in all
        ([(128, 6017)], None, 8),
        ([(128, 3000), (128, 3000), (1, 90000)], None, 1),  # none of the chunks' rows has more
        ([(128, 90000)], 4096, 1),
    ],
)
def test_items_go_by_length_while_a_context_stays_in_the_cache(
    rows: list[tuple[int, int]], window: int | None, bunch: int
) -> None:
    metadata, _ = metadata_of(rows)
    variant = AttentionVariant(scale=1.0, sliding_window=window)
    assert int(tile_out(metadata, HEADS, variant, num_tokens=512, queries=128).bunch) == bunch
