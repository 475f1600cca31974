"""Two tiers of the prefix cache on a real device: pages leave and come back, and no token changes."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.core.resume_costs import NO_HOST
from jaxserve.engine.build import load_model, make_core, make_engine, make_runner
from jaxserve.engine.journals import Journals
from jaxserve.engine.recording import read_recording
from jaxserve.simulator.replay import replay
from tests.engine.test_swap import PRESSED

pytestmark = pytest.mark.usefixtures("free_copies")

SMALL: dict[str, Any] = PRESSED | {"num_pages": 28}


def conversations(llm: LLM) -> list[list[int]]:
    """Eight conversations of three turns over a system prompt: together three times the pages there are."""
    rng = random.Random(3)
    system = [rng.randrange(256) for _ in range(33)]
    prompts = [[*system, *(rng.randrange(256) for _ in range(20 + i))] for i in range(8)]
    answers: list[list[int]] = []
    for turn in range(3):
        params = [SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=10) for i in range(8)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers += [output.outputs[0].token_ids for output in outputs]
        prompts = [
            [*prompt, *output.outputs[0].token_ids, turn, 7, 7]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    return answers


@pytest.mark.parametrize("dtype", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_tokens_are_the_same_on_no_tier_one_and_two(checkpoint: Path, dtype: str, tmp_path: Path) -> None:
    """One runner, compiled once, behind an engine for each depth; a recording replays every copy."""
    config = EngineConfig.from_flat({**SMALL, "kv_cache_dtype": dtype, "model": str(checkpoint)})
    model = load_model(config, progress=False)
    resolved, runner = make_runner(config, model, progress=False)

    def engine(depth: int, journals: Journals | None = None, *, tiers: int, preloads: bool = False) -> LLM:
        mine = dataclasses.replace(
            config,
            scheduler=dataclasses.replace(config.scheduler, pipeline_depth=depth),
            cache=dataclasses.replace(
                config.cache, enable_prefix_caching=tiers > 0, enable_prefix_preloading=preloads
            ),
        )
        host = runner.host_tier if tiers == 2 else NO_HOST
        # A hundredth of a second whenever somebody looks: pauses are as many steps on every machine.
        clock = itertools.count(0.0, 0.01).__next__
        core = make_core(mine, resolved, runner, runner.prepare, journals=journals, host=host, clock=clock)
        return LLM.from_engine(make_engine(mine, model, resolved, runner, core, clock=clock))

    with engine(1, tiers=0) as llm:
        expected = conversations(llm)
    for depth in (0, 1, 2):
        with engine(depth, tiers=1) as llm:
            assert conversations(llm) == expected
            assert llm.stats()["prefix_cache"]["host"] is None
        with engine(depth, tiers=2, preloads=depth > 0) as llm:
            assert conversations(llm) == expected
            stats = llm.stats()
        cache = stats["prefix_cache"]
        assert cache["host_hit_tokens"] > 0
        assert cache["host"]["loaded_bytes"] > 0
        assert stats["compiles_after_warmup"] == 0
        assert stats["num_used_pages"] == stats["swap"]["num_used_blocks"] == 0
    file = tmp_path / "run.jsonl"
    journals = Journals(dataclasses.replace(config.scheduler, record=str(file)))
    with engine(1, journals, tiers=2, preloads=True) as llm:
        assert conversations(llm) == expected
    journals.close()
    runner.close()
    again = replay(read_recording(file))
    assert again.first_difference is None
    assert any(copy.request_id == "" for plan in again.plans for copy in plan.loads)
