"""Token embedding and the head over the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.models.layers.linear import linear
from jaxserve.models.pairs import is_paired, unpair
from jaxserve.models.params import declare


class Embedding(nnx.Module):
    """A table [vocab, hidden]: rows are embeddings, and products with it are logits."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: DTypeLike) -> None:
        self.weight = declare((vocab_size, hidden_size), dtype, ("vocab", None), std=1.0 / hidden_size**0.5)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Rows of int32 [T] ids, each in [0, vocab): [T, hidden]. Ids are checked on the host."""
        rows = jnp.take(self.weight[...], token_ids, axis=0, mode="clip")
        return unpair(rows) if is_paired(rows) else rows

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, hidden] -> float32 [R, vocab]."""
        return linear(hidden, self.weight[...], dtype=jnp.float32)
