"""bfloat16 weights read two at a time: the fast product of one row on a CPU, from the same memory.

XLA:CPU multiplies one bfloat16 row with a matrix six times slower than two rows, and one float32 row at half
of the memory's speed. A little-endian uint32 holds two neighbouring bfloat16 weights, each of which is the
upper half of a float32: a shift and a mask make them float32, and slices of one vector register accumulate.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Pairs that accumulate side by side: 16 float32 are one AVX-512 register (measured: 8 and 32 are slower).
_LANES = 16
_HIGH = np.uint32(0xFFFF0000)


def pair_views(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters for `multiply_row`: uint32 ``[..., K / 2]`` views of bfloat16 matrices ``[..., K]``.

    Vectors, other dtypes and matrices whose rows are no whole number of slices are passed on as they are.
    No memory is taken on a host device: a view shares the array's buffer, and keeps it alive.

    Args:
        params: each on one CPU device.
    """
    return {path: _paired(array) if _can_pair(array) else array for path, array in params.items()}


def is_paired(array: jax.Array) -> bool:
    """Whether an array holds pairs of bfloat16."""
    return array.dtype == jnp.uint32


def unpair(pairs: jax.Array) -> jax.Array:
    """The bfloat16 values of pairs, ``[..., K / 2]`` -> ``[..., K]``; a copy, so for few rows."""
    return lax.bitcast_convert_type(pairs, jnp.bfloat16).reshape(*pairs.shape[:-1], -1)


def multiply_row(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """The product of one row with a matrix of pairs, accumulated in float32.

    Args:
        x: bfloat16 [1, K].
        pairs: uint32 [N, K / 2], K a multiple of 32.

    Returns:
        float32 [1, N].
    """
    assert x.shape == (1, 2 * pairs.shape[1]), (x.shape, pairs.shape)
    even, odd = x[:, 0::2].astype(jnp.float32), x[:, 1::2].astype(jnp.float32)
    total = jnp.zeros((pairs.shape[0], _LANES), jnp.float32)
    for first in range(0, pairs.shape[1], _LANES):
        here = slice(first, first + _LANES)
        low = lax.bitcast_convert_type(pairs[:, here] << 16, jnp.float32)
        high = lax.bitcast_convert_type(pairs[:, here] & _HIGH, jnp.float32)
        total += low * even[:, here] + high * odd[:, here]
    # Without the barrier XLA would fuse the sum over lanes into the loop, and no longer use vectors.
    return (lax.optimization_barrier(total) @ jnp.ones(_LANES, jnp.float32))[None]


def _can_pair(array: jax.Array) -> bool:
    return array.dtype == jnp.bfloat16 and array.ndim >= 2 and array.shape[-1] % (2 * _LANES) == 0


def _paired(array: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(array).view(np.uint32), array.sharding)
