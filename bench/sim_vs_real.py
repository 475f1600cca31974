"""The real engine and the simulator on the same trace, side by side.

    python bench/sim_vs_real.py --requests 100 --rate 2 --output results.jsonl

The engine serves the first part of the Azure conversation trace (scaled to the machine) and is recorded; a
cost model is fitted to those steps. Then it serves the second part, under each policy, and the simulator
serves the same requests at the times at which they really came, with the times of that cost model. Metrics:

- ``step_mape``, ``wall_error``: of the cost model on steps of the second part, which it has not seen; of each
  step, and of their sum;
- ``own_step_mape``, ``own_wall_error``: the same of a model fitted to every other step of the second part, on
  the rest: what it misses at one and the same speed of the machine;
- ``twin_spread``: of decode steps that follow each other with the same rows, half of what they differ by, a
  share: what any model of these features misses at least;
- ``speed_ratio``: median, over decode steps with the same rows, of mean time in the second part over that
  in the first: what the machine's speed did between fit and test;
- ``steps_in_time``: share of those steps that took at most 1.2 times what was predicted;
- ``*_real``, ``*_sim`` and ``*_ratio`` of TTFT, TPOT and E2E at the median and the 99th percentile;
- ``plans_identical``: 1 if the recording, played again, makes the same plans.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.batching_runs import offline_config
from bench.measures import RequestTimes, summary
from bench.real_engine import Served, arrivals, noisy, real_engine
from bench.results import Results, add_output_flag, jax_device
from bench.shapes import add_shape_flag, model_of, prompt_source
from bench.workloads import Workload, at_once, conversation_workload, find_traces, stretched
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.core.cost_model import CostModel, StepFeatures, mean_absolute_percentage_error
from jaxserve.core.plan import Bucket
from jaxserve.simulator.calibration import Sample, cluster_like, samples_of
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.replay import replay
from jaxserve.simulator.simulation import SimulationOptions, simulate

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "balanced": {"ordering": "sjf", "max_wait_s": 8.0},
    "latency": {"ordering": "sjf", "max_wait_s": 60.0},
}
COMPARED = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_s", "e2e_p99_s", "ttft_mean_s")
_PARTS = 2
_LATE = 1.2


def part_of(workload: Workload, part: int) -> Workload:
    """A half of the workload, from time 0."""
    size = len(workload.items) // _PARTS
    items = workload.items[part * size : (part + 1) * size]
    start = items[0].arrival_s
    moved = [dataclasses.replace(item, arrival_s=item.arrival_s - start) for item in items]
    return dataclasses.replace(workload, items=moved)


def compare(
    results: Results, case: str, served: Served, like: Cluster, fitted: Sequence[Sample], **scheduler: Any
) -> None:
    """Simulates what was served on engines like the real one, and emits both.

    Args:
        results: where to.
        case: the policy's name.
        served: by the real engine.
        like: what simulates.
        fitted: the steps that its times were fitted to.
        scheduler: the policy's options.
    """
    held_out: list[Sample] = samples_of(served.records)
    costs = like.times
    assert isinstance(costs, CostModel)
    where: dict[str, Any] = {"machine": like.label}
    results.add(case, "step_mape", mean_absolute_percentage_error(costs, held_out), "share", **where)
    results.add(case, "wall_error", wall_error(costs, held_out), "share", **where)
    own = CostModel(like.prior, forgetting=1.0)
    own.fit(held_out[::2])
    results.add(case, "own_step_mape", mean_absolute_percentage_error(own, held_out[1::2]), "share", **where)
    results.add(case, "own_wall_error", wall_error(own, held_out[1::2]), "share", **where)
    if (spread := twin_spread(held_out)) is not None:
        results.add(case, "twin_spread", spread, "share", **where)
    if (ratio := speed_ratio(fitted, held_out)) is not None:
        results.add(case, "speed_ratio", ratio, "ratio", **where)
    within = sum(seconds <= _LATE * costs.predict(b, f) for b, f, seconds in held_out) / len(held_out)
    results.add(case, "steps_in_time", within, "share", **where)
    identical = float(replay(served.records).first_difference is None)
    results.add(case, "plans_identical", identical, "bool", steps=len(held_out), **where)
    real, sim = summary(served.times), summary(simulated_like(like, served, **scheduler))
    for metric in COMPARED:
        unit = real[metric][1]
        results.add(case, f"{metric}_real", real[metric][0], unit, **where)
        results.add(case, f"{metric}_sim", sim[metric][0], unit, **where)
        if real[metric][0] > 0.0:
            results.add(case, f"{metric}_ratio", sim[metric][0] / real[metric][0], "ratio", **where)


def wall_error(costs: CostModel, samples: Sequence[Sample]) -> float:
    """How far the sum of the predictions is from the sum of the measured times, as a share."""
    measured = sum(seconds for _, _, seconds in samples)
    predicted = sum(costs.predict(bucket, features) for bucket, features, _ in samples)
    return abs(predicted / measured - 1)


def twin_spread(samples: Sequence[Sample]) -> float | None:
    """Mean of |a - b| / (a + b) over neighbours with the same bucket, tokens and rows that only decode.

    Their contexts differ by a token a row. None without such steps.
    """
    steps = [(_like_step(bucket, features), seconds) for bucket, features, seconds in samples]
    spreads = [
        abs(after - before) / (after + before)
        for (one, before), (other, after) in itertools.pairwise(steps)
        if one is not None and one == other
    ]
    return statistics.fmean(spreads) if spreads else None


def speed_ratio(before: Sequence[Sample], after: Sequence[Sample]) -> float | None:
    """Median over like decode steps of mean seconds in ``after`` over those in ``before``, if any."""
    means: list[dict[Any, float]] = []
    for samples in (before, after):
        seconds: defaultdict[Any, list[float]] = defaultdict(list)
        for bucket, features, step_s in samples:
            if (like := _like_step(bucket, features)) is not None:
                seconds[like].append(step_s)
        means.append({like: statistics.fmean(values) for like, values in seconds.items()})
    ratios = [means[1][like] / means[0][like] for like in means[0].keys() & means[1].keys()]
    return statistics.median(ratios) if ratios else None


def _like_step(bucket: Bucket, features: StepFeatures) -> tuple[Bucket, int] | None:
    """The same for steps that only decode and do as much; None for those with prompts."""
    return None if features.prefill_pairs else (bucket, features.sequences)


def simulated_like(like: Cluster, served: Served, **scheduler: Any) -> list[RequestTimes]:
    """The same requests, at the times at which they really came, in the simulator."""
    options = SimulationOptions(predictor="noisy", forces_lengths=True, pipeline_depth=1)
    policies = dataclasses.replace(like.assembly.scheduler, **scheduler)
    machine = dataclasses.replace(like, assembly=dataclasses.replace(like.assembly, scheduler=policies))
    simulated = simulate(arrivals(served.records), machine, options)
    return [request.times for request in simulated.requests]


def main(argv: list[str] | None = None) -> int:
    """Serves, records, calibrates, simulates, compares."""
    args = _parser().parse_args(argv)
    config = offline_config(engine_options(args), args.requests)
    model = model_of(config, args.shape)
    traces = find_traces(args.traces)
    whole = conversation_workload(
        prompt_source(model, args.shape, traces, args.bench_seed), traces, _PARTS * args.requests,
        args.bench_seed, prompt_scale=args.prompt_scale, output_scale=args.output_scale,
    )  # fmt: skip
    whole = stretched(whole, args.rate)
    first, second = part_of(whole, 0), part_of(whole, 1)
    results = Results("sim_vs_real", jax_device(), args.output)
    with real_engine(config, model) as engine:
        engine.serve(at_once(first), recorded=False)  # nothing that is fitted runs for the first time
        recorded = engine.serve(first, predictor=noisy(first, args.bench_seed)).records
        like, fitted = cluster_like(recorded), samples_of(recorded)
        for case in args.policies.split(","):
            served = engine.serve(second, predictor=noisy(second, 0), **POLICIES[case])
            compare(results, case, served, like, fitted, **POLICIES[case])
            print(json.dumps({"served": case, "requests": len(served.times)}), file=sys.stderr)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="sim_vs_real", description=__doc__)
    parser.add_argument("--requests", type=int, default=100, help="of each part (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--prompt-scale", type=float, default=16.0, help="divides prompt lengths")
    parser.add_argument("--output-scale", type=float, default=8.0, help="divides output lengths")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--bench-seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="folder of real data")
    add_shape_flag(parser)
    add_output_flag(parser)
    add_engine_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
