"""`jaxserve simulate`: a trace through the engine's own scheduler on devices that are not there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxserve.cli.arguments import CommandParser, add_dataclass_flags, command_parser, given
from jaxserve.config import EngineConfig, SchedulerConfig
from jaxserve.core.decision_log import DecisionLog, json_lines
from jaxserve.core.policies.presets import policy_options
from jaxserve.engine.recording import read_recording
from jaxserve.errors import ConfigError
from jaxserve.simulator.calibration import cluster_like
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.replay import replay
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.timeline import write_timeline
from jaxserve.simulator.trace import TraceRequest, at_rate, read_trace, repeated

_SHOWN = (
    "output_tok_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttft_max_s", "tpot_p50_ms", "tpot_p99_ms",
    "itl_p99_ms", "e2e_mean_s", "e2e_p50_s", "e2e_p99_s", "preemptions",
)  # fmt: skip
# Of a live engine only: a simulation has its own.
_LIVE_ONLY = frozenset({"record", "decision_log"})


def main(argv: list[str]) -> int:
    """Simulates each policy that is named, and prints a table."""
    arguments = _parser().parse_args(argv)
    if arguments.replay is not None:
        return _replay(arguments.replay)
    if arguments.trace is None:
        raise ConfigError("trace: needs --trace FILE, or --replay FILE")
    trace = _trace(arguments)
    runs: dict[str, SimulationResult] = {}
    label = ""
    for policy in arguments.policy.split(","):
        scheduler = _scheduler(arguments, policy)
        cluster = _cluster(arguments, scheduler)
        label = cluster.label
        options = SimulationOptions(
            router=arguments.router,
            predictor=arguments.predictor,
            sigma=arguments.sigma,
            seed=arguments.seed,
            pipeline_depth=scheduler.pipeline_depth,
            keep_steps=arguments.timeline is not None,
        )
        runs[policy] = _simulate(trace, cluster, options, arguments)
        if arguments.timeline is not None:
            write_timeline(_named(arguments.timeline, policy, arguments.policy), runs[policy])
    if arguments.output is not None:
        _write_lines(arguments.output, label, arguments, runs)
    Console().print(_table(f"{arguments.trace.name}, {len(trace)} requests, {label}", runs))
    if arguments.plots is not None:
        from jaxserve.simulator.plots import draw

        print(f"drew {draw(arguments.plots, f'{arguments.trace.name}, {label}', runs)}")
    return 0


def _parser() -> CommandParser:
    parser = command_parser(
        "simulate",
        "Run a trace through the engine's own scheduler, on a virtual clock and a model of what steps cost.",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help=".csv or .jsonl, plain or .gz")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="play a recording (--record) again and compare every plan"
    )
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="an engine like a recorded one: its sizes, its step times"
    )
    parser.add_argument(
        "--policy",
        default="fcfs",
        metavar="NAME,...",
        help="presets (static, dynamic, latency, balanced), orderings or compositions (default: %(default)s)",
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help="so many of the trace, repeated if it has fewer"
    )
    parser.add_argument(
        "--rate", type=float, metavar="X", help="stretch the trace to so many requests a second"
    )
    parser.add_argument(
        "--router", default="least_load", help="least_load or round_robin (default: %(default)s)"
    )
    parser.add_argument(
        "--predictor",
        default="mean",
        help="of lengths: mean, fused, oracle, noisy, shuffled, constant (default: %(default)s)",
    )
    parser.add_argument(
        "--sigma", type=float, default=0.7, metavar="X", help="noise of noisy (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of that noise (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes; with --router round_robin"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to this file")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="write a timeline that Perfetto opens")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw percentiles")
    parser.add_argument("--decisions", type=Path, metavar="FILE", help="write the decision log of one engine")
    add_dataclass_flags(parser, ClusterConfig, "cluster")
    add_dataclass_flags(parser, SchedulerConfig, "scheduler options", without=_LIVE_ONLY)
    return parser


def _trace(arguments: argparse.Namespace) -> list[TraceRequest]:
    for name in ("requests", "rate", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name}={value}: must be positive")
    trace = read_trace(arguments.trace, arguments.requests)
    if not trace:
        raise ConfigError(f"trace {arguments.trace}: has no requests")
    if arguments.requests is not None and arguments.requests > len(trace):
        trace = repeated(trace, arguments.requests)
    return trace if arguments.rate is None else at_rate(trace, arguments.rate)


def _scheduler(arguments: argparse.Namespace, policy: str) -> SchedulerConfig:
    options = policy_options(policy) | given(arguments, SchedulerConfig)
    return EngineConfig.from_flat(options).scheduler  # which checks them


def _cluster(arguments: argparse.Namespace, scheduler: SchedulerConfig) -> Cluster:
    if arguments.like is None:
        return make_cluster(ClusterConfig(**given(arguments, ClusterConfig)), scheduler)
    like = cluster_like(read_recording(arguments.like))
    return dataclasses.replace(like, assembly=dataclasses.replace(like.assembly, scheduler=scheduler))


def _simulate(
    trace: list[TraceRequest], cluster: Cluster, options: SimulationOptions, arguments: argparse.Namespace
) -> SimulationResult:
    if arguments.decisions is None:
        return simulate(trace, cluster, options, jobs=arguments.jobs)
    if cluster.num_engines != 1:
        raise ConfigError(f"decisions: the log of one engine, not of {cluster.num_engines}")
    with arguments.decisions.open("w", encoding="utf-8") as file:
        return simulate(trace, cluster, options, decision_log=DecisionLog(json_lines(file)))


def _replay(path: Path) -> int:
    """Prints what the replay found; 1 if a plan differs."""
    found = replay(read_recording(path))
    if found.first_difference is None:
        print(f"{found.num_steps} plans, all identical")
        return 0
    print(f"plan {found.first_difference} differs")
    return 1


def _named(path: Path, policy: str, policies: str) -> Path:
    """One file for each policy, if there are several."""
    return path if "," not in policies else path.with_name(f"{path.stem}-{policy}{path.suffix}")


def _write_lines(
    path: Path, label: str, arguments: argparse.Namespace, runs: Mapping[str, SimulationResult]
) -> None:
    with path.open("a", encoding="utf-8") as file:
        for policy, run in runs.items():
            common = {"trace": arguments.trace.name, "device": label, "predictor": arguments.predictor}
            for metric, (value, unit) in run.metrics().items():
                record = {"bench": "simulate", "case": policy, "metric": metric, "value": value, "unit": unit}
                print(json.dumps(record | common), file=file)
            for request in run.requests:
                print(json.dumps({"policy": policy, **dataclasses.asdict(request)}), file=file)


def _table(title: str, runs: Mapping[str, SimulationResult]) -> Table:
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    for policy in runs:
        table.add_column(policy, justify="right")
    metrics = {policy: run.metrics() for policy, run in runs.items()}
    for name in _SHOWN:
        table.add_row(name, *(f"{values[name][0]:.4g}" for values in metrics.values()))
    return table
