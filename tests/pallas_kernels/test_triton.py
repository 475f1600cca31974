"""The kernel for older GPUs: it lowers on any machine, and refuses what it does not take."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.triton import _query_blocks
from tests.support.gpu_lowering import lower_for_h100


# JAX means to drop Triton.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"max_q_len": 1},
        {"max_q_len": 64},
        {"max_q_len": 64, "heads": (9, 3), "head_dim": 64, "page_size": 16, "dtype": "float32"},
        {"max_q_len": 64, "heads": (4, 1), "head_dim": 256, "sliding_window": 512},
        {"max_q_len": 64, "heads": (8, 8), "head_dim": 96, "page_size": 24, "dtype": "float16"},
        {"max_q_len": 64, "heads": (28, 4), "page_size": 256, "soft_cap": 50.0},
        {"max_q_len": 64, "kv_dtype": "int8"},
    ],
    ids=str,
)
def test_it_lowers_for_a_gpu(options: dict[str, object]) -> None:
    text = lower_for_h100("triton", **options)  # pyright: ignore[reportArgumentType]
    assert set(re.findall(r"ragged_paged_(write|attend|decode|prefill)\b", text)) == {"write", "attend"}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="this machine has what is refused here")
def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="head_dim=288: must be at most 256"):
        lower_for_h100("triton", max_q_len=1, head_dim=288)
    with pytest.raises(NotImplementedError, match="of 8-bit types it must be int8"):
        lower_for_h100("triton", max_q_len=1, kv_dtype="float8_e4m3fn")
    q = kv = jnp.zeros((1, 8, 64), jnp.bfloat16)
    integers = jnp.zeros(1, jnp.int32)
    metadata = AttentionMetadata(integers[None], integers, jnp.zeros(2, jnp.int32), 1)
    cache = jnp.zeros((2, 16, 16, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="must be an NVIDIA Ampere GPU or newer"):
        ragged_paged_attention(q, kv, kv, cache, metadata, scale=1.0, implementation="triton")


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 3, 16, 17, 40]), st.integers(0, 90)), min_size=1, max_size=6
    ),
    st.integers(0, 5),
    st.sampled_from([1, 4, 16]),
)
def test_blocks_cover_every_token_once(rows: list[tuple[int, int]], padding: int, size: int) -> None:
    counts = [count for count, _ in rows]
    starts = jnp.cumsum(jnp.asarray([0, *counts], jnp.int32))
    lengths = jnp.asarray([count + before if count else 0 for count, before in rows], jnp.int32)
    num_tokens = max(1, sum(counts) + padding)
    metadata = AttentionMetadata(jnp.zeros((len(rows), 9), jnp.int32), lengths, starts, num_tokens)
    blocks = _query_blocks(metadata, num_tokens, size)
    got = [
        (int(row), int(token) + i, int(position) + i)
        for row, token, count, position in zip(*blocks, strict=True)
        for i in range(int(count))
    ]
    want = [
        (row, int(starts[row]) + i, before + i)
        for row, (count, before) in enumerate(rows)
        for i in range(count)
    ]
    assert got == want
