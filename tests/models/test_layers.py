"""The small parts, where a decoder's tolerance would hide a slip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import LinearScaling, Llama3Scaling, RopeConfig
from jaxserve.models.layers.linear import linear
from jaxserve.models.layers.norm import rms_norm
from jaxserve.models.layers.rope import apply_rope, inverse_frequencies, rope_table


def test_linear_contracts_several_axes_and_adds_the_bias_before_rounding():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 4, 5)).astype(np.float32)
    weight = rng.standard_normal((7, 2, 4, 5)).astype(np.float32)
    bias = rng.standard_normal(7).astype(np.float32)
    out = linear(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias), contracting=3)
    expected = x.reshape(3, -1).astype(np.float64) @ weight.reshape(7, -1).T + bias
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    halves = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), jnp.asarray(bias, jnp.bfloat16)
    exact = linear(*halves, contracting=3, dtype=jnp.float32)
    assert exact.dtype == jnp.float32
    assert (linear(*halves, contracting=3) == exact.astype(jnp.bfloat16)).all()
    without_bias = linear(*halves[:2], contracting=3)
    assert without_bias.dtype == jnp.bfloat16
    assert (without_bias == linear(*halves[:2], contracting=3, dtype=jnp.float32).astype(jnp.bfloat16)).all()


def test_float32_products_ask_for_float32():
    """Without it a GPU multiplies in TF32: three digits."""
    text = str(jax.make_jaxpr(linear)(jnp.ones((2, 3)), jnp.ones((4, 3))))
    assert "HIGHEST" in text


def test_norms_round_as_their_families_do():
    x = jnp.asarray([[1.0, 2.0, 4.0]], jnp.bfloat16)
    weight = jnp.asarray([0.013, 0.4, 0.7], jnp.bfloat16)
    normed = np.array([1.0, 2.0, 4.0]) / np.sqrt(7.0)
    exact = np.asarray(weight, np.float64)
    plain = rms_norm(x, weight, eps=0.0, plus_one=False)
    assert plain.dtype == jnp.bfloat16
    llama = normed.astype(jnp.bfloat16) * exact.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(plain)[0], llama.astype(jnp.bfloat16))
    plus_one = rms_norm(x, weight, eps=0.0, plus_one=True)
    # 1.013 is 1.0156 in bfloat16: the sum must not be rounded before it is used.
    np.testing.assert_array_equal(np.asarray(plus_one)[0], (normed * (1 + exact)).astype(jnp.bfloat16))


def test_norm_of_tiny_values_is_held_by_epsilon():
    out = rms_norm(jnp.full((1, 4), 1e-6), jnp.ones(4), eps=1e-6, plus_one=False)
    np.testing.assert_allclose(out, np.full((1, 4), 1e-6 / np.sqrt(1e-12 + 1e-6)), rtol=1e-6)


def test_rope_turns_pairs_of_halves():
    table = rope_table(RopeConfig(theta=100.0), 4, jnp.asarray([0, 1, 3], jnp.int32))
    x = jnp.asarray(np.tile([1.0, 2.0, 3.0, 4.0], (3, 2, 1)), jnp.float32)
    out = np.asarray(apply_rope(x, table))
    for row, position in enumerate([0, 1, 3]):
        for pair, frequency in enumerate([1.0, 0.1]):
            turned = complex(1 + pair, 3 + pair) * np.exp(1j * position * frequency)
            np.testing.assert_allclose(out[row, :, pair], turned.real, rtol=1e-6)
            np.testing.assert_allclose(out[row, :, pair + 2], turned.imag, rtol=1e-6)


def test_rope_of_a_long_context_keeps_its_angles():
    """Position 131,071 turns the first pair by 131,071 radians: float32 angles, not bfloat16."""
    positions = jnp.asarray([131_071], jnp.int32)
    cos, sin = rope_table(RopeConfig(theta=500000.0), 64, positions)
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, 0], np.cos(131_071.0), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0], np.sin(131_071.0), atol=1e-5)


def test_scaled_frequencies():
    plain = inverse_frequencies(RopeConfig(theta=10000.0), 8)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    linear_ = inverse_frequencies(RopeConfig(theta=10000.0, scaling=LinearScaling(factor=4.0)), 8)
    np.testing.assert_allclose(linear_, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024
    )
    llama3 = inverse_frequencies(RopeConfig(theta=10000.0, scaling=scaling), 8)
    # Turns in 1024 tokens: 163, 16.3, 1.63, 0.163; kept from 4 up, divided below 1, a ramp between.
    kept = (1024 * 0.01 / (2 * np.pi) - 1) / 3
    ramp = (1 - kept) * 0.01 / 8 + kept * 0.01
    np.testing.assert_allclose(llama3, [1.0, 0.1, ramp, 0.001 / 8], rtol=1e-6)


@pytest.mark.parametrize("group_axes", [(3,), (3, 2)])
def test_rope_takes_grouped_heads(group_axes):
    table = rope_table(RopeConfig(theta=100.0), 6, jnp.arange(5, dtype=jnp.int32))
    x = jax.random.normal(jax.random.key(0), (5, *group_axes, 6))
    flat = apply_rope(x.reshape(5, -1, 6), table)
    np.testing.assert_array_equal(apply_rope(x, table).reshape(5, -1, 6), flat)
