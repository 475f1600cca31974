"""The one matrix product of the models."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxserve.models.pairs import is_paired, multiply_row


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    contracting: int = 1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiplies activations with a weight whose last axes are the ones summed over.

    Args:
        x: [T, *K] with ``contracting`` axes in K.
        weight: [*N, *K], same dtype as x; or pairs (`jaxserve.models.pairs`), if T is 1.
        bias: [*N] or None.
        contracting: number of axes that are summed over.
        dtype: of the result; None: x's.

    Returns:
        [T, *N]: accumulated, and the bias added, in float32, then rounded.
    """
    kept, summed = weight.shape[: weight.ndim - contracting], weight.shape[weight.ndim - contracting :]
    # Two plain matrices: XLA:CPU would transpose a weight of more dimensions in every call. Merging axes
    # costs nothing, on a mesh too, because only the first of the axes merged here is ever cut.
    rows = x.reshape(x.shape[0], -1)
    matrix = weight.reshape(math.prod(kept), math.prod(summed))
    dtype = x.dtype if dtype is None else dtype
    if is_paired(weight):
        out = multiply_row(rows, matrix)
    else:
        out = lax.dot_general(
            rows,
            matrix,
            (((1,), (1,)), ((), ())),
            # Without this GPUs would multiply float32 in TF32 and TPUs in bfloat16.
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            # The product rounds by itself: a float32 result would cost a GPU another pass over memory.
            preferred_element_type=dtype if bias is None else jnp.float32,
        )
    out = out.reshape(x.shape[0], *kept)
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None]
    return out.astype(dtype)
