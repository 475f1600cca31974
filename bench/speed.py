"""Several of the speed benches with one engine, so that it is loaded and compiled once.

    python bench/speed.py --shape llama-3.1-8b --parts decode_steps,ttft,offline --output speed.jsonl

Each part is a bench of its own (`offline.py`, `decode_steps.py`, `ttft.py`, `profile_steps.py`)
with its flags. All run through
the engine's own scheduler and loop; nothing compiles in a timed window, or the run fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from bench import decode_steps, offline, profile_steps, ttft
from bench.batching_runs import offline_config
from bench.real_engine import RealEngine, real_engine
from bench.results import Results, add_output_flag, jax_device
from bench.shapes import add_shape_flag, model_of, prompt_source
from bench.workloads import PromptSource
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options


class Part(NamedTuple):
    """A bench: its flags, and what it does with an engine."""

    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[RealEngine, PromptSource, argparse.Namespace, Results, str], None]


PARTS = {
    "decode_steps": Part(decode_steps.add_flags, decode_steps.measure),
    "ttft": Part(ttft.add_flags, ttft.measure),
    "offline": Part(offline.add_flags, offline.measure),
    "profile": Part(profile_steps.add_flags, profile_steps.measure),
}


def run(name: str, description: str, parts: tuple[str, ...] | None, argv: list[str] | None) -> int:
    """Parses flags, makes an engine, runs the parts; all that ``--parts`` names if ``parts`` is None."""
    parser = CommandParser(prog=name, description=description)
    for part in parts or PARTS:
        PARTS[part].add_flags(parser)
    if parts is None:
        parser.add_argument(
            "--parts",
            type=_part_list,
            default=("decode_steps", "ttft", "offline"),
            help="default: all but profile",
        )
    parser.add_argument("--bench-seed", type=int, default=0)
    add_output_flag(parser)
    add_shape_flag(parser)
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    config = offline_config(engine_options(args), 100_000)
    model = model_of(config, args.shape)
    prompts = prompt_source(model, args.shape, None, args.bench_seed)
    results = Results(name, jax_device(), args.output)
    with real_engine(config, model) as engine:
        results.add(model.name, "ready_s", time.perf_counter() - start, "s")
        for part in parts or args.parts:
            PARTS[part].measure(engine, prompts, args, results, model.name)
    return 0


def _part_list(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(run("speed", __doc__ or "", None, None))
