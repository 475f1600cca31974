"""The sampler against a numpy oracle that sorts, against frequencies, and against itself in other batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.plan import Admission
from jaxserve.pallas_kernels.sampling import noise as noise_module
from jaxserve.pallas_kernels.sampling.noise import gumbel, threefry
from jaxserve.request import SamplingParams
from jaxserve.runner.sampler import (
    MAX_STOP_IDS,
    Sampled,
    SamplingState,
    sample,
    sampling_rows,
)
from jaxserve.runner.token_filters import UNBRANCHED, UNTIL_DECIDED, Search, keep_mask
from tests.support import sampling_oracle

VOCAB = 97
LENGTH = 24

jitted_sample = jax.jit(sample)


def admission(params: SamplingParams, *, seed: int = 0, num_prompt_tokens: int = 4, stop_ids=()) -> Admission:
    fields: dict[str, Any] = {"request_id": "r", "slot": 0, "token_ids": (), "page_ids": ()}
    known = {field.name for field in dataclasses.fields(Admission)}
    return Admission(
        **{name: value for name, value in fields.items() if name in known},
        num_prompt_tokens=num_prompt_tokens,
        params=params,
        seed=seed,
        stop_token_ids=tuple(stop_ids),
    )


def states(*admissions: Admission, count: int | None = None) -> SamplingState:
    return jax.tree.map(jnp.asarray, sampling_rows(admissions, count or len(admissions)))


def random_logits(rows: int, vocab: int = VOCAB, *, seed: int = 0, spread: float = 3.0):
    parts = [np.random.default_rng([seed, row]).standard_normal(vocab) * spread for row in range(rows)]
    return np.array(parts).astype(np.float32)


def run(logits, state: SamplingState, tokens=None, num_tokens=None) -> Sampled:
    rows = len(logits)
    tokens = np.zeros((rows, LENGTH), np.int32) if tokens is None else tokens
    num_tokens = np.full(rows, 10, np.int32) if num_tokens is None else num_tokens
    return jitted_sample(jnp.asarray(logits), state, jnp.asarray(tokens), jnp.asarray(num_tokens))


def test_greedy_takes_the_lowest_of_the_best_ids() -> None:
    logits = random_logits(4)
    logits[0, [5, 50]] = 100.0
    logits[1, VOCAB - 1] = 100.0
    logits[2] = -7.0
    got = run(logits, states(*[admission(SamplingParams(temperature=0.0))] * 4))
    assert got.token_ids.tolist() == [5, VOCAB - 1, 0, int(np.argmax(logits[3]))]
    assert got.finite.tolist() == [True] * 4


@pytest.mark.parametrize("vocab", [VOCAB, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_is_flagged_and_leaves_the_others_alone(temperature: float, vocab: int) -> None:
    logits = random_logits(5, vocab)
    state = states(*[admission(SamplingParams(temperature=temperature), seed=row) for row in range(5)])
    clean = run(logits, state)
    logits[1, 40] = np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    got = run(logits, state)
    assert got.finite.tolist() == [True, False, False, False, True]
    assert got.token_ids.tolist() == [int(clean.token_ids[0]), 0, 0, 0, int(clean.token_ids[4])]


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1e-4},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB - 1},
    {"top_k": VOCAB + 5},
    {"top_p": 1e-6},
    {"top_p": 1e-46},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 3, "top_p": 0.99},
]


SEARCHES = pytest.mark.parametrize("search", [UNTIL_DECIDED, UNBRANCHED])


@SEARCHES
@pytest.mark.parametrize("ties", [False, True])
def test_kept_set_equals_that_of_sorting(ties: bool, search: Search) -> None:
    logits = random_logits(len(FILTERS), seed=1)
    if ties:
        logits = np.round(logits)
    state = states(*(admission(SamplingParams(**filters)) for filters in FILTERS))
    draws = jnp.ones(len(FILTERS), bool)
    scaled = (logits - logits.max(axis=1, keepdims=True)) / np.asarray(state.temperature)[:, None]
    kept = np.asarray(jax.jit(keep_mask, static_argnums=3)(jnp.asarray(scaled), state, draws, search))
    for row, filters in enumerate(FILTERS):
        want = sampling_oracle.kept_tokens(logits[row].astype(np.float64), **filters)
        assert set(np.flatnonzero(kept[row]).tolist()) == want, filters


@SEARCHES
def test_top_k_is_exact_on_neighbouring_floats_zeros_and_tiny_numbers(search: Search) -> None:
    values = [0.0, -0.0, -1e-45, -1e-38, np.nextafter(np.float32(-1), np.float32(0)), -1.0, -3e38]
    logits = np.array([values] * 7, np.float32)
    state = states(*(admission(SamplingParams(top_k=k)) for k in range(1, 8)))
    kept = np.asarray(
        jax.jit(keep_mask, static_argnums=3)(jnp.asarray(logits), state, jnp.ones(7, bool), search)
    )
    counts = kept.sum(axis=1).tolist()
    # The two zeros tie; the subnormal is distinct from them or, where the device flushes it, ties with them.
    assert counts in ([2, 2, 3, 4, 5, 6, 7], [3, 3, 3, 4, 5, 6, 7])
    assert all(kept[row, : counts[row]].all() for row in range(7))


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.8}],
    ids=str,
)
def test_frequencies_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    draws, vocab = 20_000, 12
    logits = random_logits(1, vocab, seed=5, spread=1.5)
    one = states(admission(SamplingParams(**filters)))
    state = jax.tree.map(lambda array: jnp.repeat(array, draws, axis=0), one)
    state = dataclasses.replace(state, seed=jnp.arange(draws, dtype=jnp.uint32) % 100)
    positions = 1 + np.arange(draws, dtype=np.int32) // 100
    tokens = np.zeros((draws, 1), np.int32)
    got = run(np.repeat(logits, draws, axis=0), state, tokens, positions)
    counts = np.bincount(np.asarray(got.token_ids), minlength=vocab)
    want = sampling_oracle.distribution(logits[0].astype(np.float64), **filters) * draws
    assert not counts[want == 0].any(), "a token that was filtered out is never drawn"
    kept = want > 0
    chi_square = float(((counts[kept] - want[kept]) ** 2 / want[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), (counts[kept], want[kept])  # five sigma


def mixed_rows(count: int) -> tuple[list[SamplingParams], list[int]]:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=5, temperature=1.3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.05, presence_penalty=1.0, logit_bias={3: 2.0}),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=4),
    ]
    return [params[row % len(params)] for row in range(count)], [row * 7 + 1 for row in range(count)]


def test_a_row_is_the_same_alone_in_any_order_and_next_to_padding() -> None:
    count = 12
    params, seeds = mixed_rows(count)
    admissions = [admission(p, seed=seed) for p, seed in zip(params, seeds, strict=True)]
    logits = random_logits(count, seed=9)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (count, LENGTH)).astype(np.int32)
    num_tokens = np.arange(5, 5 + count, dtype=np.int32)
    got = run(logits, states(*admissions), tokens, num_tokens)
    together = np.asarray(got.token_ids)
    assert len(set(together.tolist())) > count // 2

    order = np.random.default_rng(4).permutation(count)
    moved = run(logits[order], states(*(admissions[i] for i in order)), tokens[order], num_tokens[order])
    np.testing.assert_array_equal(np.asarray(moved.token_ids), together[order])

    for row in range(count):
        alone = run(
            logits[row : row + 1], states(admissions[row]), tokens[row : row + 1], num_tokens[row : row + 1]
        )
        assert int(alone.token_ids[0]) == together[row]

    padding = 4
    padded = run(
        np.concatenate([logits, np.full((padding, VOCAB), np.nan, np.float32)]),
        jax.tree.map(
            lambda a: jnp.concatenate([a, jnp.zeros((padding, *a.shape[1:]), a.dtype)]), states(*admissions)
        ),
        np.concatenate([tokens, np.zeros((padding, LENGTH), np.int32)]),
        np.concatenate([num_tokens, np.zeros(padding, np.int32)]),
    )
    np.testing.assert_array_equal(np.asarray(padded.token_ids)[:count], together)


def test_a_draw_depends_on_seed_and_position() -> None:
    logits = np.repeat(random_logits(1, spread=0.1), 64, axis=0)
    seeds = [row // 8 for row in range(64)]
    state = states(*(admission(SamplingParams(), seed=seed) for seed in seeds))
    positions = np.array([10 + row % 8 for row in range(64)], np.int32)
    first = np.asarray(run(logits, state, num_tokens=positions).token_ids)
    again = np.asarray(run(logits, state, num_tokens=positions).token_ids)
    np.testing.assert_array_equal(first, again)
    assert len(set(first.tolist())) > 24  # 64 draws of 97 nearly equal tokens
    assert len(set(first[:8].tolist())) > 1
    assert len(set(first[::8].tolist())) > 1


def test_threefry_equals_its_published_vectors() -> None:
    """Random123's known answers for threefry2x32-20."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, want in vectors:
        words = threefry(*(jnp.array([word], jnp.uint32) for word in (*key, *counter)))
        assert tuple(int(word[0]) for word in words) == want


def test_gumbel_noise_is_finite_and_has_its_mean_and_variance() -> None:
    seeds, tokens = jnp.arange(20, dtype=jnp.uint32), jnp.arange(10_000, dtype=jnp.uint32)
    noise = np.asarray(gumbel(seeds[:, None], jnp.uint32(7), tokens[None]))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.015
    assert abs(noise.var() - np.pi**2 / 6) < 0.05


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_no_word_makes_infinite_noise(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite noise would draw a token whatever its logit: at 262,144 tokens, in one draw of 64."""
    monkeypatch.setattr(noise_module, "threefry", lambda *keys: (jnp.full_like(keys[2], word), keys[3]))
    noise = gumbel(jnp.uint32(0), jnp.uint32(1), jnp.arange(3, dtype=jnp.uint32))
    assert np.isfinite(np.asarray(jax.jit(lambda: noise)())).all()


EDITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.4},
    {"logit_bias": {0: 100.0, 96: 7.0}},
    {"logit_bias": {11: -100.0}, "presence_penalty": 2.0},
    {"min_tokens": 6},
    {"min_tokens": 5},
    {},
]


def test_edited_logits_choose_as_the_oracle_does() -> None:
    """Greedy over logits that lie close together, so that every edit decides; 20 histories per edit."""
    stop_ids = (3, 17, 96)
    num_prompt, num_output, repeats = 7, 5, 20
    rows = [edit for edit in EDITS for _ in range(repeats)]
    logits = random_logits(len(rows), seed=2, spread=0.5)
    logits[:, 17] += 1.0  # stop tokens win unless they are masked
    rng = np.random.default_rng(8)
    tokens = rng.integers(0, VOCAB, (len(rows), LENGTH)).astype(np.int32)
    best = np.argsort(-logits, axis=1)[:, :4]
    tokens[:, 2] = best[:, 0]  # the prompt and the output hold likely tokens, one of them twice
    tokens[:, [8, 10]] = best[:, 1:2]
    num_tokens = np.full(len(rows), num_prompt + num_output, np.int32)
    admissions = [
        admission(
            SamplingParams(temperature=0.0, max_tokens=100, **edit),
            num_prompt_tokens=num_prompt,
            stop_ids=stop_ids,
        )
        for edit in rows
    ]
    got = np.asarray(run(logits, states(*admissions), tokens, num_tokens).token_ids)
    changed = 0
    for row, edit in enumerate(rows):
        want = sampling_oracle.edited_logits(
            logits[row].astype(np.float64),
            prompt=tokens[row, :num_prompt].tolist(),
            output=tokens[row, num_prompt : num_prompt + num_output].tolist(),
            stop_ids=stop_ids,
            **edit,
        )
        assert want[got[row]] >= want.max() - 1e-6, edit
        changed += int(got[row] != np.argmax(logits[row]))
    assert changed > len(rows) // 4


def test_min_tokens_masks_stop_ids_until_enough_were_output() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 9], logits[:, 4] = 5.0, 3.0
    params = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=9)
    state = states(*[admission(params, num_prompt_tokens=4, stop_ids=(9,))] * 3)
    got = run(logits, state, num_tokens=np.array([4, 6, 7], np.int32))  # 0, 2 and 3 tokens were output
    assert got.token_ids.tolist() == [4, 4, 9]


def test_logprobs_and_ranks_are_of_the_raw_distribution() -> None:
    logits = random_logits(3, seed=12)
    logits[1] = np.round(logits[1])
    biased = int(np.argsort(-logits[2])[4])
    params = [
        SamplingParams(temperature=0.0, logprobs=20),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=0.0, logprobs=5, logit_bias={biased: 100.0}),
    ]
    got = run(logits, states(*(admission(p) for p in params)))
    for row in range(3):
        want = np.log(sampling_oracle.softmax(logits[row].astype(np.float64)))
        token = int(got.token_ids[row])
        assert abs(float(got.chosen_logprob[row]) - want[token]) < 1e-5
        assert int(got.rank[row]) == 1 + int((logits[row] > logits[row, token]).sum())
        np.testing.assert_allclose(np.asarray(got.top_logprobs[row]), np.sort(want)[::-1][:20], atol=1e-5)
        np.testing.assert_allclose(want[np.asarray(got.top_ids[row])], np.sort(want)[::-1][:20], atol=1e-5)
    assert got.rank.tolist()[2] == 5
    assert int(got.token_ids[2]) == biased


def test_a_vocabulary_smaller_than_the_report() -> None:
    got = run(random_logits(2, 6), states(*[admission(SamplingParams(logprobs=20))] * 2))
    assert got.top_ids.shape == (2, 6)
    assert sorted(got.top_ids[0].tolist()) == list(range(6))


def test_too_many_stop_ids_are_refused() -> None:
    with pytest.raises(
        ValueError, match=f"stop_token_ids has {MAX_STOP_IDS + 1} ids: at most {MAX_STOP_IDS} fit"
    ):
        sampling_rows([admission(SamplingParams(), stop_ids=range(MAX_STOP_IDS + 1))], 1)
