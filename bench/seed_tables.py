"""The article's tables beside what was simulated or measured, row by row.

    python bench/seed_tables.py --output FILE
    python bench/seed_tables.py --measure burst,ttft --shape llama-3.1-8b --output FILE

The article gives, for Llama-3-70B on 4 x H200 and 1,000 requests of 50 to 1,000 tokens, throughput and
latency of a static server, of continuous batching, and of "smart" scheduling. Its latencies cannot be end to
end: 525 tokens in 0.4 s are 0.76 ms a token, and reading the weights once takes 7.35 ms there. They are read
as times to the first token, under open-loop arrivals at the rate in the row.

Each record says which machine, and whether it was measured, simulated or extrapolated. Both of the latter
are the engine's own scheduler on a virtual clock: ``simulated`` with step times of the machine in the row
(its label says whether they were fitted to measured steps), ``extrapolated`` with what was measured on
another. With ``--measure`` the same burst runs on the device that is there (`seed_measured.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench import seed_measured
from bench.batching_runs import offline_config
from bench.results import Results, add_output_flag, float_list, host_device, int_list, jax_device
from bench.shapes import add_shape_flag
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import SchedulerConfig
from jaxserve.core.cost_model import CostModel
from jaxserve.core.roofline import Roofline
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.profiles import load_profile
from jaxserve.simulator.simulation import SimulationOptions, simulate
from jaxserve.simulator.trace import TraceRequest, poisson, uniform

COUNT, LENGTHS = 1000, (50, 1000)
BUCKETS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
MACHINES = {
    "70b": ("4xH200", "llama-3-70b"),
    "8b": ("1xH100m", "llama-3-8b"),
    "8b, data sheet": ("1xH100", "llama-3-8b"),
}
_SET_HERE = frozenset({"max_num_seqs", "row_buckets", "token_buckets", "seed", "batching"})
# A typical static server: an eager engine's share of the peaks, no overlap of host and device.
POOR = {"memory_efficiency": 0.35, "flops_efficiency": 0.25, "step_overhead_s": 10e-3}
# What the engine's own steps reached of an H100's peaks.
_MEASURED = load_profile("H100m").device
LIKE_H100 = {
    "memory_efficiency": _MEASURED.memory_efficiency,
    "flops_efficiency": _MEASURED.flops_efficiency,
    "step_overhead_s": _MEASURED.step_overhead_s,
}
SLOW_ALL_REDUCE = {"collective_s": 90e-6}


class Row(NamedTuple):
    """One number of the article and ours."""

    name: str
    metric: str
    seed: float
    unit: str
    explanation: str


SEED_70B = (
    Row("static", "output_tok_s", 800, "tokens/s", "batches of 32 run to their longest member"),
    Row("continuous", "output_tok_s", 2400, "tokens/s", "32 slots: as many as the static server has"),
    Row("smart", "output_tok_s", 7200, "tokens/s", "512 slots, chunked prefill; ordering adds nothing here"),
    Row("smart", "ttft_mean_s", 0.4, "s", "read as TTFT, Poisson arrivals at 10/s"),
    Row("smart", "ttft_p50_s", 0.35, "s", "read as TTFT, Poisson arrivals at 10/s"),
    Row("smart", "ttft_p99_s", 0.8, "s", "read as TTFT, Poisson arrivals at 10/s"),
    Row(
        "static",
        "ttft_mean_s",
        3.2,
        "s",
        "read as TTFT; at 10/s 32 slots saturate, so this grows with the run",
    ),
    Row(
        "static",
        "ttft_p99_s",
        8.5,
        "s",
        "read as TTFT; at 10/s 32 slots saturate, so this grows with the run",
    ),
)


def cluster(
    machine: str,
    slots: int,
    *,
    changes: Mapping[str, float] | None = None,
    shapes: Sequence[int] = BUCKETS,
    **scheduler: Any,
) -> Cluster:
    """The article's machine or ours; ``changes`` are fields of the device's profile, ``shapes`` of steps."""
    devices, model = MACHINES[machine]
    buckets = tuple(n for n in shapes if n > slots)
    made = make_cluster(
        ClusterConfig(cluster=devices, model=model, token_buckets=buckets),
        SchedulerConfig(max_num_seqs=slots, max_num_batched_tokens=2048, **scheduler),
    )
    if not changes:
        return made
    assert isinstance(made.prior, Roofline)
    prior = dataclasses.replace(made.prior, device=dataclasses.replace(made.prior.device, **changes))
    changed = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    return dataclasses.replace(made, prior=prior, times=CostModel(prior), label=f"{made.label}, {changed}")


class Tables:
    """Runs and records."""

    def __init__(self, results: Results, seed: int) -> None:
        self._results = results
        self._burst = uniform(LENGTHS, LENGTHS, COUNT, seed)
        self._seed = seed
        self.rows: list[tuple[str, str, str, str]] = []

    def burst(self, made: Cluster, depth: int = 1) -> dict[str, tuple[float, str]]:
        """All requests there at the start."""
        return self._run(self._burst, made, depth)

    def poisson(self, made: Cluster, rate: float) -> dict[str, tuple[float, str]]:
        """Independent arrivals."""
        return self._run(poisson(self._burst, rate, self._seed), made, 1)

    def _run(self, trace: Sequence[TraceRequest], made: Cluster, depth: int) -> dict[str, tuple[float, str]]:
        return simulate(trace, made, SimulationOptions(pipeline_depth=depth)).metrics()

    def add(
        self,
        case: str,
        metric: str,
        value: float,
        unit: str,
        made: Cluster,
        *,
        seed: float | None,
        why: str,
        evidence: str = "simulated",
    ) -> None:
        """One row of a table."""
        ratio = {} if seed is None else {"seed": seed, "ratio": value / seed}
        self._results.add(
            case, metric, value, unit, machine=made.label, evidence=evidence, explanation=why, **ratio
        )
        shown = "" if seed is None else f"{seed:g}"
        self.rows.append((f"{case} {metric}", shown, f"{value:.4g} {unit}", f"{made.label}: {why}"))


def table_70b(tables: Tables) -> None:
    """The article's main table and its latency table."""
    made = {
        "static": cluster("70b", 32, batching="static"),
        "continuous": cluster("70b", 32),
        "smart": cluster("70b", 512),
    }
    bursts = {name: tables.burst(machine) for name, machine in made.items()}
    arriving = {name: tables.poisson(machine, 10.0) for name, machine in made.items()}
    for row in SEED_70B:
        source = bursts if row.metric == "output_tok_s" else arriving
        value, unit = source[row.name][row.metric]
        tables.add(row.name, row.metric, value, unit, made[row.name], seed=row.seed, why=row.explanation)
    low = {name: tables.poisson(machine, 1.5) for name, machine in made.items()}
    for name, machine in made.items():
        why = "end to end at 1.5/s: what the article's latencies cannot be"
        tables.add(name, "e2e_mean_s", low[name]["e2e_mean_s"][0], "s", machine, seed=None, why=why)
    slow = cluster("70b", 512, changes=SLOW_ALL_REDUCE)
    why = "all-reduces of 90 us in place of 10 us; both are assumed"
    tables.add(
        "smart", "output_tok_s", tables.burst(slow)["output_tok_s"][0], "tokens/s", slow, seed=7200, why=why
    )
    ours = cluster("70b", 512, changes=LIKE_H100)
    why = "the shares of its peaks that our steps reached on an H100; all-reduces of 10 us are assumed"
    burst, arriving_10 = tables.burst(ours), tables.poisson(ours, 10.0)
    for metric, seed in (("output_tok_s", 7200.0), ("ttft_mean_s", 0.4), ("ttft_p99_s", 0.8)):
        value, unit = (burst if metric == "output_tok_s" else arriving_10)[metric]
        tables.add("smart", metric, value, unit, ours, seed=seed, why=why, evidence="extrapolated")


def table_8b(tables: Tables) -> None:
    """The same burst with 8B shapes on one H100: what batching gives, and what a poor engine loses."""
    poor = cluster("8b, data sheet", 32, changes=POOR, batching="static", pipeline_depth=0)
    poor_rate = tables.burst(poor, 0)["output_tok_s"][0]
    why = "an eager static server: 35 % of the bandwidth, 25 % of the FLOPs, 10 ms a step of its own"
    tables.add("typical-static", "output_tok_s", poor_rate, "tokens/s", poor, seed=None, why=why)
    static = cluster("8b", 32, batching="static")
    static_rate = tables.burst(static)["output_tok_s"][0]
    tables.add(
        "static-32", "output_tok_s", static_rate, "tokens/s", static, seed=None, why="the same kernels"
    )
    for slots in (32, 64, 128, 256, 512):
        made = cluster("8b", slots)
        rate = tables.burst(made)["output_tok_s"][0]
        tables.add(
            f"continuous-{slots}", "output_tok_s", rate, "tokens/s", made, seed=None, why="all at once"
        )
        why = "over static-32 with the same kernels"
        tables.add(
            f"continuous-{slots}", "over_static", rate / static_rate, "ratio", made, seed=None, why=why
        )
        why = "over the typical static server; the article says 9"
        tables.add(
            f"continuous-{slots}", "over_typical_static", rate / poor_rate, "ratio", made, seed=9.0, why=why
        )
    coarse = cluster("8b", 32, shapes=seed_measured.TOKENS)
    ratio = tables.burst(coarse)["output_tok_s"][0] / static_rate
    case, why = (
        f"continuous-32-{len(seed_measured.TOKENS)}-shapes",
        "the same; steps of the shapes that were measured",
    )
    tables.add(case, "over_static", ratio, "ratio", coarse, seed=None, why=why)
    for rate in (1.0, 3.0, 6.0, 10.0, 14.0):
        before = tables.poisson(static, rate)["ttft_p99_s"][0]
        made = cluster("8b", 256)
        after = tables.poisson(made, rate)["ttft_p99_s"][0]
        why = f"1 - continuous-256 / static-32 in P99 TTFT, both at {rate:g}/s; the article says 0.9"
        tables.add(f"at-{rate:g}-per-s", "ttft_p99_cut", 1 - after / before, "share", made, seed=0.9, why=why)


def main(argv: list[str] | None = None) -> int:
    """Simulates both tables, or measures what the device that is there can run, and prints them."""
    args = _parser().parse_args(argv)
    if args.measure:
        config = offline_config(engine_options(args), args.requests)
        seed_measured.run(args, Results("seed_tables", jax_device(), args.output), config)
        return 0
    tables = Tables(Results("seed_tables", host_device(), args.output, prints=False), args.bench_seed)
    table_70b(tables)
    table_8b(tables)
    table = Table(title="The article's numbers, and ours")
    for name in ("row", "article", "ours", "machine and explanation"):
        table.add_column(name)
    for row in tables.rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="seed_tables", description=__doc__)
    parser.add_argument("--bench-seed", type=int, default=0)
    add_output_flag(parser)
    group = parser.add_argument_group("measured on this device")
    group.add_argument(
        "--measure",
        type=seed_measured.parts_of,
        default=(),
        metavar="PART,...",
        help=f"in place of the simulation: {', '.join(seed_measured.PARTS)}",
    )
    add_shape_flag(parser)
    group.add_argument("--requests", type=int, default=COUNT, help="of the burst (default: %(default)s)")
    group.add_argument("--lengths", type=_low_high, default=LENGTHS, metavar="LOW,HIGH")
    group.add_argument("--batch", type=int, default=32, help="of the static server (default: %(default)s)")
    group.add_argument("--static-batches", type=int, default=4, help="that it serves (default: %(default)s)")
    group.add_argument("--slots", type=int_list, default=(384,), help="of the engine (default: 384)")
    group.add_argument("--rates", type=float_list, default=(2.0,), help="requests/s for TTFT (default: 2)")
    group.add_argument("--rate-requests", type=int, default=150, help="at each (default: %(default)s)")
    add_engine_flags(parser, without=_SET_HERE)
    return parser


def _low_high(text: str) -> tuple[int, int]:
    numbers = int_list(text)
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH like 50,1000")
    return numbers[0], numbers[1]


if __name__ == "__main__":
    sys.exit(main())
