"""Choosing the next token on the device, for rows that each have their own sampling parameters.

The order of operations is vLLM's: log-probabilities come from the raw logits; then penalties, logit bias and
masked end tokens; then either the best token, or temperature, min-p, top-k, top-p and a draw.

Nothing sorts the vocabulary (`jaxserve.runner.token_filters`). What is drawn for a row depends on its logits,
its seed and its position only, so it is the same in any batch, bucket or slot, and after a preemption. What
no row asks for is not computed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.plan import Admission
from jaxserve.pallas_kernels.sampling.noise import gumbel
from jaxserve.pallas_kernels.sampling.triton import Draws, draw_tokens
from jaxserve.request import SamplingParams
from jaxserve.runner.token_filters import UNBRANCHED, UNTIL_DECIDED, Search, keep_mask
from jaxserve.validation import MAX_LOGIT_BIAS_ENTRIES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

# The request's own stop tokens and the model's end tokens.
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + 16

_ARGMAX_BLOCK = 128
_SMALLEST_TOP_P = 1e-30


class SamplingKind(enum.IntEnum):
    """What rows ask of the sampler; a step asks for the most that any of its rows does.

    Attributes:
        GREEDY: the best token of the model's own logits, and nothing else.
        DRAWN: that, or a draw by temperature, min-p, top-k and top-p.
        ANY: everything: edited logits and log-probabilities as well.
    """

    GREEDY = 0
    DRAWN = 1
    ANY = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SamplingState:
    """Sampling parameters, one row per slot or per request; meanings as in `jaxserve.request.SamplingParams`.

    Rows of padding may hold anything (zeros, say): a row whose ``num_tokens`` is 0 is never looked at.

    Attributes:
        temperature: float32 [R]; 0 takes the best token.
        top_k: int32 [R]; 0 or less keeps all.
        top_p: float32 [R]; 1 keeps all.
        min_p: float32 [R]; 0 keeps all.
        repetition_penalty: float32 [R]; 1 for none.
        presence_penalty: float32 [R].
        frequency_penalty: float32 [R].
        seed: uint32 [R].
        logprobs: int32 [R]; how many alternatives to report, -1 for no log-probabilities at all.
        min_tokens: int32 [R]; ``stop_ids`` are masked until this many tokens were output.
        stop_ids: int32 [R, MAX_STOP_IDS], padded with -1.
        bias_ids: int32 [R, MAX_LOGIT_BIAS_ENTRIES], padded with -1.
        bias_values: float32 [R, MAX_LOGIT_BIAS_ENTRIES].
        prompt_len: int32 [R]; tokens of the history that are prompt.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    logprobs: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    prompt_len: jax.Array


class Sampled(NamedTuple):
    """One token per row, on the device.

    Attributes:
        token_ids: int32 [R].
        chosen_logprob: float32 [R]; of the model's own distribution. This and the three below are meaningful
            only for rows that ask for log-probabilities.
        rank: int32 [R]; 1 plus the number of tokens with a higher logit.
        top_ids: int32 [R, min(20, V)], best first.
        top_logprobs: float32 [R, min(20, V)].
        finite: bool [R]; False if the row's logits hold a NaN or an infinity. Its token is then 0.
    """

    token_ids: jax.Array
    chosen_logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    finite: jax.Array


def sampling_rows(admissions: Sequence[Admission], count: int) -> SamplingState:
    """Host (numpy) rows of requests, padded to ``count`` with rows that ask for nothing.

    Raises:
        ValueError: if a request has more stop tokens than fit; validation and the model's end tokens keep
            within that.
    """
    filler = count - len(admissions)
    params = [admission.params for admission in admissions]

    def column(values: list[float], neutral: float, dtype: type[np.generic]) -> np.ndarray:
        return np.array(values + [neutral] * filler, dtype)

    stop_ids = np.full((count, MAX_STOP_IDS), -1, np.int32)
    bias_ids = np.full((count, MAX_LOGIT_BIAS_ENTRIES), -1, np.int32)
    bias_values = np.zeros((count, MAX_LOGIT_BIAS_ENTRIES), np.float32)
    for row, admission in enumerate(admissions):
        if len(admission.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"stop_token_ids has {len(admission.stop_token_ids)} ids: at most {MAX_STOP_IDS} fit"
            )
        stop_ids[row, : len(admission.stop_token_ids)] = admission.stop_token_ids
        bias = admission.params.logit_bias or {}
        bias_ids[row, : len(bias)] = list(bias.keys())
        bias_values[row, : len(bias)] = list(bias.values())
    columns: dict[str, Any] = {
        "temperature": column([p.temperature for p in params], 0.0, np.float32),
        "top_k": column([max(p.top_k, 0) for p in params], 0, np.int32),
        # A share that float32 rounds to 0, or a device flushes to 0, would keep no token at all.
        "top_p": column([max(p.top_p, _SMALLEST_TOP_P) for p in params], 1.0, np.float32),
        "min_p": column([p.min_p for p in params], 0.0, np.float32),
        "repetition_penalty": column([p.repetition_penalty for p in params], 1.0, np.float32),
        "presence_penalty": column([p.presence_penalty for p in params], 0.0, np.float32),
        "frequency_penalty": column([p.frequency_penalty for p in params], 0.0, np.float32),
        "seed": column([admission.seed for admission in admissions], 0, np.uint32),
        "logprobs": column([-1 if p.logprobs is None else p.logprobs for p in params], -1, np.int32),
        "min_tokens": column([p.min_tokens for p in params], 0, np.int32),
        "stop_ids": stop_ids,
        "bias_ids": bias_ids,
        "bias_values": bias_values,
        "prompt_len": column([admission.num_prompt_tokens for admission in admissions], 0, np.int32),
    }
    return SamplingState(**columns)


def sample(
    logits: jax.Array,
    state: SamplingState,
    tokens: jax.Array,
    num_tokens: jax.Array,
    *,
    uses_kernel: bool = False,
) -> Sampled:
    """Chooses the next token of every row; jitted as part of a step.

    Args:
        logits: float32 [R, V], the model's own.
        state: the rows' parameters.
        tokens: int32 [R, L]; the rows' histories, prompt and output.
        num_tokens: int32 [R]; how many of ``tokens`` are valid, which is the position of the token sampled
            here. A row with 0 is padding: it gets a token, which means nothing.
        uses_kernel: one kernel draws, which wants an NVIDIA GPU, with the logits whole on it.
    """
    active = num_tokens > 0
    finite = _is_finite(logits)
    draws = active & (state.temperature > 0.0)
    edits = active & _edits_logits(state, num_tokens)

    def choose() -> jax.Array:
        edited = _edit_logits(logits, state, tokens, num_tokens, edits)
        greedy = _argmax(edited)
        drawn = jax.lax.cond(
            jnp.any(draws),
            lambda: (
                _draw_by_kernel(edited, state, num_tokens, draws)[0]
                if uses_kernel
                else _draw(edited, state, num_tokens, draws, UNTIL_DECIDED)
            ),
            lambda: greedy,
        )
        return jnp.where(draws, drawn, greedy)

    token_ids = jax.lax.cond(jnp.any(draws | edits), choose, lambda: _argmax(logits))
    token_ids = jnp.where(finite, token_ids, 0)
    num_top = min(MAX_LOGPROBS, logits.shape[1])
    chosen_logprob, rank, top_ids, top_logprobs = jax.lax.cond(
        jnp.any(active & (state.logprobs >= 0)),
        lambda: _report(logits, token_ids, num_top),
        lambda: _empty_report(logits.shape[0], num_top),
    )
    return Sampled(token_ids, chosen_logprob, rank, top_ids, top_logprobs, finite)


def take_best(logits: jax.Array) -> Sampled:
    """What `sample` gives for rows of kind `GREEDY`, with no branch in it.

    Args:
        logits: float32 [R, V].
    """
    return _unreported(_argmax(logits), _is_finite(logits), logits.shape[1])


def draw(
    logits: jax.Array, state: SamplingState, num_tokens: jax.Array, *, uses_kernel: bool = False
) -> Sampled:
    """What `sample` gives for rows of kinds `GREEDY` and `DRAWN`, with no branch in it.

    Args:
        logits: float32 [R, V].
        state: the rows' parameters.
        num_tokens: int32 [R]; as for `sample`.
        uses_kernel: as for `sample`.
    """
    draws = (num_tokens > 0) & (state.temperature > 0.0)
    if uses_kernel:
        return _unreported(*_draw_by_kernel(logits, state, num_tokens, draws), logits.shape[1])
    drawn = _draw(logits, state, num_tokens, draws, UNBRANCHED)
    token_ids = jnp.where(draws, drawn, _argmax(logits))
    return _unreported(token_ids, _is_finite(logits), logits.shape[1])


def _is_finite(logits: jax.Array) -> jax.Array:
    """Looked for on its own: XLA's maximum drops NaN on a CPU (jax 0.11.2)."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _unreported(token_ids: jax.Array, finite: jax.Array, vocab: int) -> Sampled:
    report = _empty_report(token_ids.shape[0], min(MAX_LOGPROBS, vocab))
    return Sampled(jnp.where(finite, token_ids, 0), *report, finite)


def has_stopped(state: SamplingState, token_ids: jax.Array, position: jax.Array) -> jax.Array:
    """Whether a token is a stop token that ends its row, bool [R]; the rule of `updates.finish_reason`.

    Args:
        state: the rows' parameters.
        token_ids: int32 [R].
        position: int32 [R]; of these tokens in their rows' histories.
    """
    is_stop = jnp.any(state.stop_ids == token_ids[:, None], axis=1)
    return is_stop & (position + 1 - state.prompt_len > state.min_tokens)


def kind_of(params: SamplingParams) -> SamplingKind:
    """What a request asks of the sampler in each of its steps."""
    edits = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.min_tokens > 0
        or bool(params.logit_bias)
    )
    if edits or params.logprobs is not None:
        return SamplingKind.ANY
    return SamplingKind.DRAWN if params.temperature > 0.0 else SamplingKind.GREEDY


def _argmax(logits: jax.Array) -> jax.Array:
    """The lowest id of the best logit, int32 [R]; 0 if there is none above -inf.

    In two levels, because XLA vectorises a plain maximum on a CPU, but not one that also returns its index.
    """
    rows, vocab = logits.shape
    padding = (0, -vocab % _ARGMAX_BLOCK)
    blocks = jnp.pad(logits, ((0, 0), padding), constant_values=-jnp.inf).reshape(rows, -1, _ARGMAX_BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    candidates = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _ARGMAX_BLOCK + jnp.argmax(candidates, axis=-1).astype(jnp.int32)


def _edits_logits(state: SamplingState, num_tokens: jax.Array) -> jax.Array:
    """Which rows change their logits before anything is chosen, bool [R]."""
    return _has_penalties(state) | _has_bias(state) | _masks_stop_ids(state, num_tokens)


def _has_penalties(state: SamplingState) -> jax.Array:
    return (
        (state.repetition_penalty != 1.0) | (state.presence_penalty != 0.0) | (state.frequency_penalty != 0.0)
    )


def _has_bias(state: SamplingState) -> jax.Array:
    return state.bias_ids[:, 0] >= 0


def _masks_stop_ids(state: SamplingState, num_tokens: jax.Array) -> jax.Array:
    return num_tokens - state.prompt_len < state.min_tokens


def _edit_logits(
    logits: jax.Array, state: SamplingState, tokens: jax.Array, num_tokens: jax.Array, edits: jax.Array
) -> jax.Array:
    """Penalties, logit bias and masked stop tokens, each only if some row has it."""
    rows, vocab = logits.shape
    row = jnp.arange(rows)[:, None]

    def in_vocab(ids: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.where((ids >= 0) & wanted[:, None], ids, vocab)  # out of range: dropped

    def penalise() -> jax.Array:
        return _penalise(logits, state, tokens, num_tokens)

    def bias(x: jax.Array) -> jax.Array:
        return x.at[row, in_vocab(state.bias_ids, edits)].add(state.bias_values, mode="drop")

    masks = edits & _masks_stop_ids(state, num_tokens)

    def mask_stop_ids(x: jax.Array) -> jax.Array:
        return x.at[row, in_vocab(state.stop_ids, masks)].set(-jnp.inf, mode="drop")

    edited = jax.lax.cond(jnp.any(edits & _has_penalties(state)), penalise, lambda: logits)
    edited = jax.lax.cond(jnp.any(edits & _has_bias(state)), bias, lambda x: x, edited)
    return jax.lax.cond(jnp.any(masks), mask_stop_ids, lambda x: x, edited)


def _penalise(logits: jax.Array, state: SamplingState, tokens: jax.Array, num_tokens: jax.Array) -> jax.Array:
    rows, vocab = logits.shape
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    row = jnp.arange(rows)[:, None]

    def count(wanted: jax.Array) -> jax.Array:
        ids = jnp.where(wanted, tokens, vocab)
        return jnp.zeros((rows, vocab), jnp.int32).at[row, ids].add(1, mode="drop")

    is_output = (index >= state.prompt_len[:, None]) & (index < num_tokens[:, None])
    output_counts = count(is_output)
    prompt_counts = count(index < jnp.minimum(state.prompt_len, num_tokens)[:, None])
    repetition = state.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0.0, logits / repetition, logits * repetition)
    edited = jnp.where(output_counts + prompt_counts > 0, repeated, logits)
    edited -= state.frequency_penalty[:, None] * output_counts.astype(jnp.float32)
    edited -= state.presence_penalty[:, None] * (output_counts > 0).astype(jnp.float32)
    return jnp.where(_has_penalties(state)[:, None], edited, logits)


def _draw(
    logits: jax.Array, state: SamplingState, num_tokens: jax.Array, draws: jax.Array, search: Search
) -> jax.Array:
    """Draws from the filtered distribution by the Gumbel-max trick, [R]."""
    scaled = _temper(logits, state, draws)
    kept = keep_mask(scaled, state, draws, search)
    token = jax.lax.broadcasted_iota(jnp.uint32, logits.shape, 1)
    noise = gumbel(state.seed[:, None], num_tokens.astype(jnp.uint32)[:, None], token)
    perturbed = jnp.where(kept, scaled + noise, -jnp.inf)
    return _argmax(perturbed)


def _draw_by_kernel(
    logits: jax.Array, state: SamplingState, num_tokens: jax.Array, draws: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The token of every row, the best one of those that draw none, and whether its logits are finite."""
    temperature = jnp.where(draws, state.temperature, 0.0)
    filters = (state.top_k, state.top_p, state.min_p)
    return draw_tokens(logits, Draws(temperature, *filters, state.seed, num_tokens))


def _temper(logits: jax.Array, state: SamplingState, draws: jax.Array) -> jax.Array:
    """Logits over temperature, shifted so that the best is 0: no temperature makes them overflow."""
    temperature = jnp.where(draws, state.temperature, 1.0)[:, None]
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def _report(
    logits: jax.Array, token_ids: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the raw logits: chosen, its rank, and the best ids with theirs."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    top_logits, top_ids = jax.lax.top_k(logits, num_top)
    return chosen[:, 0] - log_total, rank, top_ids.astype(jnp.int32), top_logits - log_total[:, None]


def _empty_report(rows: int, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )
