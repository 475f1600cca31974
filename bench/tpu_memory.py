"""What whole steps of a model need in a TPU's memory, with the pages that the engine would choose: not run.

    python bench/tpu_memory.py --topology v6e:2x2 --output bench/results/tpu_memory.jsonl

Compiles the decode step of 64 rows, the loop of such steps if ``--max-decode-steps`` asks for one, and the
largest mixed step, with every layer and the whole vocabulary, which takes minutes; CI compiles some of them
with two layers. ``--every`` goes over one, four and eight devices of each generation. Exit status 1 says that
a step copies a cache, loses a donated array, talks to the host, or does not fit: stderr says which.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any, get_args

from bench.results import Results, add_output_flag
from jaxserve.config import EngineConfig, KVCacheDType, compile_without_devices

if __name__ == "__main__":
    compile_without_devices()  # before JAX is imported; whoever imports this module has devices of its own

import jax

from bench.shapes import MODELS
from jaxserve.core.plan import Bucket
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import Tpu, chip_of, topology_devices
from jaxserve.runner.ahead_of_time import (
    StepReport,
    compile_steps,
    plan_engine,
    report_step,
    timed,
)

_GIB = 2**30


# Topology and devices that one engine takes of it: one, four and eight of each generation, where 8B fits.
EVERY = (
    ("v5e:2x2", 4),
    ("v5e:2x4", 8),
    ("v5p:2x2x1", 1),
    ("v5p:2x2x1", 4),
    ("v5p:2x2x2", 8),
    ("v6e:2x2", 1),
    ("v6e:2x2", 4),
    ("v6e:2x4", 8),
    ("tpu7x:2x2x1", 1),
    ("tpu7x:2x2x1", 4),
    ("tpu7x:2x2x1", 8),
)


def faults(report: StepReport, limit: int) -> list[str]:
    """What is wrong with a step on a device with ``limit`` bytes of memory, in words."""
    needed = report.argument_bytes + report.temporary_bytes
    found = {
        f"{report.cache_copies} copies of a cache": report.cache_copies > 0,
        f"{report.lost_donations} donated arrays not written over": report.lost_donations > 0,
        f"{report.host_transfers} host transfers": report.host_transfers > 0,
        f"needs {needed / _GIB:.2f} GiB of {limit / _GIB:.2f}": needed > limit,
    }
    return [fault for fault, is_there in found.items() if is_there]


def measure(hf: dict[str, Any], topology: str, options: dict[str, Any], results: Results) -> list[str]:
    """Compiles steps of an engine and records what they need; what is wrong with them, each with its case."""
    config = EngineConfig.from_flat(options)
    devices = topology_devices(topology)
    planned, resolved = plan_engine(config, find_family(hf).config_from_hf(hf), devices, Tpu)
    limit = chip_of(devices[0]).hbm_bytes
    wrong: list[str] = []
    ladder = resolved.ladder
    loops = [Bucket(64, 64, ladder.decode_steps)] if ladder.decode_steps > 1 else []
    for bucket in (Bucket(64, 64), *loops, Bucket(ladder.token_budget, ladder.mixed_rows)):
        compile_one = functools.partial(compile_steps, config, planned, resolved, [bucket])
        case = f"{'decode' if bucket.is_decode else 'mixed'}_{bucket.tokens}"
        if bucket.decode_steps > 1:
            case += f"_k{bucket.decode_steps}"
        try:
            programs, seconds = timed(compile_one)
        except jax.errors.JaxRuntimeError as error:  # the compiler refuses what cannot fit at all
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            wrong.append(f"{case}: {str(error).splitlines()[0]}")
            continue
        report = report_step(bucket, programs.step(bucket), planned, resolved, seconds)
        more = {
            "layers": hf["num_hidden_layers"],
            "vocab": hf["vocab_size"],
            "num_pages": resolved.num_pages,
            "kv_dtype": str(resolved.layout.dtype),
            "limit_gib": round(limit / _GIB, 2),
            "kernels": report.custom_calls["tpu_custom_call"],
        }
        results.add(case, "arguments", report.argument_bytes / _GIB, "GiB", **more)
        results.add(case, "temporaries", report.temporary_bytes / _GIB, "GiB", **more)
        results.add(case, "written_in_place", report.aliased_bytes / _GIB, "GiB", **more)
        results.add(case, "cache_copies", report.cache_copies, "instructions", **more)
        results.add(case, "lost_donations", report.lost_donations, "arrays", **more)
        results.add(case, "host_transfers", report.host_transfers, "instructions", **more)
        results.add(case, "compile_s", seconds, "s", **more)
        wrong += [f"{case}: {fault}" for fault in faults(report, limit)]
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Prints steps' memory for each target; 1 if anything is wrong with one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3.1-8b")
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--every", action="store_true", help="every generation in place of one topology")
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDType), default="auto")
    parser.add_argument("--max-decode-steps", type=int, default=1)
    parser.add_argument("--layers", type=int, help="default: the model's; two compile in a tenth of the time")
    parser.add_argument("--vocab", type=int, help="default: the model's")
    add_output_flag(parser)
    args = parser.parse_args(argv)
    hf: Any = MODELS[args.model]
    hf = hf | {
        "num_hidden_layers": args.layers or hf["num_hidden_layers"],
        "vocab_size": args.vocab or hf["vocab_size"],
    }
    wrong: list[str] = []
    for topology, num_devices in EVERY if args.every else ((args.topology, args.tensor_parallel_size),):
        device = f"compiled, not run: {num_devices} of {topology}"
        results = Results("tpu_memory", f"{device}, {args.model}", args.output)
        options = {
            "tensor_parallel_size": num_devices,
            "max_model_len": args.max_model_len,
            "kv_cache_dtype": args.kv_cache_dtype,
            "max_decode_steps": args.max_decode_steps,
        }
        wrong += [f"{device}: {fault}" for fault in measure(hf, topology, options, results)]
    for fault in wrong:
        print(f"tpu_memory: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
