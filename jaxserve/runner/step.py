"""The step: one function for every bucket, prefill and decode alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.core.plan import Bucket
from jaxserve.models.config import AttentionOptions
from jaxserve.models.decoder import Decoder
from jaxserve.models.layers.attention import AttendFn
from jaxserve.models.params import Params, bind
from jaxserve.models.sharding import HEADS_AXES, Placement
from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.api import (
    AttentionMetadata,
    Implementation,
    ragged_paged_attention,
)
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import token_places
from jaxserve.runner.kv_cache import cache_specs
from jaxserve.runner.sampler import Sampled, sample, take_best
from jaxserve.runner.slots import SlotState, take, take_sampling, update_pages, write_hidden, write_sampled

Caches = tuple[KVPages, ...]
StepFn = Callable[[Params, Caches, SlotState, jax.Array, jax.Array], tuple[Caches, SlotState, Sampled]]


def make_step(
    module: Decoder,
    bucket: Bucket,
    placement: Placement,
    implementation: Implementation,
    *,
    greedy: bool = False,
    hidden_layers: tuple[int, ...] = (),
) -> StepFn:
    """The function that `Programs` compiles for a bucket; caches and slots are donated.

    Its arguments: parameters, one `KVPages` a layer, slots, ``StepBatch.rows`` int32 [4, R] and
    ``StepBatch.page_updates`` int32 [3, R]. It returns caches, slots, and what was sampled per row.

    Args:
        greedy: for steps of which every row `is_greedy`.
        hidden_layers: whose states ``slots.hidden`` takes (`Decoder.with_states`); none: it is None.
    """

    def step(
        params: Params, caches: Caches, slots: SlotState, rows: jax.Array, page_updates: jax.Array
    ) -> tuple[Caches, SlotState, Sampled]:
        model = bind(module, params)
        slot, start, num_tokens, samples = rows[0], rows[1], rows[2], rows[3] > 0
        slots = dataclasses.replace(slots, page_table=update_pages(slots.page_table, page_updates))
        end = start + num_tokens
        ends = jnp.cumsum(num_tokens)
        metadata = AttentionMetadata(
            page_table=take(slots.page_table, slot),
            kv_lens=end,
            cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
            max_q_len=1 if bucket.is_decode else bucket.tokens,
        )
        places = token_places(metadata, bucket.tokens, caches[0].layout.page_size)
        positions = jnp.maximum(places.position, 0)
        token_ids = slots.tokens.at[slot[places.row], positions].get(mode="fill", fill_value=0)
        attend = _make_attend(metadata, cache_specs(caches[0], placement), placement, implementation)
        hidden, caches, states = model.with_states(token_ids, positions, caches, attend, layers=hidden_layers)
        last = jnp.maximum(ends - 1, 0)
        logits = model.logits(hidden[last])
        if slots.hidden is not None:
            rows_of_layers = [state[last] for state in states]
            slots = dataclasses.replace(
                slots, hidden=write_hidden(slots.hidden, slot, rows_of_layers, samples)
            )
        # Rows that do not sample have no position, and so cost nothing in the sampler.
        position = jnp.where(samples, end, 0)
        if greedy:
            sampled = take_best(logits)
        else:
            sampled = sample(logits, take_sampling(slots.sampling, slot), take(slots.tokens, slot), position)
        tokens = write_sampled(slots.tokens, slot, end, sampled.token_ids, samples)
        # One array to read per step: a row whose logits were not finite reports a negative id.
        sampled = sampled._replace(token_ids=jnp.where(sampled.finite, sampled.token_ids, -1))
        return caches, dataclasses.replace(slots, tokens=tokens), sampled

    return step


def _make_attend(
    metadata: AttentionMetadata, cache: KVPages, placement: Placement, implementation: Implementation
) -> AttendFn[KVPages]:
    """Attention over the mesh: heads are independent, so each device attends with its own, and none talks."""
    heads, whole = placement.spec(HEADS_AXES), placement.spec()

    @functools.cache  # traced once, not once a layer: layers differ in their options only
    def kernel(scale: float, sliding_window: int | None, soft_cap: float | None) -> Callable[..., Any]:
        attention = functools.partial(
            ragged_paged_attention,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            implementation=implementation,
            platform=placement.mesh.devices.flat[0].platform,
        )
        sharded = jax.shard_map(
            attention,
            mesh=placement.mesh,
            in_specs=(heads, heads, heads, cache, whole),
            out_specs=(heads, cache),
            check_vma=False,
        )
        return jax.jit(sharded, inline=True)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: KVPages, options: AttentionOptions
    ) -> tuple[jax.Array, KVPages]:
        attention = kernel(options.scale, options.sliding_window, options.soft_cap)
        return attention(q, k, v, kv_cache, metadata)

    return attend
