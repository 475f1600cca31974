"""Output tokens per second of many requests that are there at once, through the engine.

    python bench/offline.py --shape llama-3.1-8b --requests 1000 --prompt-tokens 512 --output-tokens 128
    python bench/offline.py --shape llama-3.1-8b --requests 1000 --trace azure2023_conv.csv.gz

Cases ``SHAPE-512-128`` and ``SHAPE-TRACE``; ``output_tok_s`` counts from the first arrival to the last token.
With ``--sampled``, the equal requests are served once more with temperature 0.8, top-p 0.95 and a seed each
(``SHAPE-512-128-sampled``), and ``of_greedy`` is the ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bench.measures import throughput
from bench.real_engine import RealEngine
from bench.results import Results
from bench.workloads import Item, PromptSource, Workload
from jaxserve.simulator.trace import read_trace


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this part."""
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--trace", type=Path, help="a request trace (csv.gz), measured as well")
    parser.add_argument("--sampled", action="store_true", help="measure drawing as well")


def measure(
    engine: RealEngine, prompts: PromptSource, args: argparse.Namespace, results: Results, name: str
) -> None:
    """Serves equal requests, then the trace's."""
    name_of_equal = f"{args.prompt_tokens}-{args.output_tokens}"
    equal = [Item(prompts.exactly(args.prompt_tokens), args.output_tokens) for _ in range(args.requests)]
    greedy = _rate(engine, Workload(name_of_equal, equal), results, name)
    if args.sampled:
        drawn = [dataclasses.replace(item, temperature=0.8, top_p=0.95) for item in equal]
        rate = _rate(engine, Workload(f"{name_of_equal}-sampled", drawn), results, name)
        results.add(f"{name}-{name_of_equal}-sampled", "of_greedy", rate / greedy, "x")
    if args.trace is not None:
        rows = read_trace(args.trace, args.requests)
        items = [Item(prompts.exactly(row.prompt_tokens), row.output_tokens) for row in rows]
        _rate(engine, Workload(args.trace.name.partition(".")[0], items), results, name)


def _rate(engine: RealEngine, workload: Workload, results: Results, name: str) -> float:
    rate = throughput(engine.serve(workload, recorded=False).times)
    results.add(
        f"{name}-{workload.name}", "output_tok_s", rate, "tokens/s",
        requests=len(workload.items), output_tokens=workload.output_tokens,
    )  # fmt: skip
    return rate


if __name__ == "__main__":
    from bench.speed import run

    sys.exit(run("offline", __doc__ or "", ("offline",), None))
