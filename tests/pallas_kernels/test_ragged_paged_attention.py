"""One suite for every implementation of ragged paged attention, against a float64 oracle in numpy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention import xla
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.arg_specs import (
    CORRECTNESS_SPECS,
    LARGE_PAGE_SPECS,
    ArgSpec,
)
from tests.support import attention_oracle
from tests.support.attention_inputs import make_step
from tests.support.implementations import (
    EAGER,
    IMPLEMENTATIONS,
    KV_DTYPES,
    LARGE_PAGES_ONLY,
    LOAD_DEPENDENT,
    SIMULATED,
    able_to_run,
    finest_dtype,
    takes,
)
from tests.support.tolerances import ATTENTION_TOLERANCE, EIGHT_BIT_TOLERANCE

SPECS = {spec.name: spec for spec in (*CORRECTNESS_SPECS, *LARGE_PAGE_SPECS)}
LOW_PRECISION_SPECS = ("mixed", "window_chunk", "soft_cap")
EVERY_CASE = [
    *((spec.name, "float32") for spec in CORRECTNESS_SPECS),
    *((name, dtype) for name in LOW_PRECISION_SPECS for dtype in ("bfloat16", "float16")),
]
# Specs, and dtypes of queries and of 8-bit caches.
EIGHT_BIT_SPECS = (
    *("decode_page_borders", "decode_one_row", "decode_all_empty", "decode_many_kv_blocks", "mixed"),
    *("window_chunk", "soft_cap", "gqa_3", "head_dim_256", "page_size_8"),
)
EIGHT_BIT_CASES = [
    *((name, "float32", "int8") for name in EIGHT_BIT_SPECS),
    *((name, "float32", "float8_e4m3fn") for name in LOW_PRECISION_SPECS),
    *((name, "bfloat16", kv) for name in ("mixed", "window_chunk") for kv in ("int8", "float8_e4m3fn")),
    ("mixed", "float16", "int8"),
]
LARGE_PAGE_CASES = [
    *((spec.name, "bfloat16", kv) for spec in LARGE_PAGE_SPECS for kv in ("int8", "float8_e4m3fn")),
    ("mixed_pages_of_32", "float16", "float8_e4m3fn"),
]
EVERY_DTYPE = ("float32", "bfloat16", "float16")
# What takes no float32 runs every spec in bfloat16 on its own machine, and these in the slow simulator.
SIMULATED_SPECS = ("decode_many_kv_blocks", "gqa_3", "head_dim_256")


# A simulated device takes seconds a case: Triton's interpreter runs these in CI, the rest nightly.
INTERPRETED_SPECS = ("mixed", "gqa_3", "window_chunk")
# And these run everywhere, a simulated TPU's other cases in CI.
ESSENTIAL_SPECS = ("mixed", "decode_page_borders", "decode_empty_slots", "gqa_3", "window_and_soft_cap")


nightly, slow = pytest.mark.nightly, pytest.mark.slow


def when(implementation: str, name: str, *rest: str) -> Any:
    """The parameters of a case, marked if it need not run for every change."""
    is_core = {
        "triton": name in INTERPRETED_SPECS and (rest[0] == "float32" or name == "mixed"),
        "mosaic_gpu": rest[0] == "bfloat16" or name.startswith("mixed"),
    }
    if implementation not in SIMULATED:
        marks = ()
    elif not is_core.get(implementation, True):
        marks = nightly
    else:
        names = ("mixed", "mixed_pages_of_32") if implementation == "mosaic_gpu" else ESSENTIAL_SPECS
        is_essential = name in names and rest[0] == finest_dtype(implementation)
        marks = () if is_essential or implementation == "triton" else slow
    return pytest.param(implementation, name, *rest, marks=marks)


def cases_of(implementation: str) -> list[tuple[str, str]]:
    """Specs and dtypes that an implementation is tested with."""
    if takes(implementation, "float32"):
        return [case for case in EVERY_CASE if takes(implementation, case[1])]
    every = [spec.name for spec in CORRECTNESS_SPECS]
    names = SIMULATED_SPECS if implementation in SIMULATED else every
    return [*((n, "bfloat16") for n in names if n not in LOW_PRECISION_SPECS), *EVERY_CASE[len(every) :]]


def eight_bit_cases_of(implementation: str) -> list[tuple[str, str, str]]:
    """The same for 8-bit caches, with their dtype."""
    cases = [*([] if implementation in LARGE_PAGES_ONLY else EIGHT_BIT_CASES), *LARGE_PAGE_CASES]
    kv_dtypes = KV_DTYPES.get(implementation, ())
    return [case for case in cases if case[2] in kv_dtypes and takes(implementation, case[1])]


def checks_pages(implementation: str, dtype: str) -> bool:
    """Whether a planted wrong page is looked for; a slow simulator does so in one dtype."""
    return takes(implementation, dtype) and (
        implementation not in SIMULATED or dtype == finest_dtype(implementation)
    )


every_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(each, marks=slow if each in EAGER else ()) for each in IMPLEMENTATIONS],
)


def call(q, k, v, kv_pages, metadata, **options):
    return ragged_paged_attention(q, k, v, kv_pages, metadata, **options)


run = jax.jit(
    call,
    static_argnames=("scale", "sliding_window", "soft_cap", "implementation"),
    donate_argnums=3,
)


def scale_of(spec: ArgSpec) -> float:
    return spec.head_dim**-0.5


@functools.cache
def case(name: str, dtype: str, kv_dtype: str = ""):
    """A spec's inputs, made once."""
    return make_step(SPECS[name], jnp.dtype(dtype), kv_dtype)


@functools.cache
def result(name: str, dtype: str, implementation: str, kv_dtype: str = ""):
    """What an implementation makes of a spec's inputs, computed once."""
    _, arrays, metadata = case(name, dtype, kv_dtype)
    return attend(SPECS[name], arrays, metadata, implementation)


def attend(spec: ArgSpec, arrays, metadata: AttentionMetadata, implementation: str):
    """Output as float64 and the cache; the caller's arrays stay alive."""
    with able_to_run(implementation):
        q, k, v, kv_pages = arrays
        out, kv_pages = (call if implementation in EAGER else run)(
            q,
            k,
            v,
            own(kv_pages),
            metadata,
            scale=scale_of(spec),
            sliding_window=spec.sliding_window,
            soft_cap=spec.soft_cap,
            implementation=implementation,
        )
        return np.asarray(out, np.float64), jax.block_until_ready(kv_pages)


def own(kv_pages):
    """A cache that may be donated."""
    return jax.tree.map(lambda array: jnp.array(np.asarray(array)), kv_pages)


def expect(spec: ArgSpec, step: attention_oracle.Step, **mutation: Any):
    return attention_oracle.attend(
        step, scale=scale_of(spec), sliding_window=spec.sliding_window, soft_cap=spec.soft_cap, **mutation
    )


def error(got, want) -> float:
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max())


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [when(each, *case) for each in IMPLEMENTATIONS for case in cases_of(each)],
)
def test_equals_the_oracle(implementation: str, name: str, dtype: str) -> None:
    spec = SPECS[name]
    step = case(name, dtype)[0]
    got, kv_pages = result(name, dtype, implementation)
    assert error(got, expect(spec, step)) <= ATTENTION_TOLERANCE[dtype]
    assert not got[step.cu_q_lens[-1] :].any(), "padding tokens give exact zeros"
    np.testing.assert_array_equal(np.asarray(kv_pages, np.float64), attention_oracle.written_pages(step))


@pytest.mark.parametrize(
    ("implementation", "name", "dtype", "kv_dtype"),
    [when(each, *case) for each in IMPLEMENTATIONS for case in eight_bit_cases_of(each)],
)
def test_an_8_bit_cache_equals_the_oracle(implementation: str, name: str, dtype: str, kv_dtype: str) -> None:
    """Exact but for the dtype of the queries, seen from the cache; from the numbers as they were, rounded."""
    spec = SPECS[name]
    step = case(name, dtype, kv_dtype)[0]
    got, kv_pages = result(name, dtype, implementation, kv_dtype)
    assert error(got, expect(spec, step)) <= ATTENTION_TOLERANCE[dtype]
    assert error(got, expect(spec, case(name, dtype)[0])) <= EIGHT_BIT_TOLERANCE[kv_dtype]
    assert not got[step.cu_q_lens[-1] :].any(), "padding tokens give exact zeros"
    data, scales = attention_oracle.written_cache(step)
    assert scales is not None
    codes = np.asarray(kv_pages.data, np.float64)[1:]
    if jax.default_backend() == "gpu":  # its division is not exact: a tie may go the other way
        ties = codes != data[1:]
        assert ties.mean() < 1e-4
        rtol, atol = (0.0, 1.0) if kv_dtype == "int8" else (0.125, 2.0**-9)
        np.testing.assert_allclose(codes, data[1:], rtol=rtol, atol=atol)
    else:
        np.testing.assert_array_equal(codes, data[1:])
    np.testing.assert_array_equal(np.asarray(kv_pages.scales, np.float64)[1:], scales[1:])


@pytest.mark.parametrize(
    ("name", "kv_dtype"), [("mixed", ""), ("mixed", "int8"), ("decode_page_borders", "")]
)
def test_whole_pages_give_the_same_as_their_halves(
    name: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA on a TPU fetches whole pages, elsewhere keys and values each for themselves."""
    wanted, _ = result(name, "float32", "xla", kv_dtype)
    fetched: list[int] = []

    def whole(pages: jax.Array, page_ids: jax.Array, *, which: int, rows: int) -> jax.Array:
        fetched.append(which)
        return xla._fetch_whole(pages, page_ids, which=which, rows=rows)

    monkeypatch.setattr(xla, "_fetch_half", whole)
    spec, (_, (q, k, v, kv_pages), metadata) = SPECS[name], case(name, "float32", kv_dtype)
    got, _ = call(q, k, v, own(kv_pages), metadata, scale=scale_of(spec), implementation="xla")
    assert {0, 1} == set(fetched)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("wrong", ["no key scale", "no value scale", "neighbour's", "key's for value"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_tolerance_catches_a_wrong_scale(kv_dtype: str, dtype: str, wrong: str) -> None:
    wanted = expect(SPECS["mixed"], case("mixed", dtype, kv_dtype)[0], wrong_scales=wrong)
    got, _ = result("mixed", dtype, "xla", kv_dtype)
    assert error(got, wanted) > 4 * ATTENTION_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("mixed", {"causal_shift": -1}),
        ("mixed", {"causal_shift": 1}),
        ("window_chunk", {"window_shift": 1}),
        ("window_chunk", {"window_shift": -1}),
    ],
)
def test_tolerance_catches_a_mask_that_is_off_by_one(name: str, mutation: dict[str, int], dtype: str) -> None:
    wrong = expect(SPECS[name], case(name, dtype)[0], **mutation)
    got, _ = result(name, dtype, "xla")
    assert error(got, wrong) > 4 * ATTENTION_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(each, dtype) for each in IMPLEMENTATIONS for dtype in EVERY_DTYPE if checks_pages(each, dtype)],
)
def test_tolerance_catches_another_rows_page(implementation: str, dtype: str) -> None:
    step, arrays, metadata = case("mixed", dtype)
    page_table = np.array(metadata.page_table)
    page_table[0, 0] = page_table[1, 0]
    wrong = dataclasses.replace(metadata, page_table=jnp.asarray(page_table))
    got, _ = attend(SPECS["mixed"], arrays, wrong, implementation)
    assert error(got, expect(SPECS["mixed"], step)) > 4 * ATTENTION_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("implementation", "kv_dtype", "name"),
    [
        (each, kv_dtype, name)
        for each in IMPLEMENTATIONS
        if each not in SIMULATED
        for kv_dtype in ("", *KV_DTYPES.get(each, ()))
        for name in (
            ("mixed_pages_of_32", "decode_pages_of_64")
            if kv_dtype and each in LARGE_PAGES_ONLY
            else ("mixed", "decode_page_borders", "decode_one_row")
        )
    ],
)
def test_cache_is_written_in_place(implementation: str, kv_dtype: str, name: str) -> None:
    spec = SPECS[name]
    _, arrays, metadata = case(name, finest_dtype(implementation), kv_dtype)
    before = jax.tree.leaves(kv_pages := own(arrays[3]))
    addresses = [array.unsafe_buffer_pointer() for array in before]
    _, updated = run(
        *arrays[:3],
        kv_pages,
        metadata,
        scale=scale_of(spec),
        sliding_window=None,
        soft_cap=None,
        implementation=implementation,
    )
    assert all(array.is_deleted() for array in before)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(updated)] == addresses


@every_implementation
def test_untouched_pages_keep_their_bits(implementation: str) -> None:
    spec = SPECS["mixed"]
    dtype = finest_dtype(implementation)
    step, arrays, metadata = case("mixed", dtype)
    word = np.dtype(f"uint{8 * arrays[3].dtype.itemsize}")
    last = np.iinfo(word).max
    noise = np.random.default_rng(1).integers(0, last, arrays[3].shape, word, True)  # NaNs with payloads too
    unowned = np.ones(arrays[3].shape[0], bool)
    unowned[step.page_table] = False  # page 0, the null page, takes what padding tokens write
    mask = unowned[:, None, None, None]
    bits = np.where(mask, noise, np.asarray(arrays[3]).view(word))
    arrays = (*arrays[:3], jnp.asarray(bits.view(arrays[3].dtype)))
    got, kv_pages = attend(spec, arrays, metadata, implementation)
    np.testing.assert_array_equal(np.asarray(kv_pages).view(word)[unowned], bits[unowned])
    assert error(got, expect(spec, step)) <= ATTENTION_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("implementation", "chunks"),
    [
        pytest.param(each, chunks, marks=nightly if each in EAGER else ())
        for each in IMPLEMENTATIONS
        for chunks in (((1, 33, 1, 35),) if each in SIMULATED else ((48, 22), (16, 16, 38), (1, 33, 1, 35)))
    ],
)
def test_chunking_does_not_change_the_result(implementation: str, chunks: tuple[int, ...]) -> None:
    whole = ArgSpec(name="whole", rows=((70, 70),), num_q_heads=6, num_kv_heads=2)
    dtype = finest_dtype(implementation)
    step, arrays, metadata = make_step(whole, jnp.dtype(dtype))
    padded = [np.pad(np.asarray(array), ((0, 48), (0, 0), (0, 0))) for array in arrays[:3]]
    kv_pages, start, got = arrays[3], 0, []
    for count in chunks:
        part = [jnp.asarray(array[start : start + 48]) for array in padded]
        chunk = AttentionMetadata(
            metadata.page_table, jnp.array([start + count], jnp.int32), jnp.array([0, count], jnp.int32), 48
        )
        out, kv_pages = attend(whole, (*part, kv_pages), chunk, implementation)
        got.append(out[:count])
        start += count
    assert error(np.concatenate(got), expect(whole, step)) <= ATTENTION_TOLERANCE[dtype]


@every_implementation
def test_pages_before_the_window_may_be_gone(implementation: str) -> None:
    spec = ArgSpec(name="gone", rows=((1, 100), (10, 90)), sliding_window=20)
    dtype = finest_dtype(implementation)
    step, arrays, metadata = make_step(spec, jnp.dtype(dtype))
    want = expect(spec, step)
    kv_pages = np.array(arrays[3])
    kv_pages[step.page_table[0, :5]] = np.nan  # the query at 99 sees 80 to 99: pages 5 and 6
    kv_pages[step.page_table[1, :3]] = np.nan  # the first query, at 80, sees from 61 on: page 3
    got, _ = attend(spec, (*arrays[:3], jnp.asarray(kv_pages)), metadata, implementation)
    assert error(got, want) <= ATTENTION_TOLERANCE[dtype]


@every_implementation
def test_a_bad_row_shows_and_stays_alone(implementation: str) -> None:
    spec = SPECS["chunk_continues"]
    dtype = finest_dtype(implementation)
    step, arrays, metadata = case("chunk_continues", dtype)
    first, last = step.cu_q_lens[1:3]
    q, k, v = (array.at[first:last].set(jnp.nan) for array in arrays[:3])
    got, _ = attend(spec, (q, k, v, arrays[3]), metadata, implementation)
    want = expect(spec, step)
    assert np.isnan(got[first:last]).any(axis=(1, 2)).all()
    for rest in (slice(0, first), slice(last, step.cu_q_lens[-1])):
        assert error(got[rest], want[rest]) <= ATTENTION_TOLERANCE[dtype]


@every_implementation
def test_a_row_does_not_depend_on_its_neighbours(implementation: str) -> None:
    """A decode step's arithmetic is per row: the same bits whatever the other rows hold."""
    spec = ArgSpec(name="rows", rows=tuple((1, length) for length in (40, 7, 130, 64)))
    dtype = finest_dtype(implementation)
    _, arrays, metadata = make_step(spec, jnp.dtype(dtype))
    got, _ = attend(spec, arrays, metadata, implementation)
    order = jnp.array([2, 0, 3, 1])
    moved = AttentionMetadata(
        metadata.page_table[order], metadata.kv_lens[order], metadata.cu_q_lens, metadata.max_q_len
    )
    again, _ = attend(spec, (*(array[order] for array in arrays[:3]), arrays[3]), moved, implementation)
    same_bits = implementation not in LOAD_DEPENDENT
    assert error(again, got[np.asarray(order)]) <= (0.0 if same_bits else ATTENTION_TOLERANCE[dtype])
