"""The step: one function for every bucket, prefill and decode alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.core.batch import NUM_ROW_FIELDS
from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError
from jaxserve.models.config import Activation, AttentionOptions
from jaxserve.models.decoder import Decoder
from jaxserve.models.layers.attention import AttendFn
from jaxserve.models.layers.mlp import GATE_UP_AXES, GATED_AXES, GateFn, multiply_and_gate
from jaxserve.models.params import Params, bind
from jaxserve.models.sharding import HEADS_AXES, Placement
from jaxserve.pallas_kernels.dispatch import NoImplementationError
from jaxserve.pallas_kernels.gated_product.mosaic_gpu import gated_product
from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.api import (
    AttentionMetadata,
    Implementation,
    ragged_paged_attention,
)
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import token_places
from jaxserve.runner.kv_cache import cache_specs
from jaxserve.runner.sampler import Sampled, SamplingKind, draw, has_stopped, sample, take_best
from jaxserve.runner.slots import SlotState, take, take_sampling, update_pages, write_hidden, write_sampled

NOT_FINITE = -1  # in place of a token id: the row's logits were not
NOT_SAMPLED = -2  # the row of a loop has stopped

Caches = tuple[KVPages, ...]


class StepOutput(NamedTuple):
    """What a step sampled.

    Attributes:
        token_ids: int32 [decode steps, R]; `NOT_FINITE` or `NOT_SAMPLED` in place of an id.
        sampled: the same with log-probabilities; None in a loop, which reports none.
    """

    token_ids: jax.Array
    sampled: Sampled | None


class _StepRows(NamedTuple):
    """The rows of one forward pass, each [R]: slot, start, number of tokens, whether it samples (bool)."""

    slot: jax.Array
    start: jax.Array
    num_tokens: jax.Array
    samples: jax.Array


StepFn = Callable[[Params, Caches, SlotState, jax.Array], tuple[Caches, SlotState, StepOutput]]
_ForwardFn = Callable[[Params, Caches, SlotState, _StepRows], tuple[Caches, SlotState, Sampled]]


def make_step(
    module: Decoder,
    bucket: Bucket,
    placement: Placement,
    implementation: Implementation,
    *,
    kind: SamplingKind = SamplingKind.ANY,
    exits_early: bool = True,
    hidden_layers: tuple[int, ...] = (),
) -> StepFn:
    """The function that `Programs` compiles for a bucket; caches and slots are donated.

    Its arguments: parameters, one `KVPages` a layer, slots, and ``StepBatch.inputs`` int32 [7, R]. It returns
    caches, slots, and what was sampled.

    Args:
        kind: the most that a row may ask of the sampler.
        exits_early: a loop ends with its last row; if not, it always takes all of its steps, so that the host
            need not look at the device after each.
        hidden_layers: whose states ``slots.hidden`` takes (`Decoder.with_states`); none: it is None.
    """
    forward = _make_forward(module, bucket, placement, implementation, kind=kind, hidden_layers=hidden_layers)

    def step(
        params: Params, caches: Caches, slots: SlotState, inputs: jax.Array
    ) -> tuple[Caches, SlotState, StepOutput]:
        page_table = update_pages(slots.page_table, inputs[NUM_ROW_FIELDS:])
        slots = dataclasses.replace(slots, page_table=page_table)
        step_rows = _StepRows(inputs[0], inputs[1], inputs[2], inputs[3] > 0)
        if bucket.decode_steps > 1:
            loop = _make_loop(functools.partial(forward, params), bucket, exits_early=exits_early)
            return loop(caches, slots, step_rows)
        caches, slots, sampled = forward(params, caches, slots, step_rows)
        return caches, slots, StepOutput(_token_ids(sampled)[None], sampled)

    return step


def _token_ids(sampled: Sampled) -> jax.Array:
    """One array to read per step: a row whose logits were not finite reports a negative id."""
    return jnp.where(sampled.finite, sampled.token_ids, NOT_FINITE)


class _Loop(NamedTuple):
    """What a loop carries: how many steps are done, which rows go on, and which have stopped."""

    num_done: jax.Array
    running: jax.Array
    stopped: jax.Array
    token_ids: jax.Array
    caches: Caches
    slots: SlotState


def _make_loop(
    forward: Callable[[Caches, SlotState, _StepRows], tuple[Caches, SlotState, Sampled]],
    bucket: Bucket,
    *,
    exits_early: bool,
) -> Callable[[Caches, SlotState, _StepRows], tuple[Caches, SlotState, StepOutput]]:
    """Decode steps one after the other, each row until its stop token or its ``num_tokens``.

    A row that stops leaves a mark where the next step of its request begins. If that is a loop, and in flight
    already, it does nothing for this row.
    """

    def run(caches: Caches, slots: SlotState, rows: _StepRows) -> tuple[Caches, SlotState, StepOutput]:
        sampling = take_sampling(slots.sampling, rows.slot)
        newest = slots.tokens.at[rows.slot, rows.start].get(mode="fill", fill_value=0)
        stopped = (newest < 0) | has_stopped(sampling, newest, rows.start)

        def goes_on(loop: _Loop) -> jax.Array:
            is_left = loop.num_done < bucket.decode_steps
            return is_left & jnp.any(loop.running) if exits_early else is_left

        def advance(loop: _Loop) -> _Loop:
            running = loop.running
            position = jnp.where(running, rows.start + loop.num_done, 0)
            # Rows that have stopped are padding from then on.
            slot = jnp.where(running, rows.slot, loop.slots.tokens.shape[0])
            now = _StepRows(slot, position, running.astype(jnp.int32), running)
            caches, slots, sampled = forward(loop.caches, loop.slots, now)
            ends = has_stopped(sampling, sampled.token_ids, position + 1) | ~sampled.finite
            stopped = loop.stopped | (running & ends)
            num_done = loop.num_done + 1
            return _Loop(
                num_done,
                running & ~stopped & (num_done < rows.num_tokens),
                stopped,
                loop.token_ids.at[loop.num_done].set(jnp.where(running, _token_ids(sampled), NOT_SAMPLED)),
                caches,
                slots,
            )

        first = _Loop(
            jnp.int32(0),
            ~stopped & (rows.num_tokens > 0),
            stopped,
            jnp.full((bucket.decode_steps, bucket.rows), NOT_SAMPLED, jnp.int32),
            caches,
            slots,
        )
        last = jax.lax.while_loop(goes_on, advance, first)
        mark, end = jnp.full_like(rows.slot, NOT_SAMPLED), rows.start + rows.num_tokens
        tokens = write_sampled(last.slots.tokens, rows.slot, end, mark, last.stopped)
        return last.caches, dataclasses.replace(last.slots, tokens=tokens), StepOutput(last.token_ids, None)

    return run


def _make_forward(
    module: Decoder,
    bucket: Bucket,
    placement: Placement,
    implementation: Implementation,
    *,
    kind: SamplingKind,
    hidden_layers: tuple[int, ...],
) -> _ForwardFn:
    """One pass of the model over the rows, and a token for each that samples."""
    devices = placement.mesh.devices
    uses_kernel = devices.size == 1 and devices.flat[0].platform == "gpu"
    gate = _make_gate(placement)

    def forward(
        params: Params, caches: Caches, slots: SlotState, rows: _StepRows
    ) -> tuple[Caches, SlotState, Sampled]:
        model = bind(module, params)
        slot, start, num_tokens, samples = rows
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
        hidden, caches, states = model.with_states(
            token_ids, positions, caches, attend, layers=hidden_layers, gate=gate
        )
        last = jnp.maximum(ends - 1, 0)
        logits = model.logits(hidden[last])
        if slots.hidden is not None:
            rows_of_layers = [state[last] for state in states]
            slots = dataclasses.replace(
                slots, hidden=write_hidden(slots.hidden, slot, rows_of_layers, samples)
            )
        # Rows that do not sample have no position, and so cost nothing in the sampler.
        position = jnp.where(samples, end, 0)
        match kind:
            case SamplingKind.GREEDY:
                sampled = take_best(logits)
            case SamplingKind.DRAWN:
                sampled = draw(logits, take_sampling(slots.sampling, slot), position, uses_kernel=uses_kernel)
            case SamplingKind.ANY:
                sampling = take_sampling(slots.sampling, slot)
                histories = take(slots.tokens, slot)
                sampled = sample(logits, sampling, histories, position, uses_kernel=uses_kernel)
        tokens = write_sampled(slots.tokens, slot, end, sampled.token_ids, samples)
        return caches, dataclasses.replace(slots, tokens=tokens), sampled

    return forward


def _make_attend(
    metadata: AttentionMetadata, cache: KVPages, placement: Placement, implementation: Implementation
) -> AttendFn[KVPages]:
    """Attention over the mesh: heads are independent, so each device attends with its own, and none talks."""
    heads, whole = placement.spec(HEADS_AXES), placement.spec()

    @functools.cache  # traced once, not once a layer: layers differ in their options only
    def kernel(scale: float, sliding_window: int | None, soft_cap: float | None) -> Callable[..., Any]:
        attention = functools.partial(
            _attention_or_error,
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


def _make_gate(placement: Placement) -> GateFn:
    """One kernel on GPUs that have it; columns are independent, so each device gates its own."""
    if placement.mesh.devices.flat[0].platform != "gpu":
        return multiply_and_gate

    @functools.cache  # traced once, not once a layer
    def kernel(activation: Activation) -> Callable[[jax.Array, jax.Array], jax.Array]:
        sharded = jax.shard_map(
            functools.partial(_gated_product_or_plain, activation=activation),
            mesh=placement.mesh,
            in_specs=(placement.spec(), placement.spec(GATE_UP_AXES)),
            out_specs=placement.spec(GATED_AXES),
            check_vma=False,
        )
        return jax.jit(sharded, inline=True)

    return lambda x, gate_up, activation: kernel(activation)(x, gate_up)


def _gated_product_or_plain(x: jax.Array, gate_up: jax.Array, activation: Activation) -> jax.Array:
    try:
        return gated_product(x, gate_up, activation)
    except NotImplementedError:
        return multiply_and_gate(x, gate_up, activation)


def _attention_or_error(*args: Any, implementation: Implementation, **kwargs: Any) -> Any:
    """`ragged_paged_attention`; raises ConfigError where that refuses the input, while it is traced."""
    try:
        return ragged_paged_attention(*args, implementation=implementation, **kwargs)
    except (NotImplementedError, NoImplementationError) as error:
        refusals = error.exceptions if isinstance(error, NoImplementationError) else (error,)
        reasons = "; ".join(map(str, refusals))
        raise ConfigError(f"attention={implementation!r}: {reasons}") from error
