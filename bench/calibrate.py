"""Measures what steps take on the device that is there, and writes a profile for `jaxserve simulate`.

    python bench/calibrate.py --shape llama-3.1-8b --trace azure2023_conv.csv.gz --profile H100m.json \\
        --output calibrate.jsonl
    jaxserve simulate --profiles . --cluster 1xH100m --model llama-3-8b --trace ...

The engine serves a grid (batch sizes x contexts, each a prefill and some decode steps), then the first part
of a trace; the cost model and the device's profile are fitted to those steps. Then it serves the second part
of the trace, which the fit has not seen. Metrics:

- ``step_mape``, ``wall_error``: of the cost model on the second part: of each step, and of their sum;
- ``roofline_mape``, ``roofline_wall_error``: the same of the fitted roofline alone, which knows no buckets
  and can be scaled to other models;
- ``*_real``, ``*_sim``, ``*_ratio``: TTFT, TPOT and E2E of the second part, served and simulated;
- ``memory_efficiency``, ``flops_efficiency``, ``step_overhead_ms``: what was fitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.batching_runs import offline_config
from bench.real_engine import RealEngine, noisy, real_engine
from bench.results import Results, add_output_flag, int_list, jax_device
from bench.shapes import add_shape_flag, model_of, prompt_source
from bench.sim_vs_real import compare, part_of, wall_error
from bench.workloads import Item, PromptSource, Workload, scaled, stretched, synthetic_trace
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.core.cost_model import CostModel, mean_absolute_percentage_error
from jaxserve.core.roofline import DeviceProfile, Roofline, known_device
from jaxserve.engine.build import LoadedModel, model_shape_of
from jaxserve.simulator.calibration import Sample, cluster_like, fit_device, observed_device, samples_of
from jaxserve.simulator.profiles import MeasuredModel, Profile, profile_to_json
from jaxserve.simulator.trace import read_trace

_PARTS = 2
_SPREAD = 1.3  # requests of a cell end one after the other, so that smaller batches are seen as well


def grid(
    rows: Sequence[int], contexts: Sequence[int], steps: int, most_tokens: int, most_length: int
) -> list[tuple[int, int]]:
    """The cells (rows, context) that fit: in the cache together, and in the context length each."""
    longest = round(_SPREAD * steps)
    return [
        (count, context)
        for count in rows
        for context in contexts
        if count * (context + longest) <= most_tokens and context + longest <= most_length
    ]


def cell_workload(prompts: PromptSource, rows: int, context: int, steps: int, seed: int) -> Workload:
    """``rows`` prompts of ``context`` tokens, each with about ``steps`` tokens of output."""
    rng = random.Random(seed)
    items = [
        Item(prompts.exactly(context), rng.randint(max(2, steps * 3 // 4), round(_SPREAD * steps)))
        for _ in range(rows)
    ]
    return Workload(f"{rows}x{context}", items)


def trace_workload(prompts: PromptSource, args: argparse.Namespace, most_length: int) -> Workload:
    """Both parts of the trace, at the rate asked for; requests are cut to what the engine can hold."""
    count = _PARTS * args.requests
    rows = synthetic_trace(count, args.bench_seed) if args.trace is None else read_trace(args.trace, count)
    items: list[Item] = []
    for row in rows:
        output = min(scaled(row.output_tokens, args.output_scale), most_length // 2)
        prompt = min(scaled(row.prompt_tokens, args.prompt_scale), most_length - output)
        items.append(Item(prompts.exactly(prompt), output, row.arrival_s))
    return stretched(Workload("synthetic" if args.trace is None else args.trace.name, items), args.rate)


def measure_grid(
    engine: RealEngine, prompts: PromptSource, args: argparse.Namespace
) -> list[list[dict[str, Any]]]:
    """Recordings of all cells."""
    resolved = engine.resolved
    most_tokens = min(args.most_cell_tokens, resolved.num_cache_tokens - resolved.num_slots)
    rows = [count for count in args.rows if count <= resolved.num_slots]
    cells = grid(rows, args.contexts, args.steps, most_tokens, resolved.max_model_len)
    recordings: list[list[dict[str, Any]]] = []
    for count, context in cells:
        workload = cell_workload(prompts, count, context, args.steps, args.bench_seed)
        recordings.append(engine.serve(workload).records)
    return recordings


def fitted_profile(
    name: str, model: LoadedModel, dtype: str, samples: Sequence[Sample]
) -> tuple[DeviceProfile, Roofline]:
    """The device's profile fitted to the samples, and the roofline that it makes for this model."""
    shape, count = model_shape_of(model, dtype), model.placement.mesh.size
    kind = model.placement.mesh.devices.flat[0].device_kind
    device = known_device(kind)
    if device is None:
        device = observed_device(kind, psutil.virtual_memory().total, shape, count, samples)
    fitted = fit_device(device, shape, count, samples)
    source = f"{device.source}; efficiencies and overhead fitted to {len(samples)} steps of {shape.name}"
    fitted = dataclasses.replace(fitted, name=name, source=f"{source} on {jax_device()}")
    return fitted, Roofline(fitted, shape, count)


def main(argv: list[str] | None = None) -> int:
    """Measures, fits, serves what the fit has not seen, writes the profile."""
    args = _parser().parse_args(argv)
    start = time.perf_counter()
    config = offline_config(engine_options(args), max(args.requests, *args.rows))
    model = model_of(config, args.shape)
    results = Results("calibrate", jax_device(), args.output)
    prompts = prompt_source(model, args.shape, None, args.bench_seed)
    with real_engine(config, model) as engine:
        case, dtype = model.name, engine.resolved.dtype
        results.add(case, "ready_s", time.perf_counter() - start, "s")
        whole = trace_workload(prompts, args, engine.resolved.max_model_len)
        first, second = part_of(whole, 0), part_of(whole, 1)
        start = time.perf_counter()
        recordings = measure_grid(engine, prompts, args)
        recordings.append(engine.serve(first, predictor=noisy(first, args.bench_seed)).records)
        served = engine.serve(second, predictor=noisy(second, args.bench_seed))
        results.add(case, "measuring_s", time.perf_counter() - start, "s")
    samples = [sample for records in recordings for sample in samples_of(records)]
    held_out = samples_of(served.records)
    device, roofline = fitted_profile(args.profile.stem, model, dtype, samples)
    times = CostModel(roofline, forgetting=1.0)
    times.fit(samples)
    like = dataclasses.replace(
        cluster_like(*recordings),
        times=times,
        label=f"simulated (calibrated on {len(samples)} steps): {case} on {device.name}",
    )
    where = {"machine": like.label, "steps": len(samples), "held_out_steps": len(held_out), "dtype": dtype}
    for metric, value, unit in (
        ("memory_efficiency", device.memory_efficiency, "share"),
        ("flops_efficiency", device.flops_efficiency, "share"),
        ("step_overhead_ms", 1e3 * device.step_overhead_s, "ms"),
    ):
        results.add(case, metric, value, unit, **where)
    alone = CostModel(roofline)
    results.add(case, "roofline_mape", mean_absolute_percentage_error(alone, held_out), "share", **where)
    results.add(case, "roofline_wall_error", wall_error(alone, held_out), "share", **where)
    compare(results, case, served, like, samples)
    evidence = {record["metric"]: record["value"] for record in results.records}
    evidence |= {"device": jax_device(), "steps": len(samples), "trace": whole.name}
    measured = MeasuredModel(
        model=roofline.model, num_devices=roofline.num_devices, costs=times.to_json(), evidence=evidence
    )
    text = json.dumps(profile_to_json(Profile(device, [measured])), indent=1)
    args.profile.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.profile}", file=sys.stderr)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="calibrate", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, metavar="NAME.json", help="written at the end")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="default: drawn lengths and arrivals")
    parser.add_argument("--requests", type=int, default=240, help="of each part of it (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="divides prompt lengths")
    parser.add_argument("--output-scale", type=float, default=1.0, help="divides output lengths")
    parser.add_argument("--rows", type=int_list, default=(1, 8, 32, 64, 128, 256), help="of the grid")
    parser.add_argument("--contexts", type=int_list, default=(128, 1024, 4096), help="of the grid, in tokens")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a cell (default: %(default)s)")
    parser.add_argument("--most-cell-tokens", type=int, default=140_000, help="larger cells are left out")
    parser.add_argument("--bench-seed", type=int, default=0)
    add_shape_flag(parser)
    add_output_flag(parser)
    add_engine_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
