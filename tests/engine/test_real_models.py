"""Greedy tokens of real models equal those that transformers computed in float32 from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ModelNotFoundError
from jaxserve.loading.catalogue import find
from jaxserve.outputs import CompletionOutput, Logprob

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


class NearTie(NamedTuple):
    """Where an answer parts from the reference, two tokens being as good as equal."""

    case: str
    step: int
    margin: float  # nats by which the reference's token leads
    mine: int
    theirs: int

    def __str__(self) -> str:
        return (
            f"{self.case}, step {self.step}: {self.mine}, not {self.theirs}, which leads by {self.margin:.2e}"
        )


def check_model(name: str, recorded: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    found = [check_case(case, output.outputs[0]) for case, output in zip(cases, outputs, strict=True)]
    near_ties = [str(tie) for tie in found if tie is not None]
    listed = f"{name}: {len(near_ties)} of {len(cases)} answers part from the reference at a near tie"
    listed = "\n  ".join([listed, *near_ties])
    with capsys.disabled():  # they are to be seen when the test passes, too
        print(f"\n{listed}")
    assert len(near_ties) <= 2, listed


def check_case(case: dict[str, Any], got: Any) -> NearTie | None:
    """Fails unless the answers agree, or part at a near tie, after which nothing can be said."""
    want = case["output_token_ids"]
    for step, (mine, theirs) in enumerate(zip(got.token_ids, want, strict=False)):
        if mine != theirs:
            tie = NearTie(case["id"], step, case["margins"][step], mine, theirs)
            assert tie.margin < NEAR_TIE, str(tie)
            return tie
        assert abs(got.logprobs[step][mine].logprob - case["logprobs"][step]) < 2e-3, (case["id"], step)
    assert len(got.token_ids) == len(want)
    assert got.finish_reason == case["finish_reason"]
    return None


def test_a_near_tie_is_listed_and_anything_else_fails() -> None:
    case = {"id": "c", "output_token_ids": [5, 6], "margins": [1.0, 4e-4], "logprobs": [-0.5, -0.7]}
    answer = CompletionOutput(0, token_ids=[5, 9], logprobs=[{5: Logprob(-0.5, 1, "x")}, {}])
    tie = check_case(case, answer)
    assert str(tie) == "c, step 1: 9, not 6, which leads by 4.00e-04"
    with pytest.raises(AssertionError, match=r"c, step 1: 9, not 6, which leads by 2.00e-03"):
        check_case(case | {"margins": [1.0, 2e-3]}, answer)


@pytest.mark.reference
def test_smollm2_matches_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    check_model("smollm2-135m-instruct", "reference_smollm2.json", capsys)


@pytest.mark.reference
def test_gemma3_matches_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        present = find("gemma-3-270m", EngineConfig().cache_dir)
    except ModelNotFoundError:
        present = None
    if present is None:
        pytest.skip("needs Gemma 3 270M (its own terms): jaxserve pull gemma-3-270m")
    check_model("gemma-3-270m", "reference_gemma3.json", capsys)
