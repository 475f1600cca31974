"""What predictions gain in service: real questions, answered to their natural ends, near saturation.

A head is trained on the first half of the collected answers. The questions of the second half come at the
times of the conversation trace, stretched to shares of the rate at which the engine serves them when all are
there at once. Each answer is drawn by its own seed, so that all policies serve the same lengths, but for
near ties that another batch rounds otherwise. Every run starts with a predictor that has seen nothing but the
head.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bench.load_sweep import metrics_of, service_rate
from bench.prediction_data import Question, collected, prompt_ids, questions, shards
from bench.real_engine import RealEngine, real_engine
from bench.results import Results
from bench.workloads import CONVERSATION, Item, Workload, at_once, stretched
from jaxserve.config import EngineConfig
from jaxserve.core.fused_predictor import make_length_predictor
from jaxserve.core.policies.presets import policy_options
from jaxserve.core.predictor import MeanLengthPredictor
from jaxserve.engine.build import LoadedModel, load_model
from jaxserve.errors import ConfigError
from jaxserve.runner.length_head import save_head
from jaxserve.runner.length_training import TrainingOptions, read_recordings, train
from jaxserve.simulator.trace import read_trace

# Case -> policy, and what it knows of lengths; None: experts and head.
_CASES: dict[str, tuple[str, str | None]] = {
    "fcfs": ("fcfs", "mean"),
    "latency, mean": ("latency", "mean"),
    "latency, experts": ("latency", "fused"),
    "latency, experts and head": ("latency", None),
    "balanced, experts and head": ("balanced", None),
}
_SHOWN = ("output_tok_s", "ttft_mean_s", "e2e_mean_s", "e2e_p50_s", "e2e_p99_s")


def measure_live(arguments: argparse.Namespace, options: dict[str, Any], results: Results) -> None:
    """Trains on one half and serves the other under each case and load, in turns.

    Args:
        arguments: of ``prediction live``.
        options: of the engine.
    """
    records = collected(arguments.data)[: arguments.requests]
    half = len(records) // 2
    head_path = arguments.data / "half_head"
    data = read_recordings(shards([arguments.data]))
    seen = data.rows(np.isin(data.prompt, [record["prompt"] for record in records[:half]]))
    head, _ = train(seen, TrainingOptions(layers=arguments.layers))
    save_head(head, head_path)
    limit = max(record["max_tokens"] for record in records)
    config = EngineConfig.from_flat(
        {
            "max_num_seqs": arguments.slots,
            "max_model_len": 768 + limit,
            "length_predictor": "fused",
            "length_head": str(head_path),
            **options,
        }
    )
    model = load_model(config)
    asked = [questions(arguments.prompts)[record["index"]] for record in records[half:][: arguments.served]]
    workload = _workload(model, asked, limit, arguments.trace)
    with real_engine(config, model) as engine:
        served = engine.serve(at_once(workload), predictor=MeanLengthPredictor(), recorded=False)
        rate = service_rate(served.times)
        where = {"model": model.name, "slots": arguments.slots, "requests": len(asked)}
        results.add("live fcfs", "saturation_rate", rate, "requests/s", **where)
        for load in arguments.loads:
            arriving = stretched(workload, load * rate)
            _measure_load(results, engine, arriving, arguments.rounds, where | {"load": load})


def _measure_load(
    results: Results, engine: RealEngine, arriving: Workload, rounds: int, where: dict[str, Any]
) -> None:
    """All cases, ``rounds`` times in turns; each is compared with the same turn's first."""
    found: dict[str, list[dict[str, float]]] = {case: [] for case in _CASES}
    units: dict[str, str] = {}
    for _ in range(rounds):
        for case, (policy, knows) in _CASES.items():
            predictor = None if knows is None else make_length_predictor(knows)
            served = engine.serve(arriving, predictor=predictor, recorded=False, **policy_options(policy))
            metrics = metrics_of(served.times)
            found[case].append({name: metrics[name][0] for name in _SHOWN})
            units |= {name: metrics[name][1] for name in _SHOWN}
    base = found[next(iter(_CASES))]
    for case, turns in found.items():
        for name in _SHOWN:
            ratios = [turn[name] / first[name] for turn, first in zip(turns, base, strict=True)]
            over = {"over_fcfs": float(np.median(ratios))}
            values = [turn[name] for turn in turns]
            results.add_repeats(f"live {case}", name, values, units[name], **over, **where)


def _workload(model: LoadedModel, asked: list[Question], limit: int, trace: Path | None) -> Workload:
    """The questions at the trace's times. Raises ConfigError if it has too few rows."""
    if trace is None:
        raise ConfigError(f"trace: needs --trace FILE, {CONVERSATION}.csv.gz or one like it")
    rows = read_trace(trace, len(asked))
    if len(rows) < len(asked):
        raise ConfigError(f"trace={trace}: has {len(rows)} rows, and there are {len(asked)} questions")
    items: list[Item] = []
    for row, question in zip(rows, asked, strict=True):
        item = Item(
            prompt_ids(model.tokenizer, question),
            limit,
            row.arrival_s,
            temperature=0.7,
            top_p=0.95,
            stops=True,
        )
        items.append(dataclasses.replace(item, client=question.source))
    return Workload(trace.name, items)
