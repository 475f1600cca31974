"""Root-mean-square norm (Zhang and Sennrich 2019), with the two roundings that families use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.models.params import declare


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, plus_one: bool) -> jax.Array:
    """Divides by the root mean square of the last axis, computed in float32, and scales by the weight.

    Llama rounds to x's dtype before it multiplies with the weight; Gemma (``plus_one``) multiplies with
    (1 + weight) in float32 and rounds last.

    Args:
        x: [..., D].
        weight: [D].

    Returns:
        [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    if plus_one:
        return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight


class RmsNorm(nnx.Module):
    """A norm with its weight [dim]."""

    def __init__(self, dim: int, dtype: DTypeLike, *, eps: float, plus_one: bool) -> None:
        self.eps = eps
        self.plus_one = plus_one
        self.weight = declare((dim,), dtype, (None,), mean=0.0 if plus_one else 1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight[...], eps=self.eps, plus_one=self.plus_one)
