"""A draw in one kernel, for NVIDIA GPUs, in Pallas's Triton: a program
keeps one row, and ends when that is decided.

What min-p, top-k and top-p keep is "every logit from some value up", and the token drawn is the best one,
noise added, of those (the Gumbel-max trick). So nobody needs the value that top-p keeps from: the best of all
is the one if less than ``top_p`` of the mass lies above its logit; if not, everything from its logit down is
dropped, and the next best is asked. A share of ``top_p`` of all rows ends with the first. The value for top-k
is looked for among the integers that order floats.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxserve.pallas_kernels.sampling.noise import gumbel

_BLOCK = 4096  # logits that a program looks at together
_NUM_WARPS = 8
_BITS = 3  # of the range that a pass of the search decides
_MASKED, _BROKEN = 1, 2
_HIGHEST_KEY = 2**31 - 1


class Draws(NamedTuple):
    """What rows ask for; see `draw_tokens`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    position: jax.Array


def draw_tokens(logits: jax.Array, draws: Draws, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The token of every row.

    min-p first, then top-k among its survivors, then top-p among theirs. A token is kept or dropped by its
    logit alone, so tokens that tie at a threshold are kept together.

    Args:
        logits: float32 [R, V].
        draws: ``temperature`` float32 [R], 0 takes the best; ``top_k`` int32 [R], 0 or less keeps all;
            ``top_p`` float32 [R], positive, 1 keeps all; ``min_p`` float32 [R], 0 keeps all; ``seed`` uint32
            [R] and ``position`` int32 [R], on which alone the noise depends.
        interpret: runs in Pallas's interpreter, on any device.

    Returns:
        Token ids int32 [R], and bool [R]: False if a row holds a NaN or an infinity. Minus infinity is never
        drawn, and the token is right all the same; with a NaN or plus infinity, or nothing else, it is 0.
    """
    rows, vocab = logits.shape
    # Triton's lowering takes an array of weak type (a jnp.full's) for a Python number.
    draws = Draws(*(array.astype(array.dtype) for array in draws))
    ids, finite = pl.pallas_call(
        functools.partial(_body, vocab=vocab, block=min(_BLOCK, pl.next_power_of_2(vocab))),
        out_shape=(jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)),
        grid=(rows,),
        in_specs=[pl.no_block_spec] * 7,
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        compiler_params=plt.CompilerParams(num_warps=_NUM_WARPS, num_stages=2),
        interpret=interpret,
        name="draw_tokens",
    )(*draws, logits)
    return ids, finite != 0


def _body(
    temperature_ref, top_k_ref, top_p_ref, min_p_ref, seed_ref, position_ref, logits_ref, ids_ref, finite_ref,
    *, vocab: int, block: int,
):  # fmt: skip
    row = pl.program_id(0)
    lane = jnp.arange(block, dtype=jnp.int32)
    num_blocks = pl.cdiv(vocab, block)

    def load(number):
        index = number * block + lane
        return index, plt.load(logits_ref.at[row, index], mask=index < vocab, other=-jnp.inf)

    def over_row(step, *start):
        return lax.fori_loop(0, num_blocks, lambda number, carry: step(*load(number), *carry), start)

    def first(index, x, best, at, bad):
        better = x > best
        bad |= jnp.where((index < vocab) & (x == -jnp.inf), _MASKED, 0)
        bad |= jnp.where(x < jnp.inf, 0, _BROKEN)
        return jnp.where(better, x, best), jnp.where(better, index, at), bad

    nothing = jnp.full((block,), -jnp.inf, jnp.float32)
    nowhere = jnp.zeros((block,), jnp.int32)
    best, at, bad = over_row(first, nothing, nowhere, nowhere)
    top = jnp.max(best)
    is_whole = (jnp.max(bad) < _BROKEN) & (top > -jnp.inf)
    temperature = temperature_ref[row]
    greedy = _lowest(best, at, top)
    draws = is_whole & (temperature > 0.0)
    scale = jnp.where(draws, temperature, 1.0)

    def scaled(x):
        return (x - top) / scale

    min_p, top_k, top_p = min_p_ref[row], top_k_ref[row], top_p_ref[row]
    floor = jnp.where(min_p > 0.0, jnp.log(jnp.where(min_p > 0.0, min_p, 1.0)), -jnp.inf)
    lowest = _key(floor)

    def counted(index, x, *counts_and_middles):
        del index
        half = len(counts_and_middles) // 2
        counts, middles = counts_and_middles[:half], counts_and_middles[half:]
        key = _key(scaled(x))
        some = [
            count + (key >= middle).astype(jnp.int32) for count, middle in zip(counts, middles, strict=True)
        ]
        return (*some, *middles)

    def narrow(carry):
        low, high, _ = carry
        span = lax.bitcast_convert_type(high - low, jnp.uint32)
        step = lax.bitcast_convert_type(
            jnp.maximum(lax.shift_right_logical(span, jnp.uint32(_BITS)), 1), jnp.int32
        )
        splits = 2**_BITS - 1
        # Beyond the range they count what is not enough, and change nothing.
        middles = [
            jnp.where(_fits(low, high, split * step), low + split * step, high)
            for split in range(1, splits + 1)
        ]
        zeros = [jnp.zeros((block,), jnp.int32)] * splits
        counts = [jnp.sum(count) for count in over_row(counted, *zeros, *middles)[:splits]]
        new_low, new_high, found = low, high, jnp.bool_(False)
        for middle, count in zip(middles, counts, strict=True):
            is_inside = (middle > low) & (middle < high)
            enough = is_inside & (count >= top_k)
            new_low = jnp.where(enough, middle, new_low)
            found |= enough & (count == top_k)
            new_high = jnp.where(is_inside & (count < top_k) & (middle < new_high), middle, new_high)
            new_low = jnp.where(found & enough & (count == top_k), middle, new_low)
        return new_low, new_high, found

    def undecided(carry):
        low, high, found = carry
        return ~found & (high - low != 1)

    with_top_k = draws & (top_k > 0) & (top_k < vocab)
    lowest, _, _ = lax.while_loop(undecided, narrow, (lowest, jnp.int32(_HIGHEST_KEY), ~with_top_k))

    seed, position = seed_ref[row], position_ref[row].astype(jnp.uint32)

    def perturb(index, x, best, at, mass, bound):
        x = scaled(x)
        kept = (_key(x) >= lowest) & (x > bound)
        noisy = jnp.where(kept, x + gumbel(seed, position, index.astype(jnp.uint32)), -jnp.inf)
        better = noisy > best
        mass += jnp.where(kept, jnp.exp(x), 0.0)
        return jnp.where(better, noisy, best), jnp.where(better, index, at), mass, bound

    def weigh(index, x, mass, bound):
        del index
        x = scaled(x)
        return mass + jnp.where((_key(x) >= lowest) & (x > bound), jnp.exp(x), 0.0), bound

    zeros = jnp.zeros((block,), jnp.float32)

    def ask(carry):
        _, bound, wanted, _ = carry
        best, at, mass, _ = over_row(perturb, nothing, nowhere, zeros, bound)
        token = _lowest(best, at, jnp.max(best))
        wanted = jnp.where(wanted < 0.0, jnp.where(top_p < 1.0, top_p * jnp.sum(mass), jnp.inf), wanted)
        here = scaled(plt.load(logits_ref.at[row, token]))
        above = jnp.sum(over_row(weigh, zeros, here)[0])
        return token, here, wanted, above < wanted

    start = (greedy, jnp.float32(-jnp.inf), jnp.float32(-1.0), ~draws)
    token = lax.while_loop(lambda carry: ~carry[-1], ask, start)[0]
    plt.store(ids_ref.at[row], jnp.where(is_whole, token, 0))
    plt.store(finite_ref.at[row], (jnp.max(bad) == 0).astype(jnp.int32))


def _lowest(values, at, best):
    """The lowest index of those that hold the best value."""
    return jnp.min(jnp.where(values == best, at, _HIGHEST_KEY))


def _fits(low, high, offset):
    """Whether ``low + offset`` is no more than ``high``, the range being wider than an int32 perhaps."""
    span = lax.bitcast_convert_type(high - low, jnp.uint32)
    return lax.bitcast_convert_type(offset, jnp.uint32) <= span


def _key(x):
    """int32 of the same order as the float32 (no NaN): the bits of negative numbers run backwards."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    keys = bits ^ (lax.shift_right_arithmetic(bits, jnp.int32(31)) & _HIGHEST_KEY)
    return jnp.where(keys == -1, 0, keys)  # -0.0 equals 0.0
