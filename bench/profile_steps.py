"""Where the device's time goes in steady decode steps, by JAX's own profiler.

    python bench/profile_steps.py --shape llama-3.1-8b --profile-batches 1,64

A batch of equal prompts is served under the profiler; the last part of it, decode steps alone, is looked at.
``gap_share`` (cases ``SHAPE-bN``) is the share of that time in which no kernel ran on the device,
``ms_per_step`` the time of a step, and ``kernel_ms`` (cases ``SHAPE-bN-KERNEL``) the time in a step of one
kernel by its name without numbers, for those that take the most. Cases ``SHAPE-pN`` are a lone prompt's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench.real_engine import RealEngine
from bench.results import Results, int_list
from bench.workloads import Item, PromptSource, Workload
from jaxserve.simulator.calibration import samples_of

_CONTEXT = 512
_TAIL = 0.35
"""The share of a batch's profile, at its end, that is looked at: prompts are long done."""


class Kernel(NamedTuple):
    """One launch on the device; times in microseconds."""

    name: str
    start: float
    end: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this part."""
    parser.add_argument("--profile-batches", type=int_list, default=(1, 64))
    parser.add_argument("--profile-prompts", type=int_list, default=(), help="tokens of lone prompts")
    parser.add_argument("--profile-steps", type=int, default=192)
    parser.add_argument("--top", type=int, default=14, help="kernels to name (default: %(default)s)")


def measure(
    engine: RealEngine, prompts: PromptSource, args: argparse.Namespace, results: Results, name: str
) -> None:
    """Profiles one batch of each size, and lone prompts of each length."""
    for batch in args.profile_batches:
        items = [Item(prompts.exactly(_CONTEXT), args.profile_steps) for _ in range(batch)]
        records, kernels = _profiled(engine, Workload(f"profile-b{batch}", items))
        step_s = statistics.median(
            seconds
            for bucket, features, seconds in samples_of(records)
            if bucket.is_decode and features.sequences == batch
        )
        tail = tail_of(kernels)
        _report(results, f"{name}-b{batch}", tail, round(_span(tail) / 1e6 / step_s), args.top)
    for length in args.profile_prompts:
        _, kernels = _profiled(engine, Workload(f"profile-p{length}", [Item(prompts.exactly(length), 1)]))
        _report(results, f"{name}-p{length}", kernels, 1, args.top)


def _profiled(engine: RealEngine, workload: Workload) -> tuple[list[dict[str, Any]], list[Kernel]]:
    """What an engine recorded, and the kernels that ran."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            records = engine.serve(workload).records
        kernels = read_kernels(Path(folder))
    if not kernels:
        raise RuntimeError("the profiler saw no kernel on a device: is this a GPU with CUPTI?")
    return records, kernels


def _report(results: Results, case: str, kernels: list[Kernel], steps: int, top: int) -> None:
    """One line for the whole, and one for each of the ``top`` kernels; times are of one of ``steps``."""
    span = _span(kernels)
    results.add(
        case, "gap_share", 1 - busy_time(kernels) / span, "share", steps=steps, longest=longest_gaps(kernels)
    )
    results.add(case, "ms_per_step", span / steps / 1e3, "ms", launches=len(kernels) / steps)
    families: dict[str, list[float]] = {}
    for kernel in kernels:
        families.setdefault(re.sub(r"[_.]?\d+", "", kernel.name)[:60], []).append(kernel.end - kernel.start)
    for family, times in sorted(families.items(), key=lambda item: -sum(item[1]))[:top]:
        results.add(
            f"{case}-{family}", "kernel_ms", sum(times) / steps / 1e3, "ms", launches=len(times) / steps
        )


def _span(kernels: list[Kernel]) -> float:
    return max(kernel.end for kernel in kernels) - kernels[0].start


def read_kernels(folder: Path) -> list[Kernel]:
    """Kernels of the first device in a profile's folder, by start."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    devices = sorted(
        pid for (kind, pid, _), name in names.items() if kind == "process_name" and "/device:" in name
    )
    streams = {
        tid
        for (kind, pid, tid), name in names.items()
        if kind == "thread_name" and pid in devices[:1] and name.startswith("Stream")
    }
    kernels = [
        Kernel(
            event["name"],
            event["ts"],
            event["ts"] + event["dur"],
        )
        for event in events
        if event.get("ph") == "X" and event["pid"] in devices[:1] and event["tid"] in streams
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def tail_of(kernels: list[Kernel]) -> list[Kernel]:
    """Those of the last `_TAIL` of the time."""
    if not kernels:
        return []
    start, end = kernels[0].start, max(kernel.end for kernel in kernels)
    return [kernel for kernel in kernels if kernel.start >= end - _TAIL * (end - start)]


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them runs; they come by start."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
    return total


def longest_gaps(kernels: list[Kernel], count: int = 5) -> list[tuple[float, str, str]]:
    """The longest times without a kernel: milliseconds, and the kernels before and after."""
    gaps: list[tuple[float, str, str]] = []
    last = kernels[0]
    for kernel in kernels[1:]:
        if kernel.start > last.end:
            gaps.append((round((kernel.start - last.end) / 1e3, 3), last.name[:40], kernel.name[:40]))
        last = max(last, kernel, key=lambda each: each.end)
    return sorted(gaps, reverse=True)[:count]


if __name__ == "__main__":
    from bench.speed import run

    sys.exit(run("profile_steps", __doc__ or "", ("profile",), None))
