"""Greedy tokens of real models equal those that transformers computed in float32 from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ModelNotFoundError
from jaxserve.loading.catalogue import find

DATA = Path(__file__).parents[1] / "data"
NEAR_TIE = 1e-3  # nats between the two best tokens; below it, float32 on another machine may pick the other
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 16,
    "row_buckets": (16,),
    "token_buckets": (256,),
    "max_model_len": 1024,
    "num_pages": 600,
    "use_tqdm": False,
}


def check_model(name: str, recorded: str) -> None:
    reference = json.loads((DATA / recorded).read_text())
    cases = reference["cases"]
    params = SamplingParams(temperature=0.0, max_tokens=reference["max_new_tokens"], logprobs=0)
    with LLM(name, **OPTIONS) as llm:
        prompts = []
        for case in cases:
            if case["messages"] is not None:
                assert llm.tokenizer.render_chat(case["messages"]) == case["prompt"]
            prompts.append({"prompt_token_ids": case["prompt_token_ids"]})
        outputs = llm.generate(prompts, params, use_tqdm=False)
    near_ties = 0
    for case, output in zip(cases, outputs, strict=True):
        near_ties += check_case(case, output.outputs[0])
    assert near_ties <= 2, f"{near_ties} answers part from the reference at a near tie"


def check_case(case: dict[str, Any], got: Any) -> int:
    """Fails unless the answers agree; 1 if they part at a near tie, after which nothing can be said."""
    want = case["output_token_ids"]
    for step, (mine, theirs) in enumerate(zip(got.token_ids, want, strict=False)):
        if mine != theirs:
            assert case["margins"][step] < NEAR_TIE, (
                f"{case['id']}: token {step} is {mine}, not {theirs}, which leads by {case['margins'][step]}"
            )
            return 1
        assert abs(got.logprobs[step][mine].logprob - case["logprobs"][step]) < 2e-3, (case["id"], step)
    assert len(got.token_ids) == len(want)
    assert got.finish_reason == case["finish_reason"]
    return 0


@pytest.mark.reference
def test_smollm2_matches_transformers() -> None:
    check_model("smollm2-135m-instruct", "reference_smollm2.json")


@pytest.mark.reference
def test_gemma3_matches_transformers() -> None:
    try:
        present = find("gemma-3-270m", EngineConfig().cache_dir)
    except ModelNotFoundError:
        present = None
    if present is None:
        pytest.skip("needs Gemma 3 270M (its own terms): jaxserve pull gemma-3-270m")
    check_model("gemma-3-270m", "reference_gemma3.json")
