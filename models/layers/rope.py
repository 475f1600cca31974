"""Rotary position embedding (Su et al. 2021), rotating the two halves of a head against each other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.models.config import LinearScaling, Llama3Scaling, RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians per position of each rotated pair: float32 [head_dim / 2].

    In float32 from the start: at long contexts a more exact frequency would turn by another angle than
    the one that the model was trained with.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.power(np.float32(config.theta), exponents)).astype(np.float32)
    match config.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return (frequencies / np.float32(factor)).astype(np.float32)
        case Llama3Scaling():
            return _llama3(frequencies, config.scaling)


def _llama3(frequencies: npt.NDArray[np.float32], scaling: Llama3Scaling) -> npt.NDArray[np.float32]:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # Turns that a pair makes within the original context: few for low frequencies, many for high ones.
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    scaled = frequencies / np.float32(scaling.factor)
    return ((1.0 - kept) * scaled + kept * frequencies).astype(np.float32)


def rope_table(config: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of every token's angles.

    Args:
        positions: int32 [T].

    Returns:
        Two float32 arrays [T, head_dim / 2].
    """
    frequencies = jnp.asarray(inverse_frequencies(config, head_dim))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates element i of every head with element i + hd/2, in float32.

    Args:
        x: [T, H, hd], or with more head axes [T, H, g, hd].
        table: from `rope_table`.

    Returns:
        x's shape and dtype.
    """
    head_axes = tuple(range(1, x.ndim - 1))
    cos, sin = (jnp.expand_dims(part, head_axes) for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
