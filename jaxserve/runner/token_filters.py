"""Which tokens min-p, top-k and top-p leave to draw from, without sorting the vocabulary.

What top-k and top-p keep is "every logit from some value up". That value is looked for among the integers
that order floats: each pass over the logits cuts the range that it must lie in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

_LOWEST_KEY = -(2**31)
_HIGHEST_KEY = 2**31 - 1


class Search(NamedTuple):
    """How the value is looked for; what is found is the same.

    Attributes:
        bits: of the range that a pass decides: it counts what lies above 2**bits - 1 values.
        exits_early: filters that no row asks for are left out, and the search ends when every row is decided.
            If not, nothing depends on what the device holds: where the host waits at every branch, that is
            cheaper.
    """

    bits: int
    exits_early: bool


UNTIL_DECIDED = Search(bits=1, exits_early=True)
UNBRANCHED = Search(bits=3, exits_early=False)


class Filtered(Protocol):
    """Rows' parameters, each [R]; the sampler's own state has them."""

    @property
    def top_k(self) -> jax.Array:
        """int32; 0 or less keeps all."""
        ...

    @property
    def top_p(self) -> jax.Array:
        """float32; 1 keeps all."""
        ...

    @property
    def min_p(self) -> jax.Array:
        """float32; 0 keeps all."""
        ...


def keep_mask(scaled: jax.Array, state: Filtered, draws: jax.Array, search: Search) -> jax.Array:
    """Which tokens may be drawn, bool [R, V].

    min-p first, then top-k among its survivors, then top-p among theirs. A token is kept or dropped by its
    logit alone, so tokens that tie at a threshold are kept together.

    Args:
        scaled: float32 [R, V], logits over temperature with a maximum of 0 in each row.
        state: the rows' parameters.
        draws: bool [R]; the other rows cost nothing, and what is returned for them means nothing.
        search: for what top-k and top-p keep.
    """
    with_min_p = draws & (state.min_p > 0.0)
    floor = jnp.where(with_min_p, jnp.log(jnp.where(with_min_p, state.min_p, 1.0)), -jnp.inf)
    scaled = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
    with_top_k = draws & (state.top_k > 0) & (state.top_k < scaled.shape[1])
    with_top_p = draws & (state.top_p < 1.0)

    def top_k(x: jax.Array) -> jax.Array:
        def enough(count: jax.Array, _: jax.Array) -> jax.Array:
            return count >= state.top_k[None]

        return _keep_from(x, _threshold(x, jnp.ones_like(x), enough, with_top_k, search))

    def top_p(x: jax.Array) -> jax.Array:
        mass = jnp.exp(x)
        wanted = state.top_p * jnp.sum(mass, axis=-1)

        def enough(_: jax.Array, kept_mass: jax.Array) -> jax.Array:
            return kept_mass >= wanted[None]

        return _keep_from(x, _threshold(x, mass, enough, with_top_p, search))

    for wanted, keep in ((with_top_k, top_k), (with_top_p, top_p)):
        if search.exits_early:
            scaled = jax.lax.cond(jnp.any(wanted), keep, lambda x: x, scaled)
        else:
            scaled = keep(scaled)
    return scaled > -jnp.inf


def _keep_from(x: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(_ordered_bits(x) >= threshold[:, None], x, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 of the same order as the float32 (no NaN): the bits of negative numbers run backwards."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    keys = bits ^ ((bits >> 31) & _HIGHEST_KEY)
    return jnp.where(keys == -1, 0, keys)  # -0.0 equals 0.0


def _threshold(
    x: jax.Array,
    mass: jax.Array,
    enough: Callable[[jax.Array, jax.Array], jax.Array],
    wanted: jax.Array,
    search: Search,
) -> jax.Array:
    """The highest key such that keeping every element from it up is still enough, int32 [R].

    Exact, or lower with no element in between. A row is decided as soon as only one element is left to decide
    about.

    Args:
        x: float32 [R, V].
        mass: float32 [R, V], not negative.
        enough: count int32 [S, R] and mass float32 [S, R] of what is kept -> bool [S, R]; monotonic.
        wanted: bool [R]; the other rows keep everything.
        search: how.
    """
    keys = _ordered_bits(x)
    rows, vocab = x.shape
    splits = jnp.arange(1, 2**search.bits, dtype=jnp.uint32)[:, None]

    def pending(carry: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.any(carry[-1])

    def narrow(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, low_count, high_count, undecided = carry  # keeping from low is enough, from high is not
        span = jax.lax.bitcast_convert_type(high - low, jnp.uint32)  # wraps to the right number
        step = jnp.maximum(span >> search.bits, 1)
        offsets = jnp.minimum(splits * step[None], span[None])
        middles = low[None] + jax.lax.bitcast_convert_type(offsets, jnp.int32)
        counts, masses = _counts_and_masses(keys, mass, middles)
        num_enough = jnp.sum(enough(counts, masses) & (middles < high[None]), axis=0, dtype=jnp.int32)
        edges = jnp.concatenate([low[None], middles, high[None]])
        counts = jnp.concatenate([low_count[None], counts, high_count[None]])

        def at(values: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.take_along_axis(values, index[None], axis=0)[0]

        low = jnp.where(undecided, at(edges, num_enough), low)
        low_count = jnp.where(undecided, at(counts, num_enough), low_count)
        high = jnp.where(undecided, at(edges, num_enough + 1), high)
        high_count = jnp.where(undecided, at(counts, num_enough + 1), high_count)
        undecided &= (low_count - high_count > 1) & (high - low != 1)
        return low, high, low_count, high_count, undecided

    start = (
        jnp.full(rows, _LOWEST_KEY, jnp.int32),
        jnp.full(rows, _HIGHEST_KEY, jnp.int32),
        jnp.full(rows, vocab, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        wanted,
    )
    if search.exits_early:
        return jax.lax.while_loop(pending, narrow, start)[0]
    return jax.lax.fori_loop(0, _num_passes(search.bits), lambda _, carry: narrow(carry), start)[0]


def _num_passes(bits: int) -> int:
    """After how many passes a range of all 32-bit integers is one integer wide, wherever the value lies."""
    span, passes = _HIGHEST_KEY - _LOWEST_KEY, 0
    while span > 1:
        step = max(span >> bits, 1)
        span = max(step, span - (2**bits - 1) * step)
        passes += 1
    return passes


def _counts_and_masses(
    keys: jax.Array, mass: jax.Array, thresholds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Count and mass of a row's elements from each of its thresholds up, both [S, R].

    In one pass over the row, which on a CPU is four times as fast as two.
    """
    num_splits = thresholds.shape[0]
    kept = [keys >= thresholds[split][:, None] for split in range(num_splits)]
    sums = jax.lax.reduce(
        (*(some.astype(jnp.int32) for some in kept), *(jnp.where(some, mass, 0.0) for some in kept)),
        (*[jnp.int32(0)] * num_splits, *[jnp.float32(0.0)] * num_splits),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        (1,),
    )
    return jnp.stack(sums[:num_splits]), jnp.stack(sums[num_splits:])
