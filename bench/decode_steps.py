"""Milliseconds of a steady decode step, by batch size, through the engine.

    python bench/decode_steps.py --shape llama-3.1-8b --batches 1,8,32,64,128,256

A batch of equal prompts is served at once. ``ms_per_step`` (cases ``SHAPE-bN``) is the median over the decode
steps in which all of them ran, by the engine's own clock from one step's result to the next: it is what a
reader of a stream sees, host work included. With ``--max-decode-steps K`` (cases ``SHAPE-bN-kK``) K tokens of
a row come with one result, and each step is charged with its share of the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from bench.real_engine import RealEngine
from bench.results import Results, int_list
from bench.workloads import Item, PromptSource, Workload
from jaxserve.simulator.calibration import samples_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this part."""
    parser.add_argument("--batches", type=int_list, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--context", type=int, default=512, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="new tokens of each (default: %(default)s)")


def measure(
    engine: RealEngine, prompts: PromptSource, args: argparse.Namespace, results: Results, name: str
) -> None:
    """Serves one batch of each size."""
    for batch in args.batches:
        if batch > engine.resolved.num_slots:
            continue
        items = [Item(prompts.exactly(args.context), args.steps) for _ in range(batch)]
        served = engine.serve(Workload(f"b{batch}", items))
        steps = [
            (bucket.decode_steps, seconds)
            for bucket, features, seconds in samples_of(served.records)
            if bucket.is_decode and features.sequences == batch
        ]
        num_steps, loop = sum(count for count, _ in steps), engine.resolved.ladder.decode_steps
        if num_steps < args.steps // 4:
            raise RuntimeError(
                f"batch {batch}: only {num_steps} steps had all of it; more --steps are needed"
            )
        seconds = statistics.median([each for count, each in steps for _ in range(count)])
        results.add(
            f"{name}-b{batch}" + (f"-k{loop}" if loop > 1 else ""), "ms_per_step", 1e3 * seconds, "ms",
            steps=num_steps, context=args.context, new_tokens=args.steps,
        )  # fmt: skip


if __name__ == "__main__":
    from bench.speed import run

    sys.exit(run("decode_steps", __doc__ or "", ("decode_steps",), None))
