"""A real engine that learns: its log, its restart under another arm, and the same tokens."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.recording import read_recording
from jaxserve.errors import ConfigError
from jaxserve.simulator.replay import replay
from tests.support.tiny_checkpoint import write_tiny_checkpoint

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "row_buckets": (4,),
    "token_buckets": (8, 16, 32),
    "max_model_len": 128,
    "page_size": 8,
    "num_pages": 60,
    "compile_cache": False,
    "use_tqdm": False,
}


@pytest.mark.slow
def test_an_engine_learns_restarts_and_makes_the_same_tokens(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(30)]
    params = [SamplingParams(max_tokens=3 + i, seed=i) for i in range(30)]
    model, log, recording = (
        str(write_tiny_checkpoint(tmp_path / "tiny")),
        tmp_path / "log.jsonl",
        tmp_path / "run",
    )
    learns: dict[str, Any] = {"learning": "on", "learning_epoch_s": 1.0, "learning_log": str(log)}

    def texts(llm: LLM) -> list[tuple[int, ...]]:
        return [
            tuple(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)
        ]

    with LLM(model, **OPTIONS) as llm:
        assert llm.stats()["learning"] is None
        expected = texts(llm)
    with LLM(model, **OPTIONS, **learns) as llm:
        assert texts(llm) == expected
        end = time.monotonic() + 30.0
        while llm.stats()["learning"]["epochs"] < 2 and time.monotonic() < end:
            assert texts(llm) == expected
        assert llm.stats()["learning"]["arm"] == "32-fcfs-watermark"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records[0]["arms"]) == 3 * 3 * 2
    assert len(records) >= 3

    # Nothing was known to be safe in so short a time; now let one arm have been.
    other = next(i for i, arm in enumerate(records[0]["arms"]) if arm["max_num_batched_tokens"] == 8)
    records[-1]["safe"] = [other]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    with LLM(model, **OPTIONS, **learns, record=str(recording)) as llm:
        assert llm.stats()["learning"]["arm"].startswith("8-")
        assert texts(llm) == expected
        assert llm.stats()["compiles_after_warmup"] == 0
    found = replay(read_recording(recording))
    assert found.first_difference is None
    assert max(sum(row.num_tokens for row in plan.rows) for plan in found.plans) <= 8


def test_a_log_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_log="):
        LLM("tiny", learning="on", learning_log=str(tmp_path / "no" / "log.jsonl"))
