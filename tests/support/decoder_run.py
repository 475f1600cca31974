"""Runs the real decoder in tests over the simplest cache there is: a row of keys and values a sequence."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import AttentionOptions, DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import Params, bind, param_specs
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import ShardingRules, make_mesh, shardings_for
from jaxserve.models.weights import assemble
from tests.support.tiny_models import HF_CONFIGS, hf_weights


@functools.cache
def load_tiny(name: str, dtype=jnp.float32, devices: int = 1) -> tuple[Decoder, Params]:
    """A tiny model's decoder, unbound, and its parameters on a mesh of some devices."""
    hf, tensors = HF_CONFIGS[name], hf_weights(name)
    family = find_family(hf)
    config = family.config_from_hf(hf)
    decoder = Decoder(config, dtype)
    specs = param_specs(decoder)
    shardings = shardings_for(specs, make_mesh(devices), ShardingRules())
    sources = family.weight_map(config)
    params = {
        path: jax.device_put(assemble(sources[path], tensors.__getitem__, spec), shardings[path])
        for path, spec in specs.items()
    }
    return decoder, params


def empty_cache(
    config: DecoderConfig, num_slots: int, length: int, dtype=jnp.float32
) -> tuple[jax.Array, ...]:
    """One array [num_slots, length, 2, Hkv, hd] a layer; NaN, so that reading what nobody wrote shows."""
    shape = (num_slots, length, 2, config.num_kv_heads, config.head_dim)
    return tuple(jnp.full(shape, jnp.nan, dtype) for _ in range(config.num_layers))


@dataclasses.dataclass(frozen=True)
class DenseAttend:
    """Attention over a plain cache; token t belongs to slots[t] (out of range: padding, writes nothing)."""

    slots: jax.Array
    positions: jax.Array

    def __call__(self, q, k, v, kv_cache, options: AttentionOptions):
        """See `jaxserve.models.layers.attention.AttendFn`."""
        kv_cache = kv_cache.at[self.slots, self.positions].set(jnp.stack([k, v], axis=1), mode="drop")
        rows = kv_cache.at[self.slots].get(mode="clip")  # [T, length, 2, Hkv, hd]
        there = jnp.arange(kv_cache.shape[1])[None, :]
        seen = there <= self.positions[:, None]
        if options.sliding_window is not None:
            seen &= there > self.positions[:, None] - options.sliding_window
        rows = jnp.where(seen[:, :, None, None, None], rows.astype(jnp.float32), 0.0)
        rows = jnp.repeat(rows, q.shape[1] // k.shape[1], axis=3)
        exact = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("thd,tkhd->thk", q.astype(jnp.float32), rows[:, :, 0], precision=exact)
        scores = scores * options.scale
        if options.soft_cap is not None:
            scores = jnp.tanh(scores / options.soft_cap) * options.soft_cap
        weights = jax.nn.softmax(jnp.where(seen[:, None, :], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("thk,tkhd->thd", weights, rows[:, :, 1], precision=exact)
        return out.astype(q.dtype), kv_cache


def run(decoder: Decoder, params: Params, tokens, slots, positions, kv_cache):
    """One step: float32 logits [T, vocab] as numpy, and the updated caches."""
    arrays = [jnp.asarray(a, jnp.int32) for a in (tokens, slots, positions)]
    logits, kv_cache = _step_of(decoder)(params, *arrays, kv_cache)
    return np.asarray(logits), kv_cache


@functools.cache
def _step_of(decoder: Decoder):
    """One jitted function for each decoder, so that steps of the same shape compile once."""

    @jax.jit
    def step(params, tokens, slots, positions, kv_cache):
        model = bind(decoder, params)
        hidden, kv_cache = model(tokens, positions, kv_cache, DenseAttend(slots, positions))
        return model.logits(hidden), kv_cache

    return step
