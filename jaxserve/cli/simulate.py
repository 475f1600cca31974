"""`jaxserve simulate`: a trace through the engine's own scheduler on devices that are not there."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxserve.cli.arguments import CommandParser, add_dataclass_flags, command_parser, given
from jaxserve.config import EngineConfig, LearningConfig, SchedulerConfig
from jaxserve.core.decision_log import DecisionLog, json_lines
from jaxserve.core.policies.own import METHODS
from jaxserve.core.policies.presets import policy_options
from jaxserve.engine.learning import LearningLog
from jaxserve.engine.recording import read_recording
from jaxserve.errors import ConfigError
from jaxserve.files import whole_file
from jaxserve.simulator.arm_runs import cluster_arms, prior_of, run_arm, tuner_maker
from jaxserve.simulator.calibration import cluster_like
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.replay import replay
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.timeline import write_timeline
from jaxserve.simulator.trace import TraceRequest, at_rate, read_trace, repeated

_SHOWN = (
    "output_tok_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttft_max_s", "tpot_p50_ms", "tpot_p99_ms",
    "itl_p99_ms", "e2e_mean_s", "e2e_p50_s", "e2e_p99_s", "wait_mean_s", "wait_max_s", "preemptions",
)  # fmt: skip
# Of a live engine only: a simulation has its own.
_LIVE_ONLY = frozenset({"record", "decision_log"})


def main(argv: list[str]) -> int:
    """Simulates each policy that is named, and prints a table."""
    arguments = _parser().parse_args(argv)
    if arguments.replay is not None:
        return _replay(arguments)
    if arguments.trace is None:
        raise ConfigError("trace: needs --trace FILE, or --replay FILE")
    trace = _trace(arguments)
    policies = list(dict.fromkeys(arguments.policy.split(",")))
    if arguments.write_prior is not None:
        return _write_prior(arguments, trace, policies[0])
    runs, label = _run_all(arguments, trace, policies)
    if arguments.output is not None:
        _write_lines(arguments.output, label, arguments, runs)
    console = Console()
    console.print(f"{arguments.trace.name}, {len(trace)} requests, {label}", highlight=False, soft_wrap=True)
    console.print(_table(runs))
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
        help="presets (static, dynamic, latency, balanced), orderings, compositions, or FILE.py:CLASS "
        "(default: %(default)s)",
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
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes: for policies, or for the engines of one (with --router round_robin)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to this file")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="write a timeline that Perfetto opens")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw percentiles")
    parser.add_argument("--decisions", type=Path, metavar="FILE", help="write the decision log of one engine")
    parser.add_argument(
        "--write-prior",
        type=Path,
        metavar="FILE",
        help="run the trace under each arm of learning, and write what they are worth (--learning-prior)",
    )
    add_dataclass_flags(parser, ClusterConfig, "cluster")
    add_dataclass_flags(parser, SchedulerConfig, "scheduler options", without=_LIVE_ONLY)
    add_dataclass_flags(parser, LearningConfig, "online learning")
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


def _config(arguments: argparse.Namespace, policy: str) -> EngineConfig:
    options = policy_options(policy) | given(arguments, SchedulerConfig) | given(arguments, LearningConfig)
    return EngineConfig.from_flat(options)  # which checks them


def _named_policies(arguments: argparse.Namespace) -> list[str]:
    """All that the command line names; a recording may have more."""
    options = given(arguments, SchedulerConfig)
    return [*arguments.policy.split(","), *(options[name] for name in METHODS if name in options)]


def _cluster(arguments: argparse.Namespace, scheduler: SchedulerConfig) -> Cluster:
    if arguments.like is None:
        return make_cluster(ClusterConfig(**given(arguments, ClusterConfig)), scheduler)
    like = cluster_like(read_recording(arguments.like, _named_policies(arguments)))
    return dataclasses.replace(like, assembly=dataclasses.replace(like.assembly, scheduler=scheduler))


def _run_all(
    arguments: argparse.Namespace, trace: list[TraceRequest], policies: Sequence[str]
) -> tuple[dict[str, SimulationResult], str]:
    """The run of each policy, side by side if there are processes for that; and their cluster's label."""
    if arguments.jobs == 1 or len(policies) == 1:
        done = [_run(arguments, trace, policies, policy, arguments.jobs) for policy in policies]
    elif getattr(arguments, "learning_log", None) is not None:
        raise ConfigError(f"jobs={arguments.jobs}: several policies with one learning_log need jobs=1")
    else:
        fresh = multiprocessing.get_context("spawn")  # a copy of a process with threads may lock up
        with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=fresh) as pool:
            futures = [pool.submit(_run, arguments, trace, policies, policy, 1) for policy in policies]
            done = [future.result() for future in futures]
    return {policy: run for policy, (run, _) in zip(policies, done, strict=True)}, done[-1][1]


def _run(
    arguments: argparse.Namespace, trace: list[TraceRequest], policies: Sequence[str], policy: str, jobs: int
) -> tuple[SimulationResult, str]:
    """One policy's run, and its cluster's label."""
    start = time.perf_counter()
    config = _config(arguments, policy)
    cluster = _cluster(arguments, config.scheduler)
    run = _simulate(arguments, trace, cluster, config, _suffix(policy, policies), jobs)
    print(f"{policy}: simulated in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return run, cluster.label


def _options(arguments: argparse.Namespace, config: EngineConfig) -> SimulationOptions:
    return SimulationOptions(
        router=arguments.router,
        predictor=arguments.predictor,
        sigma=arguments.sigma,
        seed=arguments.seed,
        pipeline_depth=config.scheduler.pipeline_depth,
        learns=config.learning.learning != "off" or arguments.write_prior is not None,
        keep_steps=arguments.timeline is not None,
    )


def _simulate(
    arguments: argparse.Namespace,
    trace: list[TraceRequest],
    cluster: Cluster,
    config: EngineConfig,
    suffix: str,
    jobs: int,
) -> SimulationResult:
    learning = config.learning
    with contextlib.ExitStack() as opened:
        decisions, maker = None, None
        if arguments.decisions is not None:
            _require_one_engine("decisions", cluster)
            path = _named(arguments.decisions, suffix)
            decisions = DecisionLog(json_lines(opened.enter_context(path.open("w", encoding="utf-8"))))
        if learning.learning != "off":
            if learning.learning_log is not None:
                _require_one_engine("learning_log", cluster)
            log = LearningLog(learning)
            opened.callback(log.close)
            maker = tuner_maker(cluster, learning, records=log.records, write=log.write, seed=arguments.seed)
        options = _options(arguments, config)
        run = simulate(trace, cluster, options, decision_log=decisions, make_tuner=maker, jobs=jobs)
    if arguments.timeline is not None:
        write_timeline(_named(arguments.timeline, suffix), run)
    return run


def _require_one_engine(option: str, cluster: Cluster) -> None:
    if cluster.num_engines != 1:
        raise ConfigError(f"{option}: the log of one engine, not of {cluster.num_engines}")


def _write_prior(arguments: argparse.Namespace, trace: list[TraceRequest], policy: str) -> int:
    """Prints what each arm was worth, and writes the file."""
    config = _config(arguments, policy)
    cluster = _cluster(arguments, config.scheduler)
    options, learning = _options(arguments, config), config.learning
    table = Table(title=f"{arguments.trace.name}, {len(trace)} requests, {cluster.label}")
    for column in ("arm", "mean reward", "epochs", "TTFT P99 (s)", "TPOT P99 (ms)"):
        table.add_column(column)
    runs = [run_arm(trace, cluster, options, learning, arm) for arm in cluster_arms(cluster)]
    for run in runs:
        metrics, rewards = run.result.metrics(), run.rewards
        mean = sum(rewards) / len(rewards) if rewards else float("nan")
        tails = [f"{metrics[name][0]:.4g}" for name in ("ttft_p99_s", "tpot_p99_ms")]
        table.add_row(run.arm.name, f"{mean:.3f}", str(len(rewards)), *tails)
    source = f"{arguments.trace.name}, {cluster.label}"
    with whole_file(arguments.write_prior) as scratch:
        scratch.write_text(json.dumps(prior_of(runs, source)) + "\n", encoding="utf-8")
    Console().print(table)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    """Prints what the replay found; 1 if a plan differs."""
    found = replay(read_recording(arguments.replay, _named_policies(arguments)))
    if found.first_difference is None:
        print(f"{found.num_steps} plans, all identical")
        return 0
    print(f"plan {found.first_difference} differs")
    return 1


def _suffix(policy: str, policies: Sequence[str]) -> str:
    """What tells the files of one policy from those of the others."""
    return "" if len(policies) == 1 else "-" + re.sub(r"[^\w.-]+", "-", policy)


def _named(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


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


def _table(runs: Mapping[str, SimulationResult]) -> Table:
    """A column for each policy, with the ratio to the first one's."""
    table = Table()
    table.add_column("metric", no_wrap=True)
    for policy in runs:
        table.add_column(policy, justify="right")
    base, *others = [run.metrics() for run in runs.values()]
    for name in _SHOWN:
        first = base[name][0]
        cells = [f"{first:.4g}"]
        for value in (metrics[name][0] for metrics in others):
            cells.append(f"{value:.4g} ({value / first:.2f}x)" if first else f"{value:.4g}")
        table.add_row(name, *cells)
    return table
