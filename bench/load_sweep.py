"""The part ``sweep`` of `scheduling.py`: policies by load, on the real engine and in the simulator.

The engine serves the first part of the conversation trace, all at once and then at half of the rate at which
it served that; the simulator's step times are fitted to those runs. The second part is served at each load
under each policy, and simulated with the same arrivals. Loads are shares of the rate with everything there
at once. Each record has ``load``; ``*_real`` and ``*_sim`` have ``over_fcfs``, their ratio to first come,
first served at that load.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.batching_runs import offline_config
from bench.measures import RequestTimes, summary
from bench.real_engine import RealEngine, noisy, real_engine
from bench.results import Results
from bench.shapes import model_of, prompt_source
from bench.sim_vs_real import POLICIES, part_of, simulated_like, wall_error
from bench.workloads import Workload, at_once, conversation_workload, stretched
from jaxserve.core.cost_model import CostModel, mean_absolute_percentage_error
from jaxserve.simulator.calibration import cluster_like, samples_of
from jaxserve.simulator.cluster import Cluster

METRICS = (
    "output_tok_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms",
    "e2e_mean_s", "e2e_p50_s", "e2e_p99_s",
)  # fmt: skip
_CALIBRATION_LOAD = 0.5


def service_rate(times: Sequence[RequestTimes]) -> float:
    """Requests a second in the middle of a run, without the start and the tail, where slots are empty."""
    ends = sorted(t.finished for t in times)
    low, high = len(ends) // 10, len(ends) * 9 // 10
    return (high - low) / (ends[high] - ends[low])


def metrics_of(times: Sequence[RequestTimes]) -> dict[str, tuple[float, str]]:
    """Name -> (value, unit)."""
    return {**summary(times), "e2e_mean_s": (sum(t.e2e for t in times) / len(times), "s")}


class Sweep:
    """One engine, and its likeness in the simulator."""

    def __init__(self, results: Results, engine: RealEngine, case: str, first: Workload) -> None:
        self._results = results
        self._engine = engine
        full = engine.serve(at_once(first))
        self.rate = service_rate(full.times)
        half = engine.serve(stretched(first, _CALIBRATION_LOAD * self.rate))
        self._like: Cluster = cluster_like(full.records, half.records)
        self._where: dict[str, Any] = {"machine": self._like.label, "model": case, "workload": first.name}
        results.add("fcfs", "saturation_rate", self.rate, "requests/s", **self._where)

    def run(self, second: Workload, load: float, policies: Sequence[str], seed: int) -> None:
        """Serves and simulates one load under every policy; the others are compared with the first."""
        arriving = stretched(second, load * self.rate)
        base: dict[str, dict[str, tuple[float, str]]] = {}
        where = {**self._where, "load": load, "requests": len(second.items)}
        for policy in policies:
            options = POLICIES[policy]
            served = self._engine.serve(arriving, predictor=noisy(arriving, seed), **options)
            both = {
                "real": metrics_of(served.times),
                "sim": metrics_of(simulated_like(self._like, served, **options)),
            }
            base = base or both
            for side, metrics in both.items():
                for name in METRICS:
                    value, unit = metrics[name]
                    reference = base[side][name][0]
                    over = {"over_fcfs": value / reference} if reference else {}
                    self._results.add(policy, f"{name}_{side}", value, unit, **over, **where)
            for name in METRICS:
                if both["real"][name][0] > 0.0:
                    ratio = both["sim"][name][0] / both["real"][name][0]
                    self._results.add(policy, f"{name}_ratio", ratio, "ratio", **where)
            times, held_out = self._like.times, samples_of(served.records)
            assert isinstance(times, CostModel)
            error = mean_absolute_percentage_error(times, held_out)
            self._results.add(policy, "step_mape", error, "share", steps=len(held_out), **where)
            self._results.add(policy, "wall_error", wall_error(times, held_out), "share", **where)


def run(args: argparse.Namespace, options: dict[str, Any], results: Results, traces: Path | None) -> None:
    """Sweeps the loads and policies asked for with the model of ``args.shape``, or the configured one."""
    config = offline_config(options, args.requests)
    model = model_of(config, args.shape)
    prompts = prompt_source(model, args.shape, traces, args.bench_seed)
    whole = conversation_workload(
        prompts, traces, 2 * args.requests, args.bench_seed,
        prompt_scale=args.prompt_scale, output_scale=args.output_scale,
    )  # fmt: skip
    with real_engine(config, model) as engine:
        sweep = Sweep(results, engine, model.name, part_of(whole, 0))
        for load in args.loads:
            sweep.run(part_of(whole, 1), load, args.policies, args.bench_seed)


def policies_of(text: str) -> Sequence[str]:
    """Parses ``fcfs,balanced`` for argparse; ``fcfs`` must be the first."""
    names = text.split(",")
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    if names[0] != "fcfs":
        raise argparse.ArgumentTypeError(f"{text!r} must begin with fcfs, which the others are compared with")
    return names
