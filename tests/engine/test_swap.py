"""The host tier on a real device: pages leave and come back, and no token changes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.build import load_model, make_core, make_engine, make_runner
from jaxserve.engine.journals import Journals
from jaxserve.engine.recording import read_recording
from jaxserve.errors import ConfigError
from jaxserve.simulator.replay import replay
from tests.engine.test_tiny_model import OPTIONS

pytestmark = pytest.mark.usefixtures("free_copies")

PRESSED: dict[str, Any] = OPTIONS | {
    "num_pages": 24,
    "max_model_len": 168,
    "watermark": 0.0,
    "row_buckets": (6,),
    "token_buckets": (32,),
    "host_kv_bytes": 1 << 22,
}
PRESSED.pop("use_tqdm")


def work() -> tuple[list[list[int]], list[SamplingParams]]:
    """Ten requests that grow to twice the pages there are, if they come at once."""
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(9 + 5 * i)] for i in range(10)]
    params = [
        SamplingParams(
            temperature=0.9 * (i % 2),
            seed=i,
            max_tokens=50,
            ignore_eos=True,
            repetition_penalty=1.0 + 0.1 * (i % 3),
        )
        for i in range(10)
    ]
    return prompts, params


def answers(llm: LLM, *, at_once: bool) -> list[list[int]]:
    prompts, params = work()
    if at_once:
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    pairs = zip(prompts, params, strict=True)
    return [llm.generate([p], one, use_tqdm=False)[0].outputs[0].token_ids for p, one in pairs]


@pytest.mark.parametrize(
    ("dtype", "decode_steps"),
    [
        ("auto", 1),
        ("auto", 4),
        ("int8", 1),
        *(pytest.param("fp8", n, marks=pytest.mark.slow) for n in (1, 4)),
    ],
)
def test_tokens_are_the_same_at_every_depth(
    checkpoint: Path, dtype: str, decode_steps: int, tmp_path: Path
) -> None:
    """One runner, compiled once, behind an engine for each depth, with and without the prefix cache."""
    options = {**PRESSED, "kv_cache_dtype": dtype, "max_decode_steps": decode_steps}
    config = EngineConfig.from_flat({**options, "model": str(checkpoint)})
    model = load_model(config, progress=False)
    resolved, runner = make_runner(config, model, progress=False)

    def engine(journals: Journals | None = None, **scheduler: Any) -> LLM:
        caches = scheduler.pop("caches", False)
        mine = dataclasses.replace(
            config,
            scheduler=dataclasses.replace(config.scheduler, **scheduler),
            cache=dataclasses.replace(config.cache, enable_prefix_caching=caches),
        )
        core = make_core(mine, resolved, runner, runner.prepare, host=runner.host_tier, journals=journals)
        return LLM.from_engine(make_engine(mine, model, resolved, runner, core))

    with engine() as llm:
        alone = answers(llm, at_once=False)
        assert llm.stats()["num_preemptions"] == 0
    for depth in (0, 1, 2):
        with engine(pipeline_depth=depth, capacity="watermark") as llm:
            assert answers(llm, at_once=True) == alone
            stats = llm.stats()
        assert stats["num_preemptions"] > 0
        assert stats["swap"]["resumed_tokens"] > 0
        assert stats["num_lost_tokens"] < stats["swap"]["resumed_tokens"]  # those of prompts in part computed
        assert stats["swap"]["num_used_blocks"] == 0
        assert stats["compiles_after_warmup"] == 0
    file = tmp_path / "run.jsonl"
    journals = Journals(dataclasses.replace(config.scheduler, record=str(file)))
    with engine(journals, caches=True) as llm:
        assert answers(llm, at_once=True) == alone
        assert llm.stats()["swap"]["saved_tokens"] > 0
    journals.close()
    runner.close()
    again = replay(read_recording(file))
    assert again.num_steps > 50
    assert again.first_difference is None
    assert any(plan.landings for plan in again.plans)
    assert any(plan.is_loop for plan in again.plans) == (decode_steps > 1)


def pressed(host_kv_bytes: int) -> dict[str, Any]:
    return {**PRESSED, "host_kv_bytes": host_kv_bytes}


def test_too_little_host_memory_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"host_kv_bytes=10: must be 0, or at least"):
        LLM(str(checkpoint), **pressed(10))
    with pytest.raises(ConfigError, match=r"host_kv_bytes=-1: must be in"):
        LLM(str(checkpoint), **pressed(-1))
