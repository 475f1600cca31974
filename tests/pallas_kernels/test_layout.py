"""The KV layout, and moving whole pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.layout import (
    KVLayout,
    KVPages,
    encode,
    gather_pages,
    interleave,
    scatter_pages,
)


def random_bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """float32 of any bits, NaNs with payloads included."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32).view(np.float32))


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def test_shape_and_size() -> None:
    layout = KVLayout(page_size=16, num_kv_heads=3, head_dim=64, dtype=jnp.dtype("bfloat16"))
    assert layout.shape(10) == (10, 16, 6, 64)
    assert layout.bytes_per_page() == 16 * 6 * 64 * 2
    assert KVPages(jnp.zeros(layout.shape(2), layout.dtype), None, 64).layout == layout


def test_packed_is_the_same_bytes_in_another_shape() -> None:
    plain = KVLayout(16, 3, 64, jnp.dtype("float32"))
    packed = KVLayout(16, 3, 64, jnp.dtype("float32"), is_packed=True)
    assert packed.shape(10) == (10, 16, 3, 128)
    assert packed.bytes_per_page() == plain.bytes_per_page()
    pages = random_bits(plain.shape(4), 0)
    stored = pages.reshape(packed.shape(4))
    cache = KVPages(stored, None, 64)
    assert cache.layout == packed
    np.testing.assert_array_equal(bits(cache.ordered().data), bits(pages))
    assert cache.ordered().layout == plain
    np.testing.assert_array_equal(bits(stored)[..., :64], bits(pages)[:, :, 0::2])  # keys


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("folds", [2, 4])
def test_folded_tokens_of_each_part_share_a_line(folds: int, is_packed: bool) -> None:
    plain = KVLayout(8, 3, 16, jnp.dtype("float32"))
    pages = random_bits(plain.shape(5), 3)
    cache = KVPages(pages, None, 16).ordered(is_packed=is_packed, folds=folds)
    layout = cache.layout
    assert layout == KVLayout(8, 3, 16, jnp.dtype("float32"), is_packed, folds)
    assert cache.data.shape == layout.shape(5)
    lines = bits(cache.data).reshape(5, 8 // folds, 3, folds, 2, 16)
    for token in range(8):
        part, line = divmod(token, 8 // folds)
        keys_and_values = lines[:, line, :, part].reshape(5, 6, 16)
        np.testing.assert_array_equal(keys_and_values, bits(pages)[:, token])
    np.testing.assert_array_equal(bits(cache.ordered().data), bits(pages))
    other = cache.ordered(is_packed=not is_packed, folds=6 - folds)
    np.testing.assert_array_equal(bits(other.ordered().data), bits(pages))


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_8_bit_page_has_a_scale_for_each_token_and_head(is_packed: bool) -> None:
    layout = KVLayout(16, 3, 64, jnp.dtype("int8"), is_packed)
    assert layout.bytes_per_page() == 16 * 6 * (64 + 4)
    shapes = layout.shapes(5)
    assert (shapes.data.shape, shapes.data.dtype) == (layout.shape(5), jnp.int8)
    assert shapes.scales is not None
    assert (shapes.scales.shape, shapes.scales.dtype) == ((5, 6, 16), jnp.float32)
    assert shapes.layout == layout


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("float8_e4m3fn", 448)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_codes_times_scales_are_near_and_use_the_whole_range(dtype: str, largest: int, size: float) -> None:
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((5, 2, 64)) * size, jnp.float32) for _ in range(2))
    codes, scales = jax.jit(encode, static_argnums=2)(k, v, dtype)
    assert codes.dtype == jnp.dtype(dtype)
    assert scales is not None
    got = np.asarray(codes, np.float64)
    assert (np.abs(got).max(axis=-1) == largest).all()
    wanted = np.asarray(interleave(k, v), np.float64)
    step = 0.5001 * np.asarray(scales, np.float64)[..., None]
    if dtype == "float8_e4m3fn":  # three bits behind the leading one, or subnormal
        step = np.maximum(step / 512, np.abs(wanted) / 15.9)
    assert (np.abs(got * np.asarray(scales, np.float64)[..., None] - wanted) <= step).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_zeros_and_what_is_not_finite_have_their_scales(dtype: str) -> None:
    rows = np.zeros((4, 1, 8), np.float32)
    rows[1, 0, 3], rows[2, 0, 3], rows[3, 0, 3] = np.nan, np.inf, 1e-40
    codes, scales = encode(jnp.asarray(rows), jnp.asarray(rows), dtype)
    assert scales is not None
    read = np.asarray(codes, np.float32) * np.asarray(scales)[..., None]
    assert np.asarray(scales)[[0, 3]].tolist() == [[1.0, 1.0]] * 2
    assert not read[[0, 3]].any()
    assert np.isnan(read[1:3]).all(), "whoever reads the token must notice"


def test_scales_move_with_their_pages() -> None:
    def cache(num_pages: int, seed: int) -> KVPages:
        codes = np.random.default_rng(seed).integers(-128, 128, (num_pages, 4, 2, 8)).astype(np.int8)
        return KVPages(jnp.asarray(codes), random_bits((num_pages, 2, 4), seed), 8)

    source, target = cache(9, 0), cache(7, 1)
    assert target.scales is not None
    before, taken = bits(target.scales), gather_pages(source, jnp.array([8, 9, 3], jnp.int32))
    moved = jax.jit(scatter_pages, donate_argnums=0)(target, jnp.array([2, 7, 1], jnp.int32), taken)
    assert moved.scales is not None
    assert source.scales is not None
    np.testing.assert_array_equal(bits(moved.scales)[[2, 1]], bits(source.scales)[[8, 3]])
    np.testing.assert_array_equal(bits(moved.scales)[[0, 3, 4, 5, 6]], before[[0, 3, 4, 5, 6]])
    np.testing.assert_array_equal(np.asarray(moved.data)[[2, 1]], np.asarray(source.data)[[8, 3]])


def test_keys_and_values_alternate() -> None:
    k = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2)
    mixed = interleave(k, -k)
    assert mixed.shape == (2, 6, 2)
    for head in range(3):
        np.testing.assert_array_equal(mixed[:, 2 * head], k[:, head])
        np.testing.assert_array_equal(mixed[:, 2 * head + 1], -k[:, head])


def test_pages_survive_a_round_trip_bit_for_bit() -> None:
    source, target = random_bits((9, 4, 2, 8), 0), random_bits((7, 4, 2, 8), 1)
    before = bits(target)
    taken = gather_pages(source, jnp.array([8, 0, 3], jnp.int32))
    np.testing.assert_array_equal(bits(taken), bits(source)[[8, 0, 3]])
    moved = jax.jit(scatter_pages, donate_argnums=0)(target, jnp.array([2, 5, 1], jnp.int32), taken)
    np.testing.assert_array_equal(bits(moved)[[2, 5, 1]], bits(source)[[8, 0, 3]])
    np.testing.assert_array_equal(bits(moved)[[0, 3, 4, 6]], before[[0, 3, 4, 6]])


def test_ids_out_of_range_are_padding() -> None:
    pages = random_bits((5, 4, 2, 8), 2)
    ids = jnp.array([4, 5, -1], jnp.int32)
    taken = gather_pages(pages, ids)
    np.testing.assert_array_equal(bits(taken)[0], bits(pages)[4])
    assert not bits(taken)[1:].any()
    kept = scatter_pages(pages, ids, jnp.ones_like(taken))
    np.testing.assert_array_equal(bits(kept)[:4], bits(pages)[:4])
    np.testing.assert_array_equal(np.asarray(kept[4]), 1.0)


def test_scatter_is_in_place_when_donated() -> None:
    pages = jnp.array(np.zeros((5, 4, 2, 8), np.float32))
    address = pages.unsafe_buffer_pointer()
    ids, new = jnp.array([1], jnp.int32), jnp.ones((1, 4, 2, 8), jnp.float32)
    assert jax.jit(scatter_pages, donate_argnums=0)(pages, ids, new).unsafe_buffer_pointer() == address


def test_what_cannot_be_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="page_size=0: must be at least 1"):
        KVLayout(0, 1, 64, jnp.dtype("float32"))
    with pytest.raises(ValueError, match="folds=4: must divide page_size=6"):
        KVLayout(6, 1, 64, jnp.dtype("float32"), folds=4)
    with pytest.raises(ValueError, match="dtype=int4: must be float32"):
        KVLayout(1, 1, 64, jnp.dtype("int4"))
    with pytest.raises(ValueError, match="kv_pages has shape"):
        _ = KVPages(jnp.zeros((2, 16, 3, 64)), None, 64).layout
    codes = jnp.zeros((2, 16, 4, 64), jnp.int8)
    with pytest.raises(ValueError, match="kv_pages is int8: must have scales"):
        _ = KVPages(codes, None, 64).layout
    with pytest.raises(ValueError, match="kv_pages is float32: must have no scales"):
        _ = KVPages(codes.astype(jnp.float32), jnp.zeros((2, 4, 16)), 64).layout
    with pytest.raises(ValueError, match=r"scales is float32\[2, 16, 4\]: must be float32\[2, 4, 16\]"):
        _ = KVPages(codes, jnp.zeros((2, 16, 4)), 64).layout
    with pytest.raises(ValueError, match="pages is of another layout"):
        whole = KVPages(codes, jnp.zeros((2, 4, 16)), 64)
        scatter_pages(whole, jnp.array([1], jnp.int32), KVPages(codes[:1], None, 64))
    with pytest.raises(ValueError, match=r"pages is float32\[1, 4, 2, 4\]: must be float32\[1, 4, 2, 8\]"):
        scatter_pages(jnp.zeros((5, 4, 2, 8)), jnp.array([1], jnp.int32), jnp.zeros((1, 4, 2, 4)))
