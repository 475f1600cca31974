"""The TPU kernel through the real compiler: every shape that we claim, for every generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu
from jaxserve.pallas_kernels.ragged_paged_attention.api import (
    AttentionMetadata,
    Implementation,
    ragged_paged_attention,
)
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import VMEM_LIMIT_BYTES
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import LANES
from jaxserve.platforms.tpu import CHIPS
from jaxserve.runner.ahead_of_time import aliased_parameters, copies_of, read_instructions
from tests.support.tpu_compiler import GENERATIONS, lower_on_one, needs_libtpu

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
    is_ordered: bool = True  # as the kernel reads best

    @property
    def layout(self) -> KVLayout:
        dtype = jnp.dtype(self.kv_dtype or self.dtype)
        plain = KVLayout(self.page_size, self.kv_heads, self.head_dim, dtype)
        return mosaic_tpu.best_order(plain) if self.is_ordered else plain

    @property
    def is_decode(self) -> bool:
        return self.tokens == self.rows


# Eight rows: of one token each in a decode step, of some in a mixed one.
CLAIMED = [
    Shape(tokens=tokens, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)
    for tokens in (8, 32)
    for dtype, kv_dtype in (
        ("bfloat16", ""),
        ("float32", ""),
        ("bfloat16", "int8"),
        ("bfloat16", "float8_e4m3fn"),
    )
    for head_dim in (64, 96, 128, 256)
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
    "head_dim_80": Shape(tokens=64, head_dim=80),
    "head_dim_112": Shape(tokens=64, head_dim=112, kv_dtype="int8"),
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


def lower_for(generation: str, shape: Shape, implementation: Implementation = "mosaic_tpu"):
    dtype = jnp.dtype(shape.dtype)

    def attend(q, k, v, kv_pages, page_table, kv_lens, cu_q_lens):
        max_q_len = 1 if shape.is_decode else shape.tokens
        return ragged_paged_attention(
            q,
            k,
            v,
            kv_pages,
            AttentionMetadata(page_table, kv_lens, cu_q_lens, max_q_len),
            scale=shape.head_dim**-0.5,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            implementation=implementation,
            platform="tpu",
        )

    kv = jax.ShapeDtypeStruct((shape.tokens, shape.kv_heads, shape.head_dim), dtype)
    ints = [(shape.rows, shape.max_pages), (shape.rows,), (shape.rows + 1,)]
    return lower_on_one(
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
    """It compiles, copies nothing of its cache and writes it in place.

    Rows of a width that is no multiple of 128 lanes XLA stores another way round than the kernel reads them:
    it turns them around before the kernel, and back after it.
    """
    compiled = lower_for(generation, shape).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert f'/{mosaic_tpu.NAME}/pallas_call"' in text
    shapes: list[tuple[int, ...]] = [shape.layout.shape(NUM_PAGES)]
    if shape.layout.has_scales:
        shapes.append(shape.layout.scales_shape(NUM_PAGES))
    assert len(aliased_parameters(text)) == len(shapes), "each array of the cache is written over"
    copies = copies_of(read_instructions(text), shapes)
    if shapes[0][-1] % LANES:
        assert len(copies) == 2
    else:
        assert copies == []
        assert memory.temp_size_in_bytes < NUM_PAGES * shape.layout.bytes_per_page()


def name_of(shape: Shape) -> str:
    step = "decode" if shape.is_decode else "mixed"
    return f"{shape.dtype}_{shape.kv_dtype or shape.dtype}_{shape.head_dim}_{step}"


@pytest.mark.parametrize("shape", CLAIMED, ids=name_of)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_claimed_dtype_and_head_compiles(generation: str, shape: Shape) -> None:
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
    lower_for("v6e", ODD[name]).compile()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [8, 32])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_xla_copies_no_cache_on_a_tpu_either(generation: str, tokens: int, kv_dtype: str) -> None:
    """What `auto` falls back to, and what the kernel is compared with on a chip."""
    shape = Shape(tokens=tokens, kv_dtype=kv_dtype)
    text = lower_for(generation, shape, "xla").compile().as_text()
    assert "tpu_custom_call" not in text
    assert copies_of(read_instructions(text), [shape.layout.shape(NUM_PAGES)]) == []
    assert len(aliased_parameters(text)) == 1 + shape.layout.has_scales


REFUSED = {
    "head_dim=32: needs 64 to 128, or 256": Shape(tokens=32, head_dim=32),
    "head_dim=192: needs 64 to 128, or 256": Shape(tokens=32, head_dim=192),
    r"page_table is \[8, 32768\], 1048576 bytes: scalar memory has room for 524288": Shape(
        tokens=32, max_pages=32768
    ),
    "128 kv heads of 256 bfloat16, pages of 128 tokens: the smallest blocks need": Shape(
        tokens=32, q_heads=128, kv_heads=128, head_dim=256
    ),
    "q is float16: needs bfloat16 or float32": Shape(tokens=32, dtype="float16"),
    "folds=4: must divide page_size=2": Shape(
        tokens=32, kv_heads=1, head_dim=64, kv_dtype="int8", page_size=2, is_ordered=False
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_auto_leaves_to_xla_what_the_kernel_refuses(reason: str) -> None:
    shape = REFUSED[reason]
    assert "tpu_custom_call" not in lower_for("v6e", shape, "auto").as_text()
    with pytest.raises(NotImplementedError, match=reason):
        lower_for("v6e", shape, "mosaic_tpu")


def test_auto_takes_the_kernel_where_it_can() -> None:
    assert "tpu_custom_call" in lower_for("v6e", Shape(tokens=32), "auto").as_text()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_compiler_refuses_a_kernel_that_needs_more_vector_memory_than_it_asks_for(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So every kernel that compiles keeps to the limit, which is below what any chip has."""
    assert CHIPS[generation].vmem_bytes >= VMEM_LIMIT_BYTES * 4 // 3
    monkeypatch.setattr(mosaic_tpu, "VMEM_LIMIT_BYTES", 2**20)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        lower_for(generation, Shape(tokens=32)).compile()
