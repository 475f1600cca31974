"""The TPU kernel beyond the shared suite: that its checks bite, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.layout import KVLayout, KVPages
from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu, mosaic_tpu_kernel
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
from jaxserve.pallas_kernels.ragged_paged_attention.arg_specs import CORRECTNESS_SPECS, ArgSpec
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import choose_blocks, scratch_bytes
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_work import make_work
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_writes import merge_scales
from tests.support import attention_oracle
from tests.support.attention_inputs import make_step
from tests.support.implementations import small_blocks
from tests.support.tolerances import ATTENTION_TOLERANCE
from tests.support.tpu_interpreter import races_found, simulated_tpu

SPECS = {spec.name: spec for spec in CORRECTNESS_SPECS}


def attend(
    spec: ArgSpec, dtype: str = "float32", kv_dtype: str = "", *, best_order: bool = False
) -> tuple[float, KVPages]:
    """The kernel's largest error (NaN if any), and the cache in plain order; inside `simulated_tpu`."""
    step, (q, k, v, cache), metadata = make_step(spec, jnp.dtype(dtype), kv_dtype)
    scale = spec.head_dim**-0.5
    cache = cache if isinstance(cache, KVPages) else KVPages(cache, None, spec.head_dim)
    if best_order:
        order = mosaic_tpu.best_order(cache.layout)
        cache = cache.ordered(is_packed=order.is_packed, folds=order.folds)
        assert cache.layout == order
    attention = functools.partial(
        ragged_paged_attention,
        scale=scale,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        implementation="mosaic_tpu",
    )
    out, cache = jax.jit(attention)(q, k, v, cache, metadata)
    want = attention_oracle.attend(
        step, scale=scale, sliding_window=spec.sliding_window, soft_cap=spec.soft_cap
    )
    return float(np.abs(np.asarray(out, np.float64) - want).max()), cache.ordered()


def check_written(cache: KVPages, spec: ArgSpec, dtype: str, kv_dtype: str = "") -> None:
    """All pages but the null page hold what the oracle wrote."""
    data, scales = attention_oracle.written_cache(make_step(spec, jnp.dtype(dtype), kv_dtype)[0])
    np.testing.assert_array_equal(np.asarray(cache.data, np.float64)[1:], data[1:])
    assert (cache.scales is None) == (scales is None)
    if cache.scales is not None and scales is not None:
        np.testing.assert_array_equal(np.asarray(cache.scales, np.float64)[1:], scales[1:])


@pytest.fixture
def blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_tpu, "choose_blocks", small_blocks)


LOW_PRECISION = (
    SPECS["head_dim_128"],
    SPECS["head_dim_256"],
    SPECS["gqa_8"],
    # A group of 3 is filled up to whole words, and 3 heads are not read by strides.
    ArgSpec(name="three_heads", rows=((1, 20), (6, 18)), num_q_heads=9, num_kv_heads=3, head_dim=128),
    ArgSpec(name="one_head", rows=((1, 20), (6, 18)), num_kv_heads=1, head_dim=128),
)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=spec.name, marks=slow if n else ()) for n, spec in enumerate(LOW_PRECISION)],
)
def test_bfloat16_rows_are_taken_from_their_words(spec: ArgSpec, blocks_are_small: None) -> None:
    with simulated_tpu():
        assert attend(spec, "bfloat16")[0] <= ATTENTION_TOLERANCE["bfloat16"]


def test_sizes_for_real_contexts_give_the_same() -> None:
    with simulated_tpu():
        assert attend(SPECS["mixed"])[0] <= ATTENTION_TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_cache_is_attended_and_written(dtype: str, blocks_are_small: None) -> None:
    with simulated_tpu():
        error, cache = attend(SPECS["mixed"], dtype, best_order=True)
    assert error <= ATTENTION_TOLERANCE[dtype]
    check_written(cache, SPECS["mixed"], dtype)


# Less than a word a token. Chunks that begin and end in either part of a page, or fill it, and single tokens.
FOLDED_ROWS = ((1, 30), (1, 17), (0, 0), (5, 9), (19, 19), (35, 150), (1, 1), (10, 26))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "kv_dtype", "folds"),
    [
        (1, 64, "bfloat16", "", 2),
        pytest.param(3, 64, "bfloat16", "", 2, marks=slow),
        pytest.param(1, 128, "float32", "int8", 2, marks=slow),
        pytest.param(1, 128, "bfloat16", "float8_e4m3fn", 2, marks=slow),
        (1, 64, "float32", "int8", 4),
        pytest.param(2, 64, "float32", "int8", 2, marks=slow),
        pytest.param(1, 256, "float32", "int8", 2, marks=slow),
    ],
)
def test_a_folded_cache_is_attended_and_written(
    heads: int, head_dim: int, dtype: str, kv_dtype: str, folds: int, blocks_are_small: None
) -> None:
    spec = ArgSpec(
        name="folded",
        rows=FOLDED_ROWS,
        num_q_heads=2 * heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        padding_tokens=3,
    )
    layout = KVLayout(16, heads, head_dim, jnp.dtype(kv_dtype or dtype))
    assert mosaic_tpu.best_order(layout).folds == folds
    with simulated_tpu():
        error, cache = attend(spec, dtype, kv_dtype, best_order=True)
    assert error <= ATTENTION_TOLERANCE[dtype]
    check_written(cache, spec, dtype, kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["", "int8"])
@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(name, marks=slow) for name in ("decode_page_borders", "decode_all_empty"))],
)
def test_two_cores_share_the_work(name: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write the chunks' tokens, the same bytes: to the simulator that is a race."""

    def blocks(*args):
        return dataclasses.replace(small_blocks(*args), cores=2)

    monkeypatch.setattr(mosaic_tpu, "choose_blocks", blocks)
    with simulated_tpu(may_race=name == "mixed", num_cores_or_threads=2):
        error, cache = attend(SPECS[name], kv_dtype=kv_dtype)
    assert error <= ATTENTION_TOLERANCE["float32"]
    check_written(cache, SPECS[name], "float32", kv_dtype)


# --- mistakes that must be caught ---------------------------------------------------------------------------


def pages_not_waited_for(original):
    def wait(refs, config, index, item, block, number) -> None:
        pl.when(block == 0)(lambda: mosaic_tpu_kernel._q_copy(refs, config, index, item).wait())

    return wait


def new_tokens_not_waited_for(original):
    def write(refs, config, core) -> None:
        mosaic_tpu_kernel._for_each_item(refs, config, core, 0, lambda copy: copy.start())

    return write


class OnlyFirst:
    """A reference to semaphores that gives the first one, whichever is asked for."""

    def __init__(self, semaphores) -> None:
        self._semaphores = semaphores

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self._semaphores.at[0]


def one_semaphore_for_all_slots(original):
    return lambda refs, *args: original(refs._replace(kv_sems=OnlyFirst(refs.kv_sems)), *args)


def the_next_slots_semaphore(original):
    return lambda refs, config, index, item, block, number: original(
        refs, config, index, item, block, number + 1
    )


def scales_not_written(original):
    return lambda *args: None


def scales_of_the_page_before(original):
    """A row's page gets the scales of the page before it."""

    def write(refs, config, row, use) -> None:
        original(refs._replace(first_scales=Shifted(refs.first_scales)), config, row, use)

    return write


class Shifted:
    """Where rows' scales begin, one too low."""

    def __init__(self, values) -> None:
        self._values = values

    def __getitem__(self, index):
        return jnp.maximum(self._values[index] - 1, 0)


def nothing_fetched(original):
    return lambda refs, config, cursor: cursor


MISTAKES = (
    ("_wait_for_block", pages_not_waited_for, "on_wait"),
    ("_wait_for_block", pages_not_waited_for, "eager"),
    ("_write_new", new_tokens_not_waited_for, "on_wait"),
    ("_write_new", new_tokens_not_waited_for, "eager"),
    ("_for_each_page", one_semaphore_for_all_slots, "on_wait"),
)


@pytest.mark.parametrize(("name", "plant", "mode"), MISTAKES)
def test_a_planted_mistake_is_caught(
    name: str, plant: Any, mode: Any, blocks_are_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As late as a copy may run, its data are missing; as early as it may, only the race detector sees it."""
    monkeypatch.setattr(mosaic_tpu_kernel, name, plant(getattr(mosaic_tpu_kernel, name)))
    with simulated_tpu(may_race=True, dma_execution_mode=mode):
        error, _ = attend(SPECS["mixed"])
        assert races_found() or not error <= ATTENTION_TOLERANCE["float32"]


@pytest.mark.parametrize("plant", [scales_not_written, scales_of_the_page_before])
def test_planted_mistakes_with_scales_are_caught(
    plant: Any, blocks_are_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_for_each_scale_page"
    monkeypatch.setattr(mosaic_tpu_kernel, name, plant(getattr(mosaic_tpu_kernel, name)))
    with simulated_tpu():
        error, _ = attend(SPECS["mixed"], kv_dtype="int8")
    assert not error <= 4 * ATTENTION_TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("name", "plant"), [("_wait_for_block", the_next_slots_semaphore), ("_fetch_next", nothing_fetched)]
)
def test_a_wait_for_what_was_never_started_fails_instead_of_hanging(
    name: str, plant: Any, blocks_are_small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_tpu_kernel, name, plant(getattr(mosaic_tpu_kernel, name)))
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="waits for a copy that it has not started"),
        simulated_tpu(may_race=True),
    ):
        attend(SPECS["mixed"])


# --- the work list ------------------------------------------------------------------------------------------


def test_work_covers_every_token_once_and_spreads_single_tokens() -> None:
    counts = [1, 20, 0, 1, 1, 9, 1, 1, 1, 1, 0]
    metadata = AttentionMetadata(
        jnp.zeros((len(counts), 4), jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        64,
    )
    work = jax.tree.map(np.asarray, make_work(metadata, 64, 8))
    items = list(zip(work.row[: work.count[0]].tolist(), work.first[: work.count[0]].tolist(), strict=True))
    tokens = [(row, token) for row, first in items for token in range(first, min(first + 8, counts[row]))]
    assert sorted(tokens) == [(row, token) for row, count in enumerate(counts) for token in range(count)]
    kinds = "".join("d" if counts[row] == 1 else "p" for row, _ in items)
    assert kinds.count("p") == 5
    gaps = [len(gap) for gap in kinds.split("p")[1:]]
    assert max(gaps) - min(gaps) <= 1
    assert gaps[0] >= 1


@pytest.mark.parametrize("counts", [[], [1, 1, 1], [30], [0, 0]])
def test_work_of_one_kind_keeps_its_order(counts: list[int]) -> None:
    counts = [*counts, 0]
    metadata = AttentionMetadata(
        jnp.zeros((len(counts), 4), jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        32,
    )
    work = jax.tree.map(np.asarray, make_work(metadata, 32, 8))
    items = list(zip(work.row[: work.count[0]].tolist(), work.first[: work.count[0]].tolist(), strict=True))
    want = [(row, first) for row, count in enumerate(counts) for first in range(0, count, 8)]
    assert items == want


@pytest.mark.parametrize("max_q_len", [1, 32])
def test_work_is_dealt_out_to_cores_evenly_by_kind(max_q_len: int) -> None:
    counts = [1, 0, 1, 1, 1, 1] if max_q_len == 1 else [1, 20, 0, 1, 1, 9, 1, 1]
    metadata = AttentionMetadata(
        jnp.zeros((len(counts), 4), jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        max_q_len,
    )
    work = jax.tree.map(np.asarray, make_work(metadata, 40, 8, cores=2))
    per_core = []
    for core, count in enumerate(work.count.tolist()):
        begin = core * work.row.size // 2
        rows, firsts = work.row[begin : begin + count], work.first[begin : begin + count]
        per_core.append(list(zip(rows.tolist(), firsts.tolist(), strict=True)))
    want = [(row, first) for row, count in enumerate(counts) for first in range(0, count, 8)]
    assert sorted(per_core[0] + per_core[1]) == want
    for is_single in (True, False):
        dealt = [sum((counts[row] == 1) == is_single for row, _ in items) for items in per_core]
        assert abs(dealt[0] - dealt[1]) <= 1


# --- what it writes -----------------------------------------------------------------------------------------


def test_scales_are_merged_into_whole_pages() -> None:
    """Pages of four: row 0 adds its sixth token, row 2 tokens 3 to 8 of pages 5, 6 and 7; by hand."""
    scales = jnp.asarray(np.arange(10 * 2 * 4, dtype=np.float32).reshape(10, 2, 4))
    new = jnp.asarray(-np.arange(1, 19, dtype=np.float32).reshape(9, 2))
    metadata = AttentionMetadata(
        page_table=jnp.asarray([[3, 4, 0], [0, 0, 0], [5, 6, 7]], jnp.int32),
        kv_lens=jnp.asarray([6, 0, 9], jnp.int32),
        cu_q_lens=jnp.asarray([0, 1, 1, 7], jnp.int32),  # the last two tokens are padding
        max_q_len=9,
    )
    merged = jax.jit(merge_scales)(scales, new, metadata)
    assert merged.first.tolist() == [0, 1, 1]
    want = np.asarray(scales)[[4, 5, 6, 7]].copy()
    values = np.asarray(new)
    want[0, :, 1] = values[0]
    want[1, :, 3] = values[1]
    want[2] = values[2:6].T
    want[3, :, 0] = values[6]
    np.testing.assert_array_equal(np.asarray(merged.pages)[:4], want)
    assert not (np.asarray(merged.pages)[4:] < 0).any()


# --- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ({"head_dim": 32}, "float32", r"head_dim=32: needs 64 to 128, or 256"),
        ({"head_dim": 192}, "float32", r"head_dim=192: needs 64 to 128, or 256"),
        ({}, "float16", r"q is float16: needs bfloat16 or float32"),
        (
            {"num_q_heads": 3, "num_kv_heads": 1, "page_size": 1},
            "bfloat16",
            r"1 kv heads of 64 bfloat16 on a device: folds=2: must divide page_size=1",
        ),
    ],
)
def test_a_refusal_says_what_and_why(shape: dict[str, int], dtype: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        attend(ArgSpec(name="refused", rows=((1, 3),), **shape), dtype)


def plan(num_kv_heads: int, page_size: int = 128) -> tuple[KVLayout, Any]:
    """A layout, and the metadata of a mixed step."""
    layout = KVLayout(page_size, num_kv_heads, 128, jnp.dtype("bfloat16"))
    ints = (jnp.zeros(size, jnp.int32) for size in ((8, 64), (8,), (9,)))
    return layout, AttentionMetadata(*ints, max_q_len=2048)


def test_query_blocks_shrink_until_they_fit() -> None:
    """Counted by hand for 32 heads: 6 MiB of pages, 2 of keys and values, and 3 KiB a row."""
    few = choose_blocks(plan(num_kv_heads=8)[0], 4, 2, plan(num_kv_heads=8)[1])
    assert (few.q_tokens, few.kv_pages, few.depth) == (128, 4, 3)
    layout, metadata = plan(num_kv_heads=32)
    many = choose_blocks(layout, 2, 2, metadata)
    assert (many.q_tokens, many.kv_pages, many.depth) == (128, 1, 3)
    rows = 32 * 128 * 2
    by_hand = 3 * 2 * 2**20 + rows * 128 * (5 * 2 + 3 * 4) + 2 * 2**20
    assert scratch_bytes(layout, 2, 2, many) == by_hand <= 36 * 2**20
    assert scratch_bytes(layout, 2, 2, dataclasses.replace(many, q_tokens=256)) > 36 * 2**20


def test_pages_beyond_vector_memory_are_refused() -> None:
    layout, metadata = plan(num_kv_heads=64, page_size=1024)
    with pytest.raises(NotImplementedError, match=r"64 kv heads of 128 bfloat16, pages of 1024 tokens"):
        choose_blocks(layout, 8, 2, metadata)


def test_a_page_table_beyond_scalar_memory_is_refused() -> None:
    def args(*shape, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    sizes = ((128, 8192), (128,), (129,))
    metadata = AttentionMetadata(*(args(*size, dtype=jnp.int32) for size in sizes), max_q_len=1)
    attention = functools.partial(ragged_paged_attention, scale=1.0, implementation="mosaic_tpu")
    with pytest.raises(NotImplementedError, match=r"page_table is \[128, 8192\].* a larger page_size"):
        jax.eval_shape(attention, args(128, 4, 128), *[args(128, 2, 128)] * 2, args(9, 16, 4, 128), metadata)
