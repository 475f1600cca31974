"""The real engine and the simulator on the same trace, side by side.

    python bench/sim_vs_real.py --requests 100 --rate 2 --output results.jsonl

The engine serves the first part of the Azure conversation trace (scaled to the machine) and is recorded; a
cost model is fitted to those steps. Then it serves the second part, under each policy, and the simulator
serves the same requests at the times at which they really came, with the times of that cost model. Metrics:

- ``step_mape``, ``wall_error``: of the cost model on steps of the second part, which it has not seen; of each
  step, and of their sum;
- ``*_real``, ``*_sim`` and ``*_ratio`` of TTFT, TPOT and E2E at the median and the 99th percentile;
- ``plans_identical``: 1 if the recording, played again, makes the same plans.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.batching_runs import generate
from bench.measures import RequestTimes, request_times, summary
from bench.results import Results, add_output_flag, jax_device
from bench.workloads import PromptSource, Workload, conversation_workload, find_traces, stretched
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import EngineConfig
from jaxserve.core.cost_model import CostModel, mean_absolute_percentage_error
from jaxserve.core.known_lengths import make_known_length_predictor
from jaxserve.core.predictor import LengthPredictor
from jaxserve.engine.build import LoadedModel, load_model, make_core, make_engine, make_runner
from jaxserve.engine.journals import Journals
from jaxserve.engine.recording import read_recording
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.resolve import ResolvedConfig
from jaxserve.simulator.calibration import Sample, cluster_like, samples_of
from jaxserve.simulator.replay import replay
from jaxserve.simulator.simulation import SimulationOptions, simulate
from jaxserve.simulator.trace import TraceRequest

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "balanced": {"ordering": "sjf", "max_wait_s": 8.0},
    "latency": {"ordering": "sjf", "max_wait_s": 60.0},
}
COMPARED = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "e2e_p50_s", "e2e_p99_s", "ttft_mean_s")
_PARTS = 2


class Served(NamedTuple):
    """One run of the real engine."""

    times: list[RequestTimes]
    records: list[dict[str, Any]]


class RealEngine:
    """One model and one compiled runner; each run has a scheduler of its own, and is recorded."""

    def __init__(self, config: EngineConfig, model: LoadedModel, folder: Path) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        made: tuple[ResolvedConfig, ModelRunner] = make_runner(config, model)
        self._resolved, self._runner = made

    def serve(self, workload: Workload, predictor: LengthPredictor, **scheduler: Any) -> Served:
        """Makes the requests at their times and waits for all."""
        path = self._folder / "recording.jsonl"
        options = dataclasses.replace(self._config.scheduler, record=str(path), **scheduler)
        config = dataclasses.replace(self._config, scheduler=options)
        journals = Journals(options)
        core = make_core(
            config, self._resolved, self._runner, self._runner.prepare, predictor=predictor, journals=journals
        )
        engine = make_engine(config, self._model, self._resolved, self._runner, core, on_close=journals.close)
        try:
            outputs = generate(engine, workload)
        finally:
            engine.close()
        return Served([request_times(output) for output in outputs], read_recording(path))


def part_of(workload: Workload, part: int) -> Workload:
    """A half of the workload, from time 0."""
    size = len(workload.items) // _PARTS
    items = workload.items[part * size : (part + 1) * size]
    start = items[0].arrival_s
    moved = [dataclasses.replace(item, arrival_s=item.arrival_s - start) for item in items]
    return dataclasses.replace(workload, items=moved)


def noisy(workload: Workload, seed: int) -> LengthPredictor:
    """Predictions with noise of sigma 0.7, as the simulator draws them."""
    lengths = {str(index): item.output_tokens for index, item in enumerate(workload.items)}
    return make_known_length_predictor("noisy", lengths, sigma=0.7, seed=seed)


def arrivals(records: Sequence[Mapping[str, Any]]) -> list[TraceRequest]:
    """The requests of a recording, in the order of their numbers, at the times at which they came."""
    added = sorted((r for r in records if r["e"] == "add"), key=lambda record: int(record["id"]))
    start = min(record["arrival"] for record in added)
    return [TraceRequest(r["arrival"] - start, r["prompt_tokens"], r["max_tokens"]) for r in added]


def compare(
    results: Results, case: str, served: Served, calibration: Sequence[Mapping[str, Any]], **scheduler: Any
) -> None:
    """Simulates what was served, and emits both."""
    held_out: list[Sample] = samples_of(served.records)
    like = cluster_like(calibration)
    costs = like.times
    assert isinstance(costs, CostModel)
    where: dict[str, Any] = {"machine": like.label}
    results.add(case, "step_mape", mean_absolute_percentage_error(costs, held_out), "share", **where)
    total = sum(seconds for _, _, seconds in held_out)
    predicted = sum(costs.predict(bucket, features) for bucket, features, _ in held_out)
    results.add(case, "wall_error", abs(predicted / total - 1), "share", **where)
    identical = float(replay(served.records).first_difference is None)
    results.add(case, "plans_identical", identical, "bool", steps=len(held_out), **where)
    options = SimulationOptions(predictor="noisy", forces_lengths=True, pipeline_depth=1)
    policies = dataclasses.replace(like.assembly.scheduler, **scheduler)
    machine = dataclasses.replace(like, assembly=dataclasses.replace(like.assembly, scheduler=policies))
    simulated = simulate(arrivals(served.records), machine, options)
    real, sim = summary(served.times), summary([request.times for request in simulated.requests])
    for metric in COMPARED:
        unit = real[metric][1]
        results.add(case, f"{metric}_real", real[metric][0], unit, **where)
        results.add(case, f"{metric}_sim", sim[metric][0], unit, **where)
        if real[metric][0] > 0.0:
            results.add(case, f"{metric}_ratio", sim[metric][0] / real[metric][0], "ratio", **where)


def main(argv: list[str] | None = None) -> int:
    """Serves, records, calibrates, simulates, compares."""
    args = _parser().parse_args(argv)
    # The trace does not say which prompts begin alike, so the real ones must not share either.
    defaults = {"max_queued_requests": args.requests, "enable_prefix_caching": False}
    config = EngineConfig.from_flat(defaults | engine_options(args))
    model = load_model(config)
    traces = find_traces(args.traces)
    prompts = PromptSource(model.tokenizer, traces, args.bench_seed)
    whole = conversation_workload(
        prompts, traces, _PARTS * args.requests, args.bench_seed,
        prompt_scale=args.prompt_scale, output_scale=args.output_scale,
    )  # fmt: skip
    whole = stretched(whole, args.rate)
    first, second = part_of(whole, 0), part_of(whole, 1)
    results = Results("sim_vs_real", jax_device(), args.output)
    with tempfile.TemporaryDirectory() as folder:
        engine = RealEngine(config, model, Path(folder))
        calibration = engine.serve(first, noisy(first, args.bench_seed)).records
        for case in args.policies.split(","):
            served = engine.serve(second, noisy(second, 0), **POLICIES[case])
            compare(results, case, served, calibration, **POLICIES[case])
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
    add_output_flag(parser)
    add_engine_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
