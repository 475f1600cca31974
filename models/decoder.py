"""The one decoder: every family is this with another `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.attention import AttendFn, Attention
from jaxserve.models.layers.embed import Embedding
from jaxserve.models.layers.mlp import GateFn, Mlp, multiply_and_gate
from jaxserve.models.layers.norm import RmsNorm
from jaxserve.models.layers.rope import rope_table


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normed before and, in sandwich style, after."""

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike) -> None:
        self.attention_norm = _norm(config, dtype)
        self.attention = Attention(config, layer, dtype)
        self.post_attention_norm = _norm(config, dtype) if config.sandwich_norms else None
        self.mlp_norm = _norm(config, dtype)
        self.mlp = Mlp(config, dtype)
        self.post_mlp_norm = _norm(config, dtype) if config.sandwich_norms else None

    def __call__[Cache](
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        kv_cache: Cache,
        attend: AttendFn[Cache],
        gate: GateFn,
    ) -> tuple[jax.Array, Cache]:
        """[T, D] -> [T, D] and the updated cache of this layer."""
        out, kv_cache = self.attention(self.attention_norm(x), rope, kv_cache, attend)
        if self.post_attention_norm is not None:
            out = self.post_attention_norm(out)
        x = x + out
        out = self.mlp(self.mlp_norm(x), gate)
        if self.post_mlp_norm is not None:
            out = self.post_mlp_norm(out)
        return x + out, kv_cache


class Decoder(nnx.Module):
    """A decoder-only transformer over flattened tokens of many sequences.

    Building one allocates nothing: `jaxserve.models.params.bind` gives it weights. Layers are unrolled, with
    one cache array a layer, because a scan would copy every layer's pages in and out.
    """

    def __init__(self, config: DecoderConfig, dtype: DTypeLike) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([DecoderLayer(config, i, dtype) for i in range(config.num_layers)])
        self.final_norm = _norm(config, dtype)
        self.lm_head = (
            None if config.tie_embeddings else Embedding(config.vocab_size, config.hidden_size, dtype)
        )

    def __call__[Cache](
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        kv_cache: Sequence[Cache],
        attend: AttendFn[Cache],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs all layers.

        Args:
            token_ids: int32 [T], each in [0, vocab_size).
            positions: int32 [T], each token's place in its own sequence.
            kv_cache: one a layer, of the type that ``attend`` understands.
            attend: which tokens belong together is known to it alone.

        Returns:
            Hidden states after the final norm, [T, D] in the model's dtype, and the updated caches.
        """
        hidden, caches, _ = self.with_states(token_ids, positions, kv_cache, attend, layers=())
        return hidden, caches

    def with_states[Cache](
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        kv_cache: Sequence[Cache],
        attend: AttendFn[Cache],
        *,
        layers: Sequence[int],
        gate: GateFn = multiply_and_gate,
    ) -> tuple[jax.Array, tuple[Cache, ...], tuple[jax.Array, ...]]:
        """Runs all layers, and keeps the residual stream as it is after some of them.

        Args:
            layers: counted from 1, in increasing order; the last is ``num_layers``.
            gate: how feed-forward layers multiply with gate and up.

        Returns:
            What calling the decoder returns, and one [T, D] for each of ``layers``.
        """
        config = self.config
        x = self.embed(token_ids)
        if config.embedding_scale is not None:
            # Rounded like the embedding: 25.298 is 25.25 in bfloat16, and that is what Gemma trained with.
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        # A dict, not a set: the compile cache wants the same program from every process.
        ropes = dict.fromkeys(config.layer_rope(i) for i in range(config.num_layers))
        tables = {rope: rope_table(rope, config.head_dim, positions) for rope in ropes}
        caches: list[Cache] = []
        states: list[jax.Array] = []
        for i, (layer, cache) in enumerate(zip(self.layers, kv_cache, strict=True)):
            x, cache = layer(x, tables[config.layer_rope(i)], cache, attend, gate)
            caches.append(cache)
            if i + 1 in layers:
                states.append(x)
        return self.final_norm(x), tuple(caches), tuple(states)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores of the next token: hidden states [R, D] -> float32 [R, vocab_size], soft cap applied."""
        head = self.embed if self.lm_head is None else self.lm_head
        logits = head.logits(hidden)
        cap = self.config.logit_soft_cap
        return logits if cap is None else jnp.tanh(logits / cap) * cap


def _norm(config: DecoderConfig, dtype: DTypeLike) -> RmsNorm:
    return RmsNorm(config.hidden_size, dtype, eps=config.norm_eps, plus_one=config.norm_plus_one)
