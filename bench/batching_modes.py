"""Compares static, dynamic and continuous batching: same model, kernels and scheduler, other policies."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.batching_runs import MODES, Run, Runners, offline_config
from bench.measures import throughput
from bench.results import Results, add_output_flag, int_list, jax_device
from bench.workloads import (
    PromptSource,
    Workload,
    at_once,
    conversation_workload,
    find_traces,
    stretched,
    uniform_workload,
    with_poisson_arrivals,
)
from jaxserve.cli.arguments import CommandParser, add_engine_flags, command_parser, engine_options
from jaxserve.config import Batching
from jaxserve.errors import ConfigError

_DESCRIPTION = """\
Compares static, dynamic and continuous batching on the same model, kernels and scheduler code; only the
admission policy differs. Each mode runs at the best of the batch sizes given, found on the first requests.
Output lengths are forced. Prints a table and one JSON object a line; definitions are in bench/README.md."""

WORKLOADS = ("uniform", "conversation")
# The bench sets these itself.
_NOT_HERE = frozenset({"batching", "max_num_seqs", "max_model_len", "seed"})
_TABLE_WIDTH = 120
_SPEEDUPS = {"output_tok_s": "speedup_over_static", "steady_tok_s": "steady_speedup_over_static"}

type RunsByMode = dict[Batching, list[Run]]


def make_parser() -> CommandParser:
    """The command line: the bench's own flags, then the engine's."""
    parser = command_parser("bench", _DESCRIPTION, usage="jaxserve bench [options]")
    add = parser.add_argument_group("benchmark options").add_argument
    add("--workload", choices=[*WORKLOADS, "all"], default="all", help="which lengths (default: all)")
    add(
        "--modes",
        type=_modes,
        default=MODES,
        metavar="MODE,...",
        help="static, the base, and which others (default: all)",
    )
    add("--requests", type=int, default=128, metavar="N", help="requests of a run (default: 128)")
    add("--batch-sizes", type=int_list, default=(8, 16, 32), metavar="N,...", help="default: 8,16,32")
    add(
        "--trial-requests",
        type=int,
        metavar="N",
        help="to find the best batch size; default: twice the largest",
    )
    add("--repeats", type=int, default=3, metavar="N", help="runs of each mode, interleaved (default: 3)")
    add("--outputs", type=int_list, default=(10, 200), metavar="LOW,HIGH", help="uniform (default: 10,200)")
    add(
        "--scale", type=float, default=8.0, metavar="K", help="conversation: divide lengths by K (default: 8)"
    )
    add("--prompt-scale", type=float, metavar="K", help="conversation: another divisor for prompts")
    add(
        "--longest-prompt", type=int, default=16, metavar="N", help="uniform: cut prompts there (default: 16)"
    )
    add(
        "--rate", type=float, metavar="X", help="also as an open loop of X requests/s (default: offline only)"
    )
    add("--traces", type=Path, metavar="DIR", help="folder of real traces and prompts")
    add("--plots", type=Path, metavar="DIR", help="draw the plots there")
    add(
        "--bench-seed", type=int, default=0, metavar="N", help="of lengths, prompts and arrivals (default: 0)"
    )
    add("--verbose", action="store_true", help="log every run")
    add_output_flag(parser)
    add_engine_flags(parser, without=_NOT_HERE)
    return parser


def _modes(text: str) -> tuple[Batching, ...]:
    chosen = {"static", *text.split(",")}
    if unknown := chosen - set(MODES):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is not one of {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in chosen)


def make_workloads(args: argparse.Namespace, prompts: PromptSource, traces: Path | None) -> list[Workload]:
    """The workloads asked for, all requests at once."""
    made: list[Workload] = []
    if args.workload in ("uniform", "all"):
        low_high = (args.outputs[0], args.outputs[-1])
        made.append(uniform_workload(prompts, low_high, args.requests, args.bench_seed, args.longest_prompt))
    if args.workload in ("conversation", "all"):
        made.append(
            conversation_workload(
                prompts,
                traces,
                args.requests,
                args.bench_seed,
                prompt_scale=args.prompt_scale or args.scale,
                output_scale=args.scale,
            )
        )
    return made


def best_batch_sizes(
    runners: Runners, modes: Sequence[Batching], sizes: Sequence[int], workload: Workload, count: int
) -> dict[Batching, int]:
    """The batch size with the highest output throughput, for each mode, on the first ``count`` requests."""
    if len(sizes) == 1:
        return dict.fromkeys(modes, sizes[0])
    trial = at_once(Workload(workload.name, workload.items[:count]))
    best: dict[Batching, int] = {}
    for mode in modes:
        rates = {size: throughput(runners.run(mode, size, trial).times) for size in sizes}
        best[mode] = max(rates, key=lambda size: rates[size])
    return best


def run_modes(runners: Runners, best: Mapping[Batching, int], workload: Workload, repeats: int) -> RunsByMode:
    """Repeats of each mode at its best batch size, interleaved so that a slow minute hits all alike."""
    runs: RunsByMode = {mode: [] for mode in best}
    for _ in range(repeats):
        for mode, size in best.items():
            runs[mode].append(runners.run(mode, size, workload))
    return runs


def report(results: Results, runs: RunsByMode, workload: str, arrivals: str) -> Table:
    """Emits every metric of every mode, and returns them as a table."""
    table = Table(title=f"{workload}, {arrivals}", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for mode, done in runs.items():
        table.add_column(f"{mode} (batch {done[0].batch_size})", justify="right", no_wrap=True)
    where = {"workload": workload, "arrivals": arrivals}
    static = [run.metrics() for run in runs["static"]]
    cells: dict[str, list[str]] = {}
    for mode, done in runs.items():
        metrics = [run.metrics() for run in done]
        series = {name: ([m[name][0] for m in metrics], unit) for name, (_, unit) in metrics[0].items()}
        for rate, speedup in _SPEEDUPS.items():
            pairs = zip(metrics, static, strict=True)
            series[speedup] = ([m[rate][0] / base[rate][0] for m, base in pairs], "x")
        series["best_batch"] = ([float(done[0].batch_size)], "requests")
        for name, (values, unit) in series.items():
            results.add_repeats(mode, name, values, unit, **where)
            median = results.records[-1]["value"]
            spread = f" [{min(values):.4g}..{max(values):.4g}]" if len(values) > 1 else ""
            cells.setdefault(name, []).append(f"{median:.4g}{spread}")
    for name, row in cells.items():
        table.add_row(name, *row)
    return table


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns 0. Raises ConfigError and the errors of loading a model."""
    args = make_parser().parse_args(argv)
    if min(args.requests, args.repeats) < 1 or len(args.outputs) != 2 or args.scale <= 0:
        raise ConfigError("requests, repeats and scale must be positive, and outputs LOW,HIGH")
    if args.verbose:
        logging.basicConfig(level=logging.INFO)
    traces = find_traces(args.traces)
    config = offline_config(engine_options(args, without=_NOT_HERE), args.requests)
    runners = Runners(config, args.batch_sizes, progress=sys.stderr.isatty())
    tokenizer = runners.model.tokenizer
    workloads = make_workloads(args, PromptSource(tokenizer, traces, args.bench_seed), traces)
    runners.prepare(max(workload.longest for workload in workloads))
    # At a terminal the table is what is read; the lines are for the file, if there is one.
    results = Results("batching_modes", jax_device(), args.output, prints=args.output is None)
    console = Console(stderr=True) if sys.stderr.isatty() else Console(stderr=True, width=_TABLE_WIDTH)
    for workload in workloads:
        count = args.trial_requests or 2 * max(args.batch_sizes)
        best = best_batch_sizes(runners, args.modes, args.batch_sizes, workload, count)
        loads = {"offline": at_once(workload)}
        if args.rate is not None:
            is_timed = workload.items[-1].arrival_s > 0
            loads[f"{args.rate:g}-per-s"] = (
                stretched(workload, args.rate)
                if is_timed
                else with_poisson_arrivals(workload, args.rate, args.bench_seed)
            )
        for arrivals, load in loads.items():
            runs = run_modes(runners, best, load, args.repeats)
            console.print(report(results, runs, workload.name, arrivals))
            if args.plots is not None:
                from bench.batching_plots import draw_all

                for path in draw_all(args.plots, f"{workload.name}, {arrivals}", runs):
                    console.print(f"drew {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
