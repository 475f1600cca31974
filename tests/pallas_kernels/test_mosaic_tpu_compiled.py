"""The TPU kernel through the real compiler: every shape that we claim, for every generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import VMEM_LIMIT_BYTES
from jaxserve.platforms.tpu import CHIPS
from tests.support.tpu_compiler import GENERATIONS, compile_on_one, copies_of, needs_libtpu

pytestmark = needs_libtpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One step's attention on one device."""

    tokens: int
    rows: int = 8
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str = ""  # the queries', if not given
    page_size: int = 128
    max_pages: int = 16
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def layout(self) -> KVLayout:
        dtype = jnp.dtype(self.kv_dtype or self.dtype)
        return mosaic_tpu.best_order(KVLayout(self.page_size, self.kv_heads, self.head_dim, dtype))


CLAIMED = [
    Shape(tokens=32, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
    for dtype, kv_dtype in (
        ("bfloat16", ""),
        ("float32", ""),
        ("bfloat16", "int8"),
        ("bfloat16", "float8_e4m3fn"),
    )
    for head_dim in (64, 128, 256)
]
LLAMA_8B: dict[str, Any] = {"rows": 128, "max_pages": 1024, "q_heads": 32, "kv_heads": 8, "head_dim": 128}
LLAMA_1B: dict[str, Any] = LLAMA_8B | {"head_dim": 64}
LLAMA_8B_OF_8: dict[str, Any] = LLAMA_8B | {"q_heads": 4, "kv_heads": 1}
LLAMA_1B_OF_8: dict[str, Any] = LLAMA_8B_OF_8 | {"head_dim": 64}
SERVED = {
    "8b_decode": Shape(tokens=128, **LLAMA_8B),
    "8b_mixed": Shape(tokens=2048, **LLAMA_8B),
    "8b_of_8_decode": Shape(tokens=128, **LLAMA_8B_OF_8),
    "8b_int8_mixed": Shape(tokens=2048, kv_dtype="int8", **LLAMA_8B),
    "8b_of_8_int8_mixed": Shape(tokens=2048, kv_dtype="int8", **LLAMA_8B_OF_8),  # folded
    "1b_of_8_mixed": Shape(tokens=2048, **LLAMA_1B_OF_8),  # packed and folded
    "1b_mixed": Shape(tokens=2048, **LLAMA_1B),
    "gemma2_mixed": Shape(
        tokens=512, q_heads=8, kv_heads=4, head_dim=256, sliding_window=4096, soft_cap=50.0
    ),
}
ODD = {
    "head_dim_96": Shape(tokens=64, head_dim=96),
    "three_heads": Shape(tokens=64, q_heads=9, kv_heads=3),
    "float32_queries_of_one_head": Shape(tokens=64, q_heads=3, kv_heads=1, dtype="float32"),
    "small_pages": Shape(tokens=64, page_size=16, max_pages=64),
    "many_heads": Shape(tokens=512, q_heads=32, kv_heads=32),  # query blocks are cut to fit
    "float32_queries_of_an_int8_cache": Shape(tokens=64, dtype="float32", kv_dtype="int8"),
    "one_int8_head_of_64": Shape(tokens=64, q_heads=3, kv_heads=1, head_dim=64, kv_dtype="int8"),
    "small_folded_pages": Shape(tokens=64, kv_heads=1, kv_dtype="int8", page_size=16, max_pages=64),
    "page_of_one": Shape(tokens=64, page_size=1, max_pages=64),
}


NUM_PAGES = 1000


def compile_for(generation: str, shape: Shape):
    dtype = jnp.dtype(shape.dtype)

    def attend(q, k, v, kv_pages, page_table, kv_lens, cu_q_lens):
        max_q_len = 1 if shape.tokens == shape.rows else shape.tokens
        return ragged_paged_attention(
            q,
            k,
            v,
            kv_pages,
            AttentionMetadata(page_table, kv_lens, cu_q_lens, max_q_len),
            scale=shape.head_dim**-0.5,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            implementation="mosaic_tpu",
        )

    kv = jax.ShapeDtypeStruct((shape.tokens, shape.kv_heads, shape.head_dim), dtype)
    ints = [(shape.rows, shape.max_pages), (shape.rows,), (shape.rows + 1,)]
    return compile_on_one(
        generation,
        attend,
        jax.ShapeDtypeStruct((shape.tokens, shape.q_heads, shape.head_dim), dtype),
        kv,
        kv,
        shape.layout.shapes(NUM_PAGES),
        *(jax.ShapeDtypeStruct(size, jnp.int32) for size in ints),
        donate=3,
    )


def check(generation: str, shape: Shape) -> None:
    compiled = compile_for(generation, shape)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    pool = NUM_PAGES * shape.layout.bytes_per_page()
    assert text.count(f'/{mosaic_tpu.NAME}/pallas_call"') >= 1
    assert copies_of(text, shape.layout.shape(NUM_PAGES)) == []
    if shape.layout.has_scales:
        assert copies_of(text, shape.layout.scales_shape(NUM_PAGES)) == []
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("shape", CLAIMED, ids=lambda shape: f"{shape.layout.dtype}_{shape.head_dim}")
def test_every_claimed_dtype_and_head_compiles(shape: Shape, generation: str) -> None:
    check(generation, shape)


@pytest.mark.parametrize("name", SERVED)
def test_served_shapes_compile_and_write_in_place(name: str) -> None:
    check("v6e", SERVED[name])


@pytest.mark.nightly
@pytest.mark.parametrize("generation", [each for each in GENERATIONS if each != "v6e"])
@pytest.mark.parametrize("name", SERVED)
def test_served_shapes_compile_everywhere(name: str, generation: str) -> None:
    check(generation, SERVED[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_compile(name: str) -> None:
    compile_for("v6e", ODD[name])


def test_the_kernel_asks_for_less_vector_memory_than_any_chip_has() -> None:
    """The compiler refuses a kernel that needs more than it asks for."""
    assert min(chip.vmem_bytes for chip in CHIPS.values()) >= VMEM_LIMIT_BYTES * 4 // 3
