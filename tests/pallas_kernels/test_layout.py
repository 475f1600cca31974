"""The KV layout, and moving whole pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.layout import KVLayout, gather_pages, interleave, scatter_pages, unpacked


def random_bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """float32 of any bits, NaNs with payloads included."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32).view(np.float32))


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint32)


def test_shape_and_size() -> None:
    layout = KVLayout(page_size=16, num_kv_heads=3, head_dim=64, dtype=jnp.dtype("bfloat16"))
    assert layout.shape(10) == (10, 16, 6, 64)
    assert layout.bytes_per_page() == 16 * 6 * 64 * 2
    assert KVLayout.of(jnp.zeros(layout.shape(2), layout.dtype)) == layout


def test_packed_is_the_same_bytes_in_another_shape() -> None:
    plain = KVLayout(16, 3, 64, jnp.dtype("float32"))
    packed = KVLayout(16, 3, 64, jnp.dtype("float32"), is_packed=True)
    assert packed.shape(10) == (10, 16, 3, 128)
    assert packed.bytes_per_page() == plain.bytes_per_page()
    pages = random_bits(plain.shape(4), 0)
    stored = pages.reshape(packed.shape(4))
    np.testing.assert_array_equal(bits(unpacked(stored, 64)), bits(pages))
    np.testing.assert_array_equal(bits(stored)[..., :64], bits(pages)[:, :, 0::2])  # keys
    assert unpacked(pages, 64) is pages


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
    with pytest.raises(ValueError, match="kv_pages has shape"):
        KVLayout.of(jnp.zeros((2, 16, 3, 64)))
    with pytest.raises(ValueError, match=r"pages is float32\[1, 4, 2, 4\]: must be float32\[1, 4, 2, 8\]"):
        scatter_pages(jnp.zeros((5, 4, 2, 8)), jnp.array([1], jnp.int32), jnp.zeros((1, 4, 2, 4)))
