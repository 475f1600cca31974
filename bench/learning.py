"""Online learning, simulated: the learner against every arm alone, on three workloads and on all in a row.

    python bench/learning.py --output results.jsonl

Every run is the engine's own scheduler, step loop and tuner on a virtual clock, 8B shapes on one device, step
times as its profile has them. The workloads were picked so that different arms are best on them: chats at a
rate that small steps cannot serve, code completion whose prompts stall tokens in large steps, and the same
with the trace's own bursts. Parts:

- ``arms``: each arm alone on each workload: reward, both tails, goodput, modelled energy, and which arms no
  other beats in all of them (``pareto``).
- ``learner``: on each workload and on the concatenation, cold and with a prior from the simulator that was
  made from other requests of the same traces; ratios to the best arm alone. Needs ``arms`` in the same run.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import Results, add_output_flag, host_device
from bench.workloads import find_traces, synthetic_trace
from jaxserve.cli.arguments import CommandParser
from jaxserve.config import LearningConfig, SchedulerConfig
from jaxserve.core.cost_model import CostModel
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.tuner import QueueState, Tuner
from jaxserve.errors import ConfigError
from jaxserve.simulator.arm_runs import ArmRun, cluster_arms, prior_of, run_arm, tuner_maker
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.measures import percentile
from jaxserve.simulator.simulation import SimulationOptions, simulate
from jaxserve.simulator.trace import TraceRequest, at_rate, poisson, read_trace

SLOTS, BUDGET = 256, 1024
BUCKETS = (320, 384, 448, 512, 640, 768, 896, 1024)
TTFT_SLO_S, TPOT_SLO_S = 2.0, 0.0285
EPOCH_S = 10.0
OPTIONS = SimulationOptions(learns=True, predictor="noisy")
# Better, all else equal: more of the first, less of the others.
PARETO = ("goodput", "ttft_p99_s", "tpot_p99_ms", "joules_per_token")


class Workload(NamedTuple):
    """Requests at a rate: at random times, or in the trace's own pattern."""

    trace: str
    rate: float
    is_poisson: bool


WORKLOADS = {
    "chats": Workload("azure2023_conv", 18.0, True),
    "code": Workload("azure2023_code", 11.0, True),
    "code-bursts": Workload("azure2023_code", 4.0, False),
}


class Job(NamedTuple):
    """One arm alone on one workload."""

    workload: str
    trace: list[TraceRequest]
    arm: Arm
    cluster: str


def machine(name: str) -> Cluster:
    """What is simulated."""
    scheduler = SchedulerConfig(
        max_num_seqs=SLOTS, max_num_batched_tokens=BUDGET, ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S
    )
    return make_cluster(ClusterConfig(cluster=name, token_buckets=BUCKETS), scheduler)


def learns(**options: Any) -> LearningConfig:
    """The options of a run that learns."""
    return LearningConfig(learning="on", learning_epoch_s=EPOCH_S, **options)


def make_traces(folder: Path | None, seconds: float, seed: int) -> dict[str, dict[str, list[TraceRequest]]]:
    """The workloads twice, from different requests: ``prior`` and ``run``. Drawn where there is no file."""
    halves: dict[str, dict[str, list[TraceRequest]]] = {"prior": {}, "run": {}}
    for name, workload in WORKLOADS.items():
        count = int(workload.rate * seconds)
        path = None if folder is None else folder / f"{workload.trace}.csv.gz"
        if path is not None and path.is_file():
            rows, shown = read_trace(path, 2 * count), name
            if len(rows) < 2 * count:
                raise ConfigError(
                    f"seconds={seconds}: {name} has {len(rows)} requests, that takes {2 * count}"
                )
        else:
            rows, shown = synthetic_trace(2 * count, seed), f"{name}-synthetic"
        for half, part in (("prior", rows[:count]), ("run", rows[count:])):
            timed = (
                poisson(part, workload.rate, seed) if workload.is_poisson else at_rate(part, workload.rate)
            )
            halves[half][shown] = timed
    return halves


def in_a_row(traces: Sequence[list[TraceRequest]]) -> list[TraceRequest]:
    """One after the other."""
    joined: list[TraceRequest] = []
    for trace in traces:
        start = joined[-1].arrival_s if joined else 0.0
        joined += [row._replace(arrival_s=start + row.arrival_s) for row in trace]
    return joined


def play(job: Job) -> tuple[str, ArmRun]:
    """The name of its workload, and the run."""
    return job.workload, run_arm(job.trace, machine(job.cluster), OPTIONS, learns(), job.arm)


def play_all(jobs: Sequence[Job], processes: int) -> list[tuple[str, ArmRun]]:
    """All of them, in their order."""
    if processes == 1:
        return [play(job) for job in jobs]
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return list(pool.map(play, jobs))


def mean(values: Sequence[float]) -> float:
    """0 for none."""
    return sum(values) / len(values) if values else 0.0


def measures_of(epochs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Of a run, from the records of its epochs: name -> (value, unit)."""
    seen = [epoch["measures"] for epoch in epochs if epoch["measures"]["num_counted"]]
    counted = sum(m["num_counted"] for m in seen)
    joules, tokens = sum(m["joules"] or 0.0 for m in seen), sum(m["output_tokens"] for m in seen)
    return {
        "goodput": (sum(m["num_good"] for m in seen) / max(counted, 1), "share"),
        "ttft_p99_s": (mean([m["ttft_p99_s"] for m in seen]), "s"),
        "tpot_p99_ms": (1e3 * mean([m["tpot_p99_s"] for m in seen]), "ms"),
        "joules_per_token": (joules / max(tokens, 1), "J"),
    }


def is_beaten(own: Mapping[str, tuple[float, str]], other: Mapping[str, tuple[float, str]]) -> bool:
    """Whether another arm is at least as good in everything, and better in something."""
    signs = {name: -1.0 if name == "goodput" else 1.0 for name in PARETO}
    gaps = [signs[name] * (other[name][0] - own[name][0]) for name in PARETO]
    return max(gaps) <= 0.0 and min(gaps) < 0.0


class Bench:
    """Runs on one machine, and emits what comes out."""

    def __init__(self, results: Results, cluster: str, processes: int) -> None:
        self._results = results
        self._name = cluster
        self._cluster = machine(cluster)
        self._processes = processes
        self._arms = cluster_arms(self._cluster)

    def _add(self, case: str, metric: str, value: float, unit: str, **more: Any) -> None:
        self._results.add(case, metric, value, unit, machine=self._cluster.label, **more)

    def arms(self, traces: Mapping[str, list[TraceRequest]]) -> dict[str, list[ArmRun]]:
        """Each arm alone on each workload."""
        jobs = [Job(name, trace, arm, self._name) for name, trace in traces.items() for arm in self._arms]
        runs: dict[str, list[ArmRun]] = {name: [] for name in traces}
        for name, run in play_all(jobs, self._processes):
            runs[name].append(run)
        return runs

    def emit_arms(self, runs: Mapping[str, Sequence[ArmRun]]) -> None:
        """The table of arms, a workload after the other."""
        for workload, of_workload in runs.items():
            tables = [measures_of(run.epochs) for run in of_workload]
            for run, table in zip(of_workload, tables, strict=True):
                beaten = any(is_beaten(table, other) for other in tables)
                where = {"workload": workload, "pareto": not beaten}
                for metric, (value, unit) in {"reward": (mean(run.rewards), "1"), **table}.items():
                    self._add(run.arm.name, metric, value, unit, **where)

    def learner(
        self, traces: Mapping[str, list[TraceRequest]], alone: Mapping[str, Sequence[ArmRun]], prior: Path
    ) -> None:
        """Against the best arm of each workload, and the best single one of all in a row."""
        rows = {**traces, "in-a-row": in_a_row(list(traces.values()))}
        best = {name: max(mean(run.rewards) for run in runs) for name, runs in alone.items()}
        self._add("best-of-each", "reward", mean(list(best.values())), "1", workload="in-a-row")
        best["in-a-row"] = self._best_single(rows["in-a-row"], alone)
        for case, config in (("cold", learns()), ("prior", learns(learning_prior=str(prior)))):
            for workload, trace in rows.items():
                epochs, spent_ms = self._learn(trace, config)
                reward = mean([epoch["reward"] for epoch in epochs if epoch["learns"]])
                where = {"workload": workload, "epochs": len(epochs)}
                self._add(case, "reward", reward, "1", ratio=reward / best[workload], **where)
                for metric, (value, unit) in measures_of(epochs).items():
                    self._add(case, metric, value, unit, **where)
                self._add(case, "choice_ms", percentile(spent_ms, 50), "ms", **where)
                self._add(case, "choice_p99_ms", percentile(spent_ms, 99), "ms", **where)
                reasons = [epoch["decision"]["reason"] for epoch in epochs]
                for reason in ("unsafe", "rest", "explored"):
                    self._add(case, f"{reason}_share", reasons.count(reason) / len(epochs), "share", **where)

    def _best_single(self, trace: list[TraceRequest], alone: Mapping[str, Sequence[ArmRun]]) -> float:
        """Of all in a row; those three are tried that were best on average of the workloads alone."""
        means = {
            arm: mean([mean(run.rewards) for runs in alone.values() for run in runs if run.arm == arm])
            for arm in self._arms
        }
        candidates = sorted(self._arms, key=lambda arm: means[arm], reverse=True)[:3]
        jobs = [Job("in-a-row", trace, arm, self._name) for arm in candidates]
        runs = [run for _, run in play_all(jobs, self._processes)]
        for run in runs:
            self._add(run.arm.name, "reward", mean(run.rewards), "1", workload="in-a-row")
        return max(mean(run.rewards) for run in runs)

    def _learn(
        self, trace: list[TraceRequest], config: LearningConfig
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """The records of a run that learns, and the CPU milliseconds of each choice."""
        records, spent_ms = list[dict[str, Any]](), list[float]()
        make = tuner_maker(self._cluster, config, write=records.append)

        def make_timed(costs: CostModel) -> Tuner:
            tuner = make(costs)
            choose = tuner.choose

            def timed(now: float, queue: QueueState) -> Arm:
                start = time.process_time()
                arm = choose(now, queue)
                spent_ms.append(1e3 * (time.process_time() - start))
                return arm

            tuner.choose = timed  # type: ignore[method-assign]
            return tuner

        simulate(trace, self._cluster, OPTIONS, make_tuner=make_timed)
        return records[1:], spent_ms


def main(argv: list[str] | None = None) -> int:
    """Runs the arms, makes a prior of them, and lets the learner run."""
    args = _parser().parse_args(argv)
    bench = Bench(Results("learning", host_device(), args.output), args.cluster, args.processes)
    halves = make_traces(find_traces(args.traces), args.seconds, args.bench_seed)
    alone = bench.arms(halves["run"])
    bench.emit_arms(alone)
    if args.parts == "arms":
        return 0
    elsewhere = [run for runs in bench.arms(halves["prior"]).values() for run in runs]
    with tempfile.TemporaryDirectory() as folder:
        prior = Path(folder) / "prior.json"
        prior.write_text(json.dumps(prior_of(elsewhere, "other requests of the same traces")), "utf-8")
        bench.learner(halves["run"], alone, prior)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="learning", description=__doc__)
    parser.add_argument(
        "--parts",
        choices=("arms", "all"),
        default="all",
        help="arms alone, or the learner too (default: all)",
    )
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="simulated, of each workload (default: %(default)s)"
    )
    parser.add_argument("--cluster", default="1xH100m", help="what is simulated (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that play arms (default: %(default)s)")
    parser.add_argument("--bench-seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="folder of real data")
    add_output_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
