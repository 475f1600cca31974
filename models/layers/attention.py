"""Grouped-query attention: projections, norms and rope. What reads the cache is handed in by the runner."""

from __future__ import annotations

from typing import Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.models.config import AttentionOptions, DecoderConfig
from jaxserve.models.layers.linear import linear
from jaxserve.models.layers.norm import RmsNorm
from jaxserve.models.layers.rope import apply_rope
from jaxserve.models.params import declare


class AttendFn[Cache](Protocol):
    """Writes new keys and values to a layer's cache, and attends over what that then holds."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: Cache, options: AttentionOptions
    ) -> tuple[jax.Array, Cache]:
        """Attends.

        Args:
            q: [T, Hq, hd], rope applied; query head h reads kv head h // (Hq // Hkv).
            k, v: [T, Hkv, hd], rope applied to k.
            kv_cache: the layer's cache, in whatever layout the runner keeps.
            options: static.

        Returns:
            The result [T, Hq, hd] in q's dtype, and the updated cache.
        """
        ...


class Attention(nnx.Module):
    """One layer's attention.

    The fused weight is grouped by kv head, qkv [Hkv, g + 2, hd, D] with the g query heads of a group first,
    then its key, then its value: cutting axis 0 over devices leaves each with whole groups.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype: DTypeLike) -> None:
        hidden, head_dim = config.hidden_size, config.head_dim
        heads, group = config.num_kv_heads, config.queries_per_kv
        self.options = config.attention_options(layer)
        self.qkv = declare(
            (heads, group + 2, head_dim, hidden),
            dtype,
            ("kv_heads", None, None, None),
            std=hidden**-0.5,
        )
        self.o = declare(
            (hidden, heads, group, head_dim),
            dtype,
            (None, "kv_heads", None, None),
            std=(config.num_heads * head_dim) ** -0.5,
        )
        self.qkv_bias = (
            declare((heads, group + 2, head_dim), dtype, ("kv_heads", None, None), std=0.02)
            if config.qkv_bias
            else None
        )
        self.o_bias = declare((hidden,), dtype, (None,), std=0.02) if config.o_bias else None
        self.q_norm = self._head_norm(config, dtype)
        self.k_norm = self._head_norm(config, dtype)

    @staticmethod
    def _head_norm(config: DecoderConfig, dtype: DTypeLike) -> RmsNorm | None:
        if not config.qk_norm:
            return None
        return RmsNorm(config.head_dim, dtype, eps=config.norm_eps, plus_one=config.norm_plus_one)

    def __call__[Cache](
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], kv_cache: Cache, attend: AttendFn[Cache]
    ) -> tuple[jax.Array, Cache]:
        """[T, D] -> [T, D] and the updated cache."""
        bias = None if self.qkv_bias is None else self.qkv_bias[...]
        qkv = linear(x, self.qkv[...], bias)  # [T, Hkv, g + 2, hd]
        num_tokens, heads, entries, head_dim = qkv.shape
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        flat_q = q.reshape(num_tokens, heads * (entries - 2), head_dim)
        out, kv_cache = attend(flat_q, k, v, kv_cache, self.options)
        out_bias = None if self.o_bias is None else self.o_bias[...]
        return linear(out.reshape(q.shape), self.o[...], out_bias, contracting=3), kv_cache
