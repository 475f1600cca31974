"""What whole steps of a model need in a TPU's memory, with the pages that the engine would choose: not run.

    python bench/tpu_memory.py --topology v6e:2x2 --output bench/results/tpu_memory.jsonl

Compiles the decode step of 64 rows, the loop of such steps if ``--max-decode-steps`` asks for one, and the
largest mixed step, with every layer and the whole vocabulary, which takes minutes; CI compiles some of them
with two layers. ``--every`` goes over one, four and eight devices of each generation.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, get_args

from bench.results import Results, add_output_flag
from bench.shapes import MODELS
from jaxserve.config import EngineConfig, KVCacheDType, compile_without_devices

compile_without_devices()

from jaxserve.core.plan import Bucket  # noqa: E402
from jaxserve.models.registry import find_family  # noqa: E402
from jaxserve.platforms.tpu import Tpu, chip_of, topology_devices  # noqa: E402
from jaxserve.runner.ahead_of_time import (  # noqa: E402
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


def measure(hf: dict[str, Any], topology: str, options: dict[str, Any], results: Results) -> bool:
    """Compiles two steps of an engine and records what they need; whether both fit."""
    config = EngineConfig.from_flat(options)
    devices = topology_devices(topology)
    planned, resolved = plan_engine(config, find_family(hf).config_from_hf(hf), devices, Tpu)
    limit = chip_of(devices[0]).hbm_bytes
    fits = True
    ladder = resolved.ladder
    loops = [Bucket(64, 64, ladder.decode_steps)] if ladder.decode_steps > 1 else []
    for bucket in (Bucket(64, 64), *loops, Bucket(ladder.token_budget, ladder.mixed_rows)):
        compile_one = functools.partial(compile_steps, config, planned, resolved, [bucket])
        programs, seconds = timed(compile_one)
        report = report_step(bucket, programs.step(bucket), planned, resolved, seconds)
        case = f"{'decode' if bucket.is_decode else 'mixed'}_{bucket.tokens}"
        if bucket.decode_steps > 1:
            case += f"_k{bucket.decode_steps}"
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
        results.add(case, "host_transfers", report.host_transfers, "instructions", **more)
        results.add(case, "compile_s", seconds, "s", **more)
        fits &= report.argument_bytes + report.temporary_bytes <= limit
    return fits


def main(argv: list[str] | None = None) -> int:
    """Prints two steps' memory for each target; 1 if one does not fit."""
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
    fits = True
    for topology, num_devices in EVERY if args.every else ((args.topology, args.tensor_parallel_size),):
        device = f"compiled, not run: {num_devices} of {topology}"
        results = Results("tpu_memory", f"{device}, {args.model}", args.output)
        options = {
            "tensor_parallel_size": num_devices,
            "max_model_len": args.max_model_len,
            "kv_cache_dtype": args.kv_cache_dtype,
            "max_decode_steps": args.max_decode_steps,
        }
        fits &= measure(hf, topology, options, results)
    return 0 if fits else 1


if __name__ == "__main__":
    main()
