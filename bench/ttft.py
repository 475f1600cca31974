"""Milliseconds to the first token of a lone request, by prompt length, through the engine.

    python bench/ttft.py --shape llama-3.1-8b --prompts 2048,8192

``ttft_ms`` (cases ``SHAPE-pN``) is the median over requests that come one after the other to an idle engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from bench.real_engine import RealEngine
from bench.results import Results, int_list
from bench.workloads import Item, PromptSource, Workload


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this part."""
    parser.add_argument("--prompts", type=int_list, default=(2048, 8192), help="tokens")
    parser.add_argument("--ttft-repeats", type=int, default=5)


def measure(
    engine: RealEngine, prompts: PromptSource, args: argparse.Namespace, results: Results, name: str
) -> None:
    """Serves lone prompts of each length."""
    for length in args.prompts:
        if length + 2 > engine.resolved.max_model_len:
            continue
        times = [
            engine.serve(Workload(f"p{length}", [Item(prompts.exactly(length), 2)]), recorded=False)
            .times[0]
            .ttft
            for _ in range(args.ttft_repeats)
        ]
        results.add(
            f"{name}-p{length}", "ttft_ms", 1e3 * statistics.median(times), "ms", repeats=args.ttft_repeats
        )


if __name__ == "__main__":
    from bench.speed import run

    sys.exit(run("ttft", __doc__ or "", ("ttft",), None))
