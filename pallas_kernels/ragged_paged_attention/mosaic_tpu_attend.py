"""Attention of one query block over one KV block, in VMEM: online softmax in float32.

Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022. All query heads of a key/value head are rows of one
product, so that a decode token fills ``group`` rows and a chunk's block ``q_tokens * group``. Exponentials have
base 2, with its factor in the scale: that is what the hardware computes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import LANES, Item, KernelConfig, Refs

# Below every score of finite inputs, and finite: the difference of two infinities is NaN.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


def begin(refs: Refs) -> None:
    """Empties the accumulators for an item that has seen no key yet."""
    refs.best[...] = jnp.full(refs.best.shape, _MASKED, jnp.float32)
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)


def attend_block(
    refs: Refs, config: KernelConfig, item: Item, block: jax.Array, q_slot: jax.Array, kv_slot: jax.Array
) -> None:
    """Adds one KV block to an item's accumulators."""
    start = (item.first_page + block * config.kv_pages) * config.page_size
    is_single = item.count == 1

    @pl.when(is_single)
    def _() -> None:
        _attend(refs, config, item, start, q_slot, kv_slot, num_tokens=1, is_masked=True)

    if config.q_tokens == 1:
        return
    sees_all = (start >= item.first_key) & (start + config.kv_tokens <= item.position + 1)
    if config.sliding_window is not None:
        sees_all &= start > item.end - 1 - config.sliding_window
    for is_masked, applies in ((True, ~sees_all), (False, sees_all)):

        @pl.when(~is_single & applies)
        def _(is_masked: bool = is_masked) -> None:
            num_tokens = config.q_tokens
            _attend(refs, config, item, start, q_slot, kv_slot, num_tokens=num_tokens, is_masked=is_masked)


def finish(refs: Refs, config: KernelConfig, item: Item, out_slot: jax.Array) -> None:
    """Normalises an item's accumulators into the buffer that its output is copied from."""

    @pl.when(item.count == 1)
    def _() -> None:
        _normalise(refs, config, out_slot, num_tokens=1)

    if config.q_tokens > 1:

        @pl.when(item.count > 1)
        def _() -> None:
            _normalise(refs, config, out_slot, num_tokens=config.q_tokens)


def _normalise(refs: Refs, config: KernelConfig, out_slot: jax.Array, *, num_tokens: int) -> None:
    rows = num_tokens * config.group
    for head in range(config.kv_heads):
        # A query sees itself at least, so a total is not 0; a NaN must be noticed.
        total = _across(refs.total[head, :rows], config.head_dim)
        out = (refs.acc[head, :rows] / total).astype(refs.out_ring.dtype)
        view, words = _rows(refs.out_ring.at[out_slot, head, pl.ds(0, num_tokens)])
        view[...] = out if words == 1 else pltpu.bitcast(out, jnp.uint32)


def _attend(
    refs: Refs,
    config: KernelConfig,
    item: Item,
    start: jax.Array,
    q_slot: jax.Array,
    kv_slot: jax.Array,
    *,
    num_tokens: int,
    is_masked: bool,
) -> None:
    """Query block of ``num_tokens`` (static) over the KV block whose first key is at position ``start``."""
    exists = seen = None
    if is_masked:
        key = lax.broadcasted_iota(jnp.int32, (config.kv_tokens, config.head_dim), 0)
        exists = (key >= item.first_key - start) & (key < item.end - start)
        seen = _seen(config, item.position - start, num_tokens)
    dtype = jnp.promote_types(refs.q_ring.dtype, config.kv_dtype)
    for head in range(config.kv_heads):
        view, words = _rows(refs.q_ring.at[q_slot, head, pl.ds(0, num_tokens)])
        queries = view[...]
        if words > 1:
            queries = pltpu.bitcast(queries, refs.q_ring.dtype)
        keys, values = _load(refs, config, kv_slot, head, exists)
        scores = _scores(config, queries.astype(dtype), keys.astype(dtype), seen)
        _accumulate(refs, head, scores, values.astype(dtype))


def _seen(config: KernelConfig, position: jax.Array, num_tokens: int) -> jax.Array:
    """Which keys each query sees, ``[rows, keys]``; positions count from the block's first key."""
    shape = (num_tokens * config.group, config.kv_tokens)
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    query = jnp.broadcast_to(position, shape)
    if num_tokens > 1:
        query += lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), config.group)
    seen = key <= query
    if config.sliding_window is not None:
        seen &= key > query - config.sliding_window
    return seen


def _scores(config: KernelConfig, queries: jax.Array, keys: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Scaled, capped and masked scores, times log2(e)."""
    scores = _product(queries, keys, contract_keys=1)
    if config.soft_cap is None:
        scores *= config.scale * _LOG2_E
    else:
        scores = jnp.tanh(scores * (config.scale / config.soft_cap)) * (config.soft_cap * _LOG2_E)
    return scores if seen is None else jnp.where(seen, scores, _MASKED)


def _accumulate(refs: Refs, head: int, scores: jax.Array, values: jax.Array) -> None:
    """One step of the online softmax."""
    rows, head_dim = scores.shape[0], values.shape[1]
    best = refs.best[head, :rows]
    new_best = jnp.maximum(best, jnp.max(scores, axis=1, keepdims=True))
    decay = jnp.exp2(best - new_best)
    # Of a query that saw nothing yet these are ones, which decay to 0 with the first key that it sees.
    weights = jnp.exp2(scores - _across(new_best, scores.shape[1]))
    refs.best[head, :rows] = new_best
    refs.total[head, :rows] = refs.total[head, :rows] * decay + jnp.sum(weights, axis=1, keepdims=True)
    added = _product(weights.astype(values.dtype), values, contract_keys=0)
    refs.acc[head, :rows] = refs.acc[head, :rows] * _across(decay, head_dim) + added


def _load(
    refs: Refs, config: KernelConfig, slot: jax.Array, head: int, exists: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A head's keys and values ``[kv_tokens, head_dim]``, zeros where there is none."""
    block = refs.kv_ring.at[slot]
    if jnp.dtype(config.kv_dtype).itemsize == 4:
        keys, values = (_words(block, config, 2 * head + which) for which in (0, 1))
        if exists is not None:
            keys, values = jnp.where(exists, keys, 0.0), jnp.where(exists, values, 0.0)
        return keys, values
    # A key is the low half of a word and its value the high half; a bfloat16 is the high half of a float32.
    words = _words(block.bitcast(jnp.uint32), config, head)
    if exists is not None:
        words = jnp.where(exists, words, jnp.uint32(0))
    halves = (words << 16, words & jnp.uint32(0xFFFF0000))
    keys, values = (pltpu.bitcast(half, jnp.float32).astype(config.kv_dtype) for half in halves)
    return keys, values


def _words(block: Any, config: KernelConfig, index: int) -> jax.Array:
    """One 32-bit row of every token of a block ``[kv_pages, page_size, words_per_token, head_dim]``."""
    length, head_dim = config.kv_tokens, config.head_dim
    if not config.is_strided:
        return block[:, :, index, :].reshape(length, head_dim)
    return block.reshape(length * config.words_per_token, head_dim)[index :: config.words_per_token, :]


def _rows(ref: Any) -> tuple[Any, int]:
    """Queries or outputs ``[tokens, group / words, words, head_dim]`` as 32-bit rows, and ``words``."""
    words = 4 // ref.dtype.itemsize
    tokens, groups, _, head_dim = ref.shape
    view = ref if words == 1 else ref.bitcast(jnp.uint32)
    return view.reshape(tokens * groups, head_dim), words


def _across(x: jax.Array, width: int) -> jax.Array:
    """``[rows, 128]`` with the same value in all lanes, as ``[rows, width]``."""
    copies = -(-width // LANES)
    return (x if copies == 1 else jnp.concatenate([x] * copies, axis=1))[:, :width]


def _product(a: jax.Array, b: jax.Array, *, contract_keys: int) -> jax.Array:
    """``a @ b`` or ``a @ b.T``, accumulated in float32; float32 operands are not rounded to fewer bits."""
    return lax.dot_general(
        a,
        b,
        (((1,), (contract_keys,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
