"""Attention of one query block over one KV block, in VMEM: online softmax in float32.

Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022. All query heads of a key/value head are rows of one
product, so that a decode token fills ``group`` rows and a chunk's block ``q_tokens * group``. Exponentials
have base 2, with its factor in the scale: that is what the hardware computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import LANES, Item, KernelConfig, Refs

# Below every score of finite inputs, and finite: the difference of two infinities is NaN.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)


def begin(refs: Refs, config: KernelConfig, item: Item) -> None:
    """Empties the accumulators for an item that has seen no key yet."""

    def empty(num_tokens: int) -> None:
        rows = num_tokens * config.group
        refs.best[:, :rows] = jnp.full((config.kv_heads, rows, LANES), _MASKED, jnp.float32)
        refs.total[:, :rows] = jnp.zeros((config.kv_heads, rows, LANES), jnp.float32)
        refs.acc[:, :rows] = jnp.zeros((config.kv_heads, rows, config.width), jnp.float32)

    _by_size(config, item, empty)


def attend_block(
    refs: Refs, config: KernelConfig, item: Item, block: jax.Array, q_slot: jax.Array, kv_slot: jax.Array
) -> None:
    """Adds one KV block to an item's accumulators."""
    start = (item.first_page + block * config.kv_pages) * config.page_size

    def attend(num_tokens: int) -> None:
        if num_tokens == 1:
            _attend_token(refs, config, item, start, q_slot, kv_slot)
        else:
            _attend_chunk(refs, config, item, start, q_slot, kv_slot)

    _by_size(config, item, attend)


def finish(refs: Refs, config: KernelConfig, item: Item, out_slot: jax.Array) -> None:
    """Normalises an item's accumulators into the buffer that its output is copied from."""

    def normalise(num_tokens: int) -> None:
        rows = num_tokens * config.group

        def normalise_head(head: Any, _: None) -> None:
            # A query sees itself at least, so a total is not 0; a NaN must be noticed.
            total = _across(refs.total[head, :rows], config.width)
            out = (refs.acc[head, :rows] / total).astype(refs.out_ring.dtype)
            view, words = _rows(refs.out_ring.at[out_slot, head, pl.ds(0, num_tokens)])
            view[...] = out if words == 1 else pltpu.bitcast(out, jnp.uint32)

        lax.fori_loop(0, config.kv_heads, normalise_head, None, unroll=num_tokens == 1)

    _by_size(config, item, normalise)


def _by_size(config: KernelConfig, item: Item, do: Callable[[int], None]) -> None:
    """Runs the code for one token, or for a whole query block: both are compiled, with static sizes."""
    pl.when(item.count == 1)(functools.partial(do, 1))
    if config.q_tokens > 1:
        pl.when(item.count > 1)(functools.partial(do, config.q_tokens))


def _attend_token(
    refs: Refs, config: KernelConfig, item: Item, start: jax.Array, q_slot: jax.Array, kv_slot: jax.Array
) -> None:
    """One token over the block whose first key is at position ``start``.

    Heads are short and independent: side by side they fill each other's gaps.
    """

    def attend_heads(is_edge: bool) -> None:
        exists = _exists(item, start, (config.kv_tokens, config.width)) if is_edge else None
        seen = _seen(config, item.position - start, 1) if is_edge else None
        load = _loader(refs, config, kv_slot, exists)
        for head in range(config.kv_heads):
            keys, values = load(head)
            scales = _scales(refs, config, item, start, kv_slot, head, is_edge)
            scores = _scores(config, _queries(refs, q_slot, head, 1), keys, seen, scales)
            _accumulate(refs, head, scores, values, scales)

    _inside_or_on_the_edge(config, item, start, attend_heads)


def _attend_chunk(
    refs: Refs, config: KernelConfig, item: Item, start: jax.Array, q_slot: jax.Array, kv_slot: jax.Array
) -> None:
    """A query block over the block whose first key is at position ``start``; one head fills the machine."""
    exists = _exists(item, start, (config.kv_tokens, config.width))
    load = _loader(refs, config, kv_slot, exists)
    for head in range(config.kv_heads):
        refs.keys[head], refs.values[head] = load(head)

    def attend_heads(is_edge: bool) -> None:
        def attend_head(head: Any, _: None) -> None:
            queries = _queries(refs, q_slot, head, config.q_tokens)
            seen = _seen(config, item.position - start, config.q_tokens) if is_edge else None
            scales = _scales(refs, config, item, start, kv_slot, head, is_edge)
            scores = _scores(config, queries, refs.keys[head], seen, scales)
            _accumulate(refs, head, scores, refs.values[head], scales)

        lax.fori_loop(0, config.kv_heads, attend_head, None)

    _inside_or_on_the_edge(config, item, start, attend_heads)


def _inside_or_on_the_edge(
    config: KernelConfig, item: Item, start: jax.Array, attend: Callable[[bool], None]
) -> None:
    """Runs the code for blocks that every token of the item sees wholly, or the one that masks."""
    is_inside = start + config.kv_tokens <= item.position + 1
    if config.variant.sliding_window is not None:
        is_inside &= start > item.end - 1 - config.variant.sliding_window
    pl.when(is_inside)(functools.partial(attend, False))
    pl.when(~is_inside)(functools.partial(attend, True))


def _queries(refs: Refs, slot: jax.Array, head: Any, num_tokens: int) -> jax.Array:
    """A head's queries ``[num_tokens * group, width]``, in the dtype of the products."""
    view, words = _rows(refs.q_ring.at[slot, head, pl.ds(0, num_tokens)])
    queries = view[...]
    if words > 1:
        queries = pltpu.bitcast(queries, refs.q_ring.dtype)
    return queries.astype(refs.keys.dtype)


def _exists(item: Item, start: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Which keys of a block, along an axis, are the item's; the rest was left by other blocks."""
    key = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (key >= item.first_key - start) & (key < item.end - start)


def _seen(config: KernelConfig, position: jax.Array, num_tokens: int) -> jax.Array:
    """Which keys each query sees, ``[rows, keys]``; positions count from the block's first key."""
    shape = (num_tokens * config.group, config.kv_tokens)
    key = lax.broadcasted_iota(jnp.int32, shape, 1)
    query = jnp.broadcast_to(position, shape)
    if num_tokens > 1:
        query += lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), config.group)
    seen = key <= query
    if config.variant.sliding_window is not None:
        seen &= key > query - config.variant.sliding_window
    return seen


class Scales(NamedTuple):
    """Of a head's keys and values in a block, each ``[1, kv_tokens]``."""

    keys: jax.Array
    values: jax.Array


def _scales(
    refs: Refs,
    config: KernelConfig,
    item: Item,
    start: jax.Array,
    slot: jax.Array,
    head: Any,
    is_edge: bool,
) -> Scales | None:
    """A head's scales, or None if the cache has none; those of values that are not the item's are zeros."""
    if not config.has_scales:
        return None

    def load(index: Any) -> jax.Array:
        pages = [refs.scale_ring[slot, page, pl.ds(index, 1)] for page in range(config.kv_pages)]
        return pages[0] if len(pages) == 1 else jnp.concatenate(pages, axis=1)

    values = load(2 * head + 1)
    if is_edge:
        values = jnp.where(_exists(item, start, values.shape, axis=1), values, 0.0)
    return Scales(load(2 * head), values)


def _scores(
    config: KernelConfig,
    queries: jax.Array,
    keys: jax.Array,
    seen: jax.Array | None,
    scales: Scales | None,
) -> jax.Array:
    """Scaled, capped and masked scores, times log2(e)."""
    scores = _product(queries, keys, contract_keys=1)
    if scales is not None:
        scores *= scales.keys
    if config.variant.soft_cap is None:
        scores *= config.variant.scale * _LOG2_E
    else:
        scores = jnp.tanh(scores * (config.variant.scale / config.variant.soft_cap)) * (
            config.variant.soft_cap * _LOG2_E
        )
    return scores if seen is None else jnp.where(seen, scores, _MASKED)


def _accumulate(refs: Refs, head: Any, scores: jax.Array, values: jax.Array, scales: Scales | None) -> None:
    """One step of the online softmax."""
    rows, width = scores.shape[0], values.shape[1]
    best = refs.best[head, :rows]
    new_best = jnp.maximum(best, jnp.max(scores, axis=1, keepdims=True))
    decay = jnp.exp2(best - new_best)
    # Of a query that saw nothing yet these are ones, which decay to 0 with the first key that it sees.
    weights = jnp.exp2(scores - _across(new_best, scores.shape[1]))
    refs.best[head, :rows] = new_best
    refs.total[head, :rows] = refs.total[head, :rows] * decay + jnp.sum(weights, axis=1, keepdims=True)
    if scales is not None:
        weights *= scales.values
    added = _product(weights.astype(values.dtype), values, contract_keys=0)
    refs.acc[head, :rows] = refs.acc[head, :rows] * _across(decay, width) + added


def _loader(
    refs: Refs, config: KernelConfig, slot: jax.Array, exists: jax.Array | None
) -> Callable[[int], tuple[jax.Array, jax.Array]]:
    """Gives a head's keys and values ``[kv_tokens, width]``; values are 0 where not ``exists``, if given.

    Keys are not, because their scores are masked; nor codes of 8 bits: any is finite, and scales are masked.
    """
    block, rows_per_word = refs.kv_ring.at[slot], 4 // jnp.dtype(config.kv_dtype).itemsize
    rows_per_head = 1 if config.is_packed else 2

    @functools.cache  # two rows of bfloat16, or four of 8 bits, are loaded as one of words
    def load_words(index: int) -> jax.Array:
        return _words(block if rows_per_word == 1 else block.bitcast(jnp.uint32), config, index)

    def load_row(head: int, which: int) -> jax.Array:
        rows = [(head * config.folds + part) * rows_per_head + which for part in range(config.folds)]
        parts = [
            _part(load_words(row // rows_per_word), config.kv_dtype, row % rows_per_word) for row in rows
        ]
        return _joined(parts, config).astype(refs.keys.dtype)

    def masked(values: jax.Array) -> jax.Array:
        if exists is None or config.has_scales:
            return values
        return jnp.where(exists, values, jnp.zeros((), values.dtype))

    def load(head: int) -> tuple[jax.Array, jax.Array]:
        if config.is_packed:
            row = masked(load_row(head, 0))
            return row, row
        return load_row(head, 0), masked(load_row(head, 1))

    return load


def _joined(parts: list[jax.Array], config: KernelConfig) -> jax.Array:
    """The parts of every page, ``[kv_pages * part_size, width]`` each, one behind the other, page by page."""
    if len(parts) == 1:
        return parts[0]
    pages = range(0, config.kv_pages * config.part_size, config.part_size)
    return jnp.concatenate([part[page : page + config.part_size] for page in pages for part in parts])


def _part(words: jax.Array, dtype: Any, index: int) -> jax.Array:
    """One of the elements that a 32-bit word consists of, the lowest first, as float32."""
    if dtype == jnp.float32:
        return words
    if dtype == jnp.bfloat16:  # the high half of a float32
        words = words & jnp.uint32(0xFFFF0000) if index else words << 16
        return pltpu.bitcast(words, jnp.float32)
    top = pltpu.bitcast(words << (24 - 8 * index), jnp.int32)
    if dtype == jnp.int8:
        return (top >> 24).astype(jnp.float32)
    # Not every chip knows float8_e4m3fn: sign, exponent and mantissa go to their places in a float32, whose
    # exponent then is 120 too low. What has exponent 0 is the mantissa times 2**-9.
    bits = (top >> 4) & jnp.int32(0x07F00000)
    raised = pltpu.bitcast(bits + jnp.int32(120 << 23), jnp.float32)
    magnitude = jnp.where(bits < jnp.int32(8 << 20), (bits >> 20).astype(jnp.float32) * 2.0**-9, raised)
    return jnp.where(top < 0, -magnitude, magnitude)


def _words(block: Any, config: KernelConfig, index: int) -> jax.Array:
    """One 32-bit row of every line of a block ``[kv_pages, part_size, words_per_line, width]``."""
    length = config.kv_pages * config.part_size
    if not config.is_strided:
        return block[:, :, index, :].reshape(length, config.width)
    rows = block.reshape(length * config.words_per_line, config.width)
    return rows[index :: config.words_per_line, :]


def _rows(ref: Any) -> tuple[Any, int]:
    """Queries or outputs ``[tokens, group / words, words, width]`` as 32-bit rows, and ``words``."""
    words = 4 // ref.dtype.itemsize
    tokens, groups, _, width = ref.shape
    view = ref if words == 1 else ref.bitcast(jnp.uint32)
    return view.reshape(tokens * groups, width), words


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
