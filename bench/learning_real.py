"""Online learning on the real engine: the same requests at the same times with it off and on, in turns.

    python bench/learning_real.py --rate 3.5 --ttft-slo-s 3 --tpot-slo-s 0.35 --output results.jsonl

The Azure conversation trace, scaled to the machine. Runs with learning share one log: each but the first is a
restart that goes through it. Cases ``off`` and ``on``, each record with its ``run``:

- ``goodput``: share of requests within both objectives; ``ttft_p99_s``, ``tpot_p99_ms``, ``e2e_mean_s``;
- ``learn_ms_per_step``: of the *learn* stage, on the engine's thread, of ``step_ms`` (all stages);
- ``epochs`` of the log so far, of them ``learnt`` and ``bad``, and by the reason of the choice ``best``,
  ``explored``, ``rest``, ``unsafe``; ``other_share``: of choices of another arm than the default;
- ``unsafe_plays``: choices of neither the default nor a safe arm; ``differing``: not made again by a restart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.batching_runs import offline_config
from bench.measures import summary
from bench.real_engine import Served, noisy, real_engine
from bench.results import Results, add_output_flag, jax_device
from bench.shapes import add_shape_flag, model_of, prompt_source
from bench.workloads import conversation_workload, find_traces, with_poisson_arrivals
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import LearningConfig, SchedulerConfig


def unsafe_plays(epochs: Sequence[Mapping[str, Any]]) -> int:
    """Choices of an arm that is neither the default, 0, nor among those that were said to be safe."""
    return sum(epoch["decision"]["arm"] not in (0, *epoch["safe"]) for epoch in epochs)


def other_share(epochs: Sequence[Mapping[str, Any]]) -> float:
    """Of the choices, those of another arm than the default."""
    return sum(epoch["decision"]["arm"] != 0 for epoch in epochs) / max(len(epochs), 1)


def measures_of(served: Served, scheduler: SchedulerConfig) -> dict[str, tuple[float, str]]:
    """What both cases have: name -> (value, unit)."""
    times, stages = served.times, served.stats["stage_ms_per_step"]
    good = sum(
        t.ttft <= scheduler.ttft_slo_s and (t.tpot is None or t.tpot <= scheduler.tpot_slo_s) for t in times
    )
    table = summary(times)
    return {
        "goodput": (good / len(times), "share"),
        **{name: table[name] for name in ("ttft_p99_s", "tpot_p99_ms")},
        "e2e_mean_s": (sum(t.e2e for t in times) / len(times), "s"),
        "learn_ms_per_step": (stages["learn"], "ms"),
        "step_ms": (sum(stages.values()), "ms"),
    }


def main(argv: list[str] | None = None) -> int:
    """Serves the workload off, on, off, on, ..."""
    args = _parser().parse_args(argv)
    config = offline_config(engine_options(args), args.requests)
    model = model_of(config, args.shape)
    traces = find_traces(args.traces)
    workload = conversation_workload(
        prompt_source(model, args.shape, traces, args.bench_seed), traces, args.requests, args.bench_seed,
        prompt_scale=args.prompt_scale, output_scale=args.output_scale,
    )  # fmt: skip
    workload = with_poisson_arrivals(workload, args.rate, args.bench_seed)
    results = Results("learning_real", jax_device(), args.output)
    scheduler = config.scheduler
    where: dict[str, Any] = {
        "model": model.name, "workload": workload.name, "requests": args.requests, "rate": args.rate,
        "ttft_slo_s": scheduler.ttft_slo_s, "tpot_slo_s": scheduler.tpot_slo_s,
    }  # fmt: skip
    with real_engine(config, model) as engine, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learning.jsonl"
        learns = LearningConfig(
            learning="on", learning_log=str(path), learning_epoch_s=config.learning.learning_epoch_s
        )
        for run in range(args.runs):
            for case, learning in (("off", None), ("on", learns)):
                served = engine.serve(
                    workload, predictor=noisy(workload, args.bench_seed), recorded=False, learning=learning
                )
                for name, (value, unit) in measures_of(served, scheduler).items():
                    results.add(case, name, value, unit, run=run, **where)
            epochs = [json.loads(line) for line in path.read_text("utf-8").splitlines()][1:]
            counts = served.stats["learning"]
            for name in ("epochs", "learnt", "bad", "best", "explored", "rest", "unsafe", "differing"):
                results.add("on", name, counts[name], "epochs", run=run, **where)
            results.add("on", "unsafe_plays", unsafe_plays(epochs), "epochs", run=run, **where)
            results.add(
                "on", "other_share", other_share(epochs), "share", run=run, plays=counts["plays"], **where
            )
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="learning_real", description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="of a run (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="off and on, each (default: %(default)s)")
    parser.add_argument("--prompt-scale", type=float, default=16.0, help="divides prompt lengths")
    parser.add_argument("--output-scale", type=float, default=16.0, help="divides output lengths")
    parser.add_argument("--bench-seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="folder of real data")
    add_shape_flag(parser)
    add_output_flag(parser)
    add_engine_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
