"""Noise that depends on a seed, a position and a token id, and on nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def gumbel(seed: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
    """Standard Gumbel noise, float32; arguments are uint32 and broadcast against each other.

    Threefry-2x32 (Salmon et al. 2011) keyed by seed and position and counted by token id, written out here
    because then XLA makes one loop of it: `jax.random` keeps every round's words in memory on a CPU, which
    takes 2.5 times as long.
    """
    words = threefry(seed, position, token, jnp.zeros_like(token))
    # 23 bits, and halves: exact in float32. A 1 would be infinite noise: drawn, whatever its logit.
    uniform = ((words[0] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def threefry(
    key0: jax.Array, key1: jax.Array, counter0: jax.Array, counter1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, elementwise on uint32."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = counter0 + keys[0], counter1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
