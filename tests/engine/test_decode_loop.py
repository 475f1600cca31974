"""Several tokens of a row in one launch: the same tokens as one at a time, wherever rows stop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError
from jaxserve.outputs import CompletionOutput
from jaxserve.platforms.cpu import Cpu
from jaxserve.runner.compile_counter import compile_counter
from jaxserve.runner.sampler import SamplingKind
from tests.support.byte_tokenizer import END_ID
from tests.support.small_engine import SMALL_ENGINE

STEPS = 8
OPTIONS: dict[str, Any] = SMALL_ENGINE | {"row_buckets": (1, 6)}
TIGHT = {"num_pages": 17, "max_model_len": 128, "watermark": 0.0}
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda depth: f"depth={depth}")
def looping(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LLM]:
    options: dict[str, Any] = OPTIONS | {"max_decode_steps": STEPS, "pipeline_depth": request.param}
    with LLM(str(checkpoint), **options) as llm:
        yield llm


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(rng.choice((1, 7, 8, 9, 20, 33)))] for _ in range(count)]


def kinds() -> list[dict[str, Any]]:
    """Greedy and sampled, with everything that changes logits."""
    return [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2},
        {"temperature": 1.3, "top_k": 5, "min_p": 0.01, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 5},
        {"temperature": 0.0, "logit_bias": {65: 100.0}},
    ]


def run(llm: LLM, params: list[SamplingParams]) -> list[CompletionOutput]:
    outputs = llm.generate(prompts(len(params)), params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def ends(outputs: list[CompletionOutput]) -> list[tuple[list[int], Any, Any, str]]:
    return [(o.token_ids, o.finish_reason, o.stop_reason, o.text) for o in outputs]


def num_loops(llm: LLM) -> int:
    buckets = llm.engine.loop.core.stats.buckets
    return sum(stats.steps for bucket, stats in buckets.items() if bucket.decode_steps > 1)


def lengths() -> list[SamplingParams]:
    """Limits that fall everywhere in a loop."""
    return [
        SamplingParams(max_tokens=index % 19 + 2, ignore_eos=True, **kind)
        for index, kind in enumerate(kinds() * 3)
    ]


def test_tokens_are_those_of_single_steps(looping: LLM, plain: LLM) -> None:
    want, before = ends(run(plain, lengths())), num_loops(looping)
    assert ends(run(looping, lengths())) == want
    assert num_loops(looping) > before
    assert num_loops(plain) == 0


def test_stop_tokens_everywhere_in_a_loop(looping: LLM, plain: LLM) -> None:
    """A row stops at the first of its stop token, in each place of two loops, and its neighbours go on."""
    base = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **kind) for kind in kinds()]
    tokens = [output.token_ids for output in run(plain, base)]
    for place in range(NUM_TOKENS):
        stops = [ids[place] for ids in tokens]
        params = [
            SamplingParams(max_tokens=NUM_TOKENS, stop_token_ids=[stop], ignore_eos=True, **kind)
            for stop, kind in zip(stops, kinds(), strict=True)
        ]
        got = run(looping, params)
        for output, ids, stop in zip(got, tokens, stops, strict=True):
            assert output.token_ids == ids[: ids.index(stop) + 1]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert num_loops(looping) > 0


def test_a_row_that_stops_does_nothing_in_later_loops(looping: LLM, plain: LLM) -> None:
    """Alone, so that loops in flight behind the stop have nothing to do at all."""
    base = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)
    (tokens,) = (output.token_ids for output in run(plain, [base]))
    stop = next(token for token in tokens[12:] if token not in tokens[:12])
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True, stop_token_ids=[stop])
    core = looping.engine.loop.core
    steps: list[int] = []
    collect = core._executor.collect

    def spy(handle: Any) -> Any:
        result = collect(handle)
        steps.append(len(result.token_ids))
        return result

    core._executor.collect = spy  # type: ignore[method-assign]
    try:
        (output,) = run(looping, [params])
        run(looping, [params])  # the slot's next owner finds nothing of it
    finally:
        core._executor.collect = collect  # type: ignore[method-assign]
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    assert sum(steps) == 2 * len(output.token_ids), "no decode step of nobody"


def test_min_tokens_and_end_tokens(looping: LLM, plain: LLM) -> None:
    bias: dict[str, Any] = {"logit_bias": {END_ID: 100.0}, "max_tokens": 17, "seed": 1}
    params = [SamplingParams(min_tokens=least, **bias) for least in range(12)]
    params += [SamplingParams(ignore_eos=True, **bias), SamplingParams(min_tokens=3, temperature=0.0, **bias)]
    want = ends(run(plain, params))
    assert [tokens.index(END_ID) for tokens, *_ in want[:12]] == list(range(12))
    assert ends(run(looping, params)) == want


def test_stop_strings_discard_what_came_after(looping: LLM, plain: LLM) -> None:
    base = SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True)
    text = run(plain, [base])[0].text
    pieces = [text[at : at + 2] for at in range(4, min(len(text), 24), 3)]
    params = [
        SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True, stop=piece)
        for piece in pieces
    ]
    single = [ends([plain.generate(prompts(1), p, use_tqdm=False)[0].outputs[0]]) for p in params]
    got = [ends([looping.generate(prompts(1), p, use_tqdm=False)[0].outputs[0]]) for p in params]
    assert got == single
    assert {end[0][1] for end in got} == {"stop"}


def test_rows_that_want_logprobs_make_one_token_at_a_time(looping: LLM, plain: LLM) -> None:
    params = [
        SamplingParams(temperature=0.5, seed=i, max_tokens=12, logprobs=i % 3 or None) for i in range(6)
    ]
    want, got = run(plain, params), run(looping, params)
    assert ends(got) == ends(want)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if ours.logprobs is not None and theirs.logprobs is not None:
            assert [set(step) for step in ours.logprobs] == [set(step) for step in theirs.logprobs]


def test_streams_bring_every_token_once(looping: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=8, max_tokens=30, ignore_eos=True)
    seen = [list(output.outputs[0].token_ids) for output in looping.stream(prompts(1)[0], params)]
    assert len(seen[-1]) == 30
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))


def test_caches_stay_where_they_are_and_nothing_compiles(looping: LLM) -> None:
    runner: Any = looping.engine.loop.core._executor
    before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner._caches)]
    compiles = compile_counter().count
    run(looping, lengths())
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner._caches)] == before
    assert compile_counter().count == compiles


@pytest.mark.parametrize(
    "change",
    [
        TIGHT | {"pipeline_depth": 0},
        TIGHT | {"pipeline_depth": 1},
        TIGHT | {"pipeline_depth": 2},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=lambda change: ",".join(f"{key}={value}" for key, value in change.items()),
)
def test_preemption_and_devices_change_no_token(change: dict[str, Any], checkpoint: Path, plain: LLM) -> None:
    options: dict[str, Any] = OPTIONS | change | {"max_decode_steps": STEPS, "row_buckets": (6,)}
    if "kv_cache_dtype" in change:
        single: dict[str, Any] = options | {"max_decode_steps": 1}
        with LLM(str(checkpoint), **single) as llm:
            want = ends(run(llm, lengths()))
    else:
        want = ends(run(plain, lengths()))
    with LLM(str(checkpoint), **options) as llm:
        assert ends(run(llm, lengths())) == want
        assert num_loops(llm) > 0
        if "num_pages" in change:
            assert llm.stats()["num_preemptions"] > 0, "this pool is meant to be too small"


@pytest.mark.slow
def test_a_loop_may_take_all_of_its_steps(
    checkpoint: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a branch makes the host wait, a loop does not ask whether anybody is left."""
    monkeypatch.setattr(Cpu, "branches_on_host", True)
    options: dict[str, Any] = OPTIONS | {"max_decode_steps": STEPS, "row_buckets": (6,)}
    with LLM(str(checkpoint), **options) as llm:
        assert ends(run(llm, lengths())) == ends(run(plain, lengths()))
        assert num_loops(llm) > 0
        runner: Any = llm.engine.loop.core._executor
        text = runner._programs.step(Bucket(6, 6, STEPS), SamplingKind.GREEDY).as_text()
        assert '"known_trip_count":{"n":"8"}' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_decode_steps": 9}, "max_decode_steps=9: must be at most page_size=8"),
        ({"max_decode_steps": 0}, "max_decode_steps=0: must be a positive integer"),
        ({"max_decode_steps": 1.5}, "max_decode_steps=1.5: must be a positive integer"),
    ],
)
def test_bad_lengths_say_what_is_wrong(options: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(checkpoint), **(OPTIONS | options))
