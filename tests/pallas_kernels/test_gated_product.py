"""The gated product's kernel against a float64 oracle, in the interpreter or, if there is one, on a GPU."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxserve.pallas_kernels.gated_product.mosaic_gpu import BLOCK, gated_product
from tests.support.gpu_lowering import on_abstract_h100

Activation = Literal["silu", "gelu_tanh"]
Float64Array = npt.NDArray[np.float64]

_INTERPRETED = jax.default_backend() != "gpu"


def _inputs(tokens: int, hidden: int, blocks: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(tokens), 2)
    x = jax.random.normal(keys[0], (tokens, hidden), jnp.dtype(dtype))
    weight = jax.random.normal(keys[1], (blocks, 2, BLOCK, hidden), jnp.dtype(dtype)) * hidden**-0.5
    return x, weight


def _oracle(x: jax.Array, weight: jax.Array, activation: Activation) -> Float64Array:
    both = np.einsum("td,bgnd->gtbn", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    gate, up = both.reshape(2, x.shape[0], -1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def _is_close(got: jax.Array, expected: Float64Array) -> bool:
    """Rounded once to the result's dtype; the device's exponential and tangent are good to ten bits."""
    allowed = 2.0**-8 * np.abs(expected) + 2e-3
    return bool(np.all(np.abs(np.asarray(got, np.float64) - expected) <= allowed))


@pytest.mark.parametrize(
    ("tokens", "dtype", "activation"),
    [
        (328, "bfloat16", "silu"),
        pytest.param(512, "float16", "silu", marks=pytest.mark.slow),
        pytest.param(648, "bfloat16", "gelu_tanh", marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_the_oracle_does(tokens: int, dtype: str, activation: Activation) -> None:
    x, weight = _inputs(tokens, 192, 2, dtype)
    got = gated_product(x, weight, activation, interpret=_INTERPRETED)
    assert got.dtype == x.dtype
    assert _is_close(got, _oracle(x, weight, activation))
    # The tolerance bites: halves changed over, blocks off by one, one step of the sum missing.
    assert not _is_close(got, _oracle(x, weight[:, ::-1], activation))
    assert not _is_close(got, _oracle(x, jnp.roll(weight, 1, 0), activation))
    assert not _is_close(got, _oracle(x[:, 64:], weight[..., 64:], activation))
    other: Activation = "silu" if activation == "gelu_tanh" else "gelu_tanh"
    assert not _is_close(got, _oracle(x, weight, other))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = _inputs(136, 128, 1, "bfloat16")
    x = x.at[7].set(jnp.nan).at[135, 3].set(jnp.inf)
    got = np.asarray(gated_product(x, weight, "silu", interpret=_INTERPRETED), np.float32)
    finite = np.isfinite(got).all(axis=1)
    assert np.flatnonzero(~finite).tolist() == [7, 135]


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "message"),
    [
        ((128, 128), "float32", BLOCK, "x is float32 and weight float32: must both be bfloat16 or float16"),
        ((128, 128), "bfloat16", 96, r"weight is \[2, 2, 96, 128\]: must be \[F / 128, 2, 128, D\]"),
        ((128, 96), "bfloat16", BLOCK, "96 columns of x: must be a multiple of 64"),
        ((120, 128), "bfloat16", BLOCK, "120 tokens: must be a multiple of 8, 128 or more"),
        ((132, 128), "bfloat16", BLOCK, "132 tokens: must be a multiple of 8, 128 or more"),
    ],
)
def test_what_it_does_not_take_is_refused(
    shape: tuple[int, int], dtype: str, block: int, message: str
) -> None:
    x = jnp.zeros(shape, jnp.dtype(dtype))
    weight = jnp.zeros((2, 2, block, shape[1]), x.dtype)
    with pytest.raises(NotImplementedError, match=message):
        gated_product(x, weight, "silu")


@pytest.mark.parametrize("tokens", [136, 256, 2048])
def test_it_lowers_for_an_h100(tokens: int) -> None:
    x = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((112, 2, BLOCK, 4096), jnp.bfloat16)
    text = on_abstract_h100(lambda x, w: gated_product(x, w, "silu"), x, weight)
    assert "gated_product" in text and "mosaic_gpu" in text
