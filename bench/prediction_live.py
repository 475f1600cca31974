"""What predictions gain in service: real questions, answered to their natural ends, near saturation.

A head is trained on the first half of the collected answers, once. The questions of the second half come at
the times of the conversation trace, stretched to shares of the rate at which the engine serves them when all
are there at once. Each answer is drawn by its own seed, so that all policies serve the same lengths, but for
near ties that another batch rounds otherwise. All are of one client: fairness is not measured here. Every run
starts with a predictor that has seen nothing but the head.
"""

from __future__ import annotations

import argparse
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
from jaxserve.runner.length_training import TrainingOptions, read_recordings, train_best
from jaxserve.simulator.trace import read_trace

# Case -> policy, and what it knows of lengths; None: experts and head.
_CASES: dict[str, tuple[str, str | None]] = {
    "fcfs": ("fcfs", "mean"),
    "latency, experts and head": ("latency", None),
    "balanced, experts and head": ("balanced", None),
    "latency, experts": ("latency", "fused"),
    "latency, mean": ("latency", "mean"),
}
_HEAD = "half_head"  # in the folder of the answers
_SHOWN = ("output_tok_s", "ttft_mean_s", "e2e_mean_s", "e2e_p50_s", "e2e_p99_s")


def measure_live(arguments: argparse.Namespace, options: dict[str, Any], results: Results) -> None:
    """Trains on one half and serves the other under each case and load, in turns.

    Args:
        arguments: of ``prediction live``.
        options: of the engine.
    """
    records = collected(arguments.data)[: arguments.requests]
    half = len(records) // 2
    head_path: Path = arguments.data / _HEAD
    if not head_path.is_file():
        data = read_recordings(shards([arguments.data]))
        seen = data.rows(np.isin(data.prompt, [record["prompt"] for record in records[:half]]))
        save_head(train_best(seen, TrainingOptions(layers=arguments.layers)), head_path)
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
    texts = questions(arguments.prompts)
    asked = [texts[record["index"]] for record in records[half:][: arguments.served]]
    workload = _workload(model, asked, limit, arguments.trace)
    with real_engine(config, model) as engine:
        served = engine.serve(at_once(workload), predictor=MeanLengthPredictor(), recorded=False)
        rate = service_rate(served.times)
        where = {"model": model.name, "slots": arguments.slots, "requests": len(asked)}
        results.add("live fcfs", "saturation_rate", rate, "requests/s", **where)
        for load in arguments.loads:
            arriving = stretched(workload, load * rate)
            for turn in range(arguments.rounds):
                _measure_turn(results, engine, arriving, where | {"load": load, "turn": turn})


def _measure_turn(results: Results, engine: RealEngine, arriving: Workload, where: dict[str, Any]) -> None:
    """Every case once; all are compared with the first."""
    base: dict[str, tuple[float, str]] = {}
    for case, (policy, knows) in _CASES.items():
        predictor = None if knows is None else make_length_predictor(knows)
        served = engine.serve(arriving, predictor=predictor, recorded=False, **policy_options(policy))
        metrics = metrics_of(served.times)
        base = base or metrics
        for name in _SHOWN:
            value, unit = metrics[name]
            results.add(f"live {case}", name, value, unit, over_fcfs=value / base[name][0], **where)


def _workload(model: LoadedModel, asked: list[Question], limit: int, trace: Path | None) -> Workload:
    """The questions at the trace's times. Raises ConfigError if it has too few rows."""
    if trace is None:
        raise ConfigError(f"trace: needs --trace FILE, {CONVERSATION}.csv.gz or one like it")
    rows = read_trace(trace, len(asked))
    if len(rows) < len(asked):
        raise ConfigError(f"trace={trace}: has {len(rows)} rows, and there are {len(asked)} questions")
    items = [
        Item(prompt_ids(model.tokenizer, question), limit, row.arrival_s, 0.7, 0.95, stops=True)
        for row, question in zip(rows, asked, strict=True)
    ]
    return Workload(trace.name, items)
