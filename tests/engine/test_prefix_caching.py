"""The prefix cache on a real device: it changes what is computed, and no token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.outputs import RequestOutput
from tests.engine.test_tiny_model import PLAIN, TIGHT


def conversations(llm: LLM) -> list[list[int]]:
    """Three rounds: a shared system prompt, then every answer with a new question after it."""
    rng = random.Random(3)
    system = [rng.randrange(256) for _ in range(61)]
    prompts = [[*system, *(rng.randrange(256) for _ in range(1 + 3 * i))] for i in range(8)]
    answers: list[list[int]] = []
    for turn in range(3):
        params = [
            SamplingParams(
                temperature=0.9 * (i % 2), seed=i, max_tokens=10, repetition_penalty=1.0 + 0.1 * (i % 3)
            )
            for i in range(8)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers += [output.outputs[0].token_ids for output in outputs]
        prompts = [
            [*prompt, *output.outputs[0].token_ids, turn, 7, 7]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    return answers


@pytest.mark.parametrize("pages", [{}, TIGHT], ids=["room", "evictions"])
def test_tokens_are_the_same_without_it(checkpoint: Path, pages: dict[str, Any]) -> None:
    with LLM(str(checkpoint), **PLAIN, enable_prefix_caching=False) as llm:
        expected = conversations(llm)
        assert llm.stats()["prefix_cache"] is None
    with LLM(str(checkpoint), **PLAIN | pages) as llm:
        assert conversations(llm) == expected
        cache = llm.stats()["prefix_cache"]
    assert cache["hit_tokens"] > 0.3 * cache["lookup_tokens"]
    assert cache["hit_rate"] == cache["hit_tokens"] / cache["lookup_tokens"]
    assert (cache["num_evicted_pages"] > 0) == bool(pages)


def test_completions_of_one_prompt_compute_it_once(checkpoint: Path) -> None:
    prompt = [i % 251 for i in range(100)]
    with LLM(str(checkpoint), **PLAIN) as llm:
        llm.generate([prompt], SamplingParams(n=5, temperature=1.0, seed=1, max_tokens=2), use_tqdm=False)
        computed = llm.engine.loop.core.stats.scheduled_tokens
        cache = llm.stats()["prefix_cache"]
    assert cache["hit_tokens"] == 4 * 96
    assert computed == 100 + 4 * 4 + 5


def test_outputs_say_what_was_cached_and_salts_keep_it_apart(checkpoint: Path) -> None:
    prompt = list(range(50))
    params = SamplingParams(temperature=0.0, max_tokens=2)

    def ask(llm: LLM, salt: str) -> RequestOutput:
        return llm.generate([prompt], params, use_tqdm=False, cache_salt=salt)[0]

    with LLM(str(checkpoint), **PLAIN) as llm:
        outputs = [ask(llm, salt) for salt in ("", "a", "b", "a", "")]
        *_, streamed = llm.stream(prompt, params, cache_salt="b")
        assert [o.metrics.num_cached_tokens for o in outputs] == [0, 0, 0, 48, 48]
        assert streamed.metrics.num_cached_tokens == 48
    assert len({tuple(o.outputs[0].token_ids) for o in [*outputs, streamed]}) == 1
