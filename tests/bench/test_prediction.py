"""The bench of length prediction: answers are collected, and judged by what nobody has seen."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.prediction_data import collect, collected, questions, shards
from bench.prediction_judging import Asked, Judged, cross_validated, report_head, report_service
from bench.prediction_live import measure_live
from bench.results import Results, read_results
from jaxserve.runner.length_training import Dataset, TrainingOptions, read_recordings


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One file for each data set of the mix."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for source in ("gpteacher", "gsm8k", "arena_hard", "humaneval"):
        rows = [
            {"prompt": f"{source} asks {i % 5}", "prompt_tokens": 400 if i % 5 == 4 else 9} for i in range(10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{source}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def dataset(requests: int, seed: int) -> Dataset:
    """The state says how many tokens are to come."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 120, requests)
    rows = [(r, t) for r, length in enumerate(lengths) for t in range(0, length, 10)]
    request, generated = (np.array(column) for column in zip(*rows, strict=True))
    remaining = lengths[request] - generated
    states = np.zeros((len(rows), 2, 4), np.float16)
    states[:, 1, 0] = np.log1p(remaining)
    states[:, 0] = rng.standard_normal((len(rows), 4))
    prompt = rng.integers(-(2**63), 2**63, requests)[request]
    return Dataset(
        model="m", layers=(3, 7), states=states, generated=generated, prompt_tokens=np.full(len(rows), 20),
        remaining=remaining, room=150 - generated, stopped=np.ones(len(rows), bool), request=request,
        prompt=prompt,
    )  # fmt: skip


@pytest.mark.slow
def test_heads_are_judged_on_what_they_have_not_seen(tmp_path: Path) -> None:
    data = dataset(200, 0)
    options = TrainingOptions(widths=(16,), epochs=30, learning_rate=1e-2, batch_size=64, dropout=0.0)
    path = tmp_path / "out.jsonl"
    results = Results("prediction", "here", path, prints=False)
    for layer in (3, 7):
        judged = cross_validated(data, TrainingOptions(**_fields(options), layers=(layer,)))
        report_head(results, f"layer {layer}", data, judged)
    found = {(r["case"], r["metric"]): r["value"] for r in read_results([path])}
    assert found["layer 7", "mae_of_survival"] < 0.4
    assert found["layer 3", "mae_of_survival"] > 0.85, "noise was found to know something"
    assert found["layer 3", "survival_mae"] == found["layer 7", "survival_mae"]


def _fields(options: TrainingOptions) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("widths", "epochs", "learning_rate", "batch_size", "dropout")
    }


def test_errors_by_hand(tmp_path: Path) -> None:
    data = dataset(1, 1)
    exact = np.log1p(np.stack([data.remaining * 0.5, data.remaining + 5, data.remaining + 9], axis=1))
    path = tmp_path / "out.jsonl"
    report_head(Results("p", "d", path, prints=False), "x", data, Judged(exact, data.remaining + 10.0))
    found = {(r["case"], r["metric"]): r["value"] for r in read_results([path])}
    assert found["x", "mae"] == pytest.approx(5.0, abs=0.01)
    assert found["x", "survival_mae"] == pytest.approx(10.0)
    assert found["x", "upper_coverage"] == 1.0
    assert found["x 0-7 generated", "mae"] == pytest.approx(5.0, abs=0.01)


def test_service_is_in_order_and_hears_the_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    asked: list[Asked] = []
    for _ in range(250):
        length = int(rng.integers(20, 180))
        probes = [
            (t, [np.log1p(length - t) - 0.1, np.log1p(length - t), np.log1p(length - t) + 0.1])
            for t in range(1, length, 10)
        ]
        asked.append(Asked([*rng.integers(0, 100, 30).tolist()], "c", 192, length, True, probes))
    path = tmp_path / "out.jsonl"
    report_service(Results("p", "d", path, prints=False), asked)
    found = {(r["case"], r["metric"]): r["value"] for r in read_results([path])}
    growing = "service while growing, "
    assert found[growing + "fused and head", "mae"] < 0.2 * found[growing + "fused", "mae"]
    arrival = "service at arrival, "
    assert found[arrival + "fused and head", "mae"] == found[arrival + "fused", "mae"]
    assert found["service at the end, fused and head, from_32", "weight_hidden_states"] > 0.9


@pytest.mark.slow
def test_answers_are_collected_where_the_last_call_stopped_and_served_live(
    prompts: Path, tmp_path: Path, tiny_model: Path
) -> None:
    asked = questions(prompts)
    assert len(asked) == len(set(asked)) == 4 * 5 - 3, "each prompt once, too long ones not at all"
    options: dict[str, Any] = {
        "model": str(tiny_model), "hidden_layers": (1, 2), "dtype": "float32", "max_model_len": 128,
        "compile_cache": False, "row_buckets": (16,), "token_buckets": (64,), "max_num_batched_tokens": 64,
    }  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    first = collect(prompts, data, 0.2, options, max_tokens=40)
    assert 1 <= first <= len(asked)
    assert collect(prompts, data, 60.0, options, max_tokens=40) == len(asked)
    records = collected(data)
    assert [record["index"] for record in records] == list(range(len(asked)))
    recorded = read_recordings(shards([data]))
    assert set(recorded.prompt.tolist()) <= {record["prompt"] for record in records}
    assert recorded.layers == (1, 2)

    trace, path = tmp_path / "trace.csv", tmp_path / "live.jsonl"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},9,9\n" for i in range(9)))
    arguments = argparse.Namespace(
        data=data, requests=None, layers=(2,), prompts=prompts, trace=trace, slots=16, rounds=1, loads=(0.9,),
        served=5,
    )  # fmt: skip
    measure_live(arguments, options, Results("prediction", "here", path, prints=False))
    found = {(r["case"], r["metric"]): r for r in read_results([path])}
    assert found["live fcfs", "saturation_rate"]["requests"] == 5
    assert found["live fcfs", "e2e_mean_s"]["over_fcfs"] == 1.0
    assert found["live latency, experts and head", "e2e_mean_s"]["value"] > 0.0
