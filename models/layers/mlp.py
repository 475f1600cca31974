"""Gated feed-forward layer (Shazeer 2020): down(activation(gate(x)) * up(x))."""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.models.config import Activation, DecoderConfig
from jaxserve.models.layers.linear import linear
from jaxserve.models.params import declare

# Logical axes of the fused weight, and of what comes of multiplying with it.
GATE_UP_AXES = ("ffn", None, None, None)
GATED_AXES = (None, "ffn")
_LANES = 128
_MOST_DEVICES = 8


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """The gate's non-linearity."""
    match activation:
        case "silu":
            return jax.nn.silu(x)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)


def gate_up_block(ffn: int) -> int:
    """Columns that gate and up take in turn: a TPU vector's lanes, or fewer where eight devices could not
    have whole blocks otherwise.
    """
    return math.gcd(ffn // math.gcd(ffn, _MOST_DEVICES), _LANES)


class GateFn(Protocol):
    """The first half of the layer: one product with gate and up, and the gate applied."""

    def __call__(self, x: jax.Array, gate_up: jax.Array, activation: Activation) -> jax.Array:
        """[T, D] and [F / b, 2, b, D] -> [T, F] in x's dtype."""
        ...


def multiply_and_gate(x: jax.Array, gate_up: jax.Array, activation: Activation) -> jax.Array:
    """A `GateFn` for every device; between product and result in float32, rounded before and after."""
    both = linear(x, gate_up).astype(jnp.float32)  # [T, F / b, 2, b]
    inner = activate(both[:, :, 0], activation) * both[:, :, 1]
    return inner.reshape(x.shape[0], -1).astype(x.dtype)


class Mlp(nnx.Module):
    """Weights gate_up [F / b, 2, b, D] and down [D, F]; gate and up are one product.

    Gate and up alternate in blocks of b columns, so that cutting axis 0 over devices leaves each with both
    halves of its columns, and taking the halves apart moves whole vectors.
    """

    def __init__(self, config: DecoderConfig, dtype: DTypeLike) -> None:
        hidden, ffn = config.hidden_size, config.intermediate_size
        block = gate_up_block(ffn)
        self.activation: Activation = config.activation
        self.gate_up = declare((ffn // block, 2, block, hidden), dtype, GATE_UP_AXES, std=hidden**-0.5)
        self.down = declare((hidden, ffn), dtype, (None, "ffn"), std=ffn**-0.5)

    def __call__(self, x: jax.Array, gate: GateFn = multiply_and_gate) -> jax.Array:
        """[T, D] -> [T, D]."""
        return linear(gate(x, self.gate_up[...], self.activation), self.down[...])
