"""Attention kernels on a GPU against the ceilings of the same run: memory reads, products, cuDNN.

    python bench/kernels.py --trace azure2023_conv.csv.gz --output bench/results/kernels.jsonl

Each case is one layer's attention of a step at Llama-3.1-8B's heads (32 query, 8 key/value, 128 wide) in
bfloat16, pages shuffled, keys and values of the step written by the same call. ``us`` is the time of all its
kernels on the device by the profiler's clock, the median of its calls, gaps between launches left out;
``call_us`` is wall time a call in a chain of calls, gaps, launches and an addition included.

Shares are of what this device reached in the same run: ``read_bandwidth`` (a sum over 2 GiB) and, for
prefill, cuDNN's causal attention over contiguous keys and values.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.results import Results, add_output_flag, jax_device
from bench.workloads import read_trace
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_CALLS = 8  # in one program
_RUNS = 3
_KERNEL_PREFIX = "ragged_paged_"


class Case(NamedTuple):
    """A step: per row, tokens in it and context length afterwards."""

    name: str
    rows: list[tuple[int, int]]


def make_cases(trace: Path | None) -> list[Case]:
    """The standard cases; the one of drawn lengths only where there is a trace."""
    decode = [(64, 1024), (128, 2048), (1, 8192)]
    cases = [Case(f"decode-b{batch}-ctx{length}", [(1, length)] * batch) for batch, length in decode]
    if trace is not None:
        cases.append(Case("decode-b32-azure", [(1, length) for length in context_lengths(trace, 32)]))
    lengths = np.random.default_rng(0).integers(2048, 8192, 64).tolist()
    return [
        *cases,
        Case("prefill-8192", [(8192, 8192)]),
        Case("prefill-2048-at-8192", [(2048, 8192)]),
        *(
            Case(
                f"mixed-{chunk}-at-{context}-{len(few)}-decodes",
                [*((1, length) for length in few), (chunk, context)],
            )
            for chunk, context, few in (
                (1024, 8192, lengths),
                (2048, 4096, lengths),
                (512, 2048, [750] * 64),
                (256, 256, lengths[:16]),
                (8192, 8192, lengths[:4]),
            )
        ),
    ]


def context_lengths(trace: Path, count: int) -> list[int]:
    """Contexts of random requests of a trace, each in the middle of its decode."""
    rows = read_trace(trace)
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return [rows[i].prompt_tokens + rows[i].output_tokens // 2 for i in chosen]


class Measured(NamedTuple):
    """Microseconds a call: all kernels, those of a kind, and wall time."""

    us: float
    kinds: dict[str, float]
    call_us: float


def measure(case: Case, page_size: int) -> Measured:
    """Runs a step's attention in a chain, over enough different pages to miss the cache."""
    counts, lengths = zip(*case.rows, strict=True)
    pages = [-(-length // page_size) for length in lengths]
    # Contexts smaller than the device's cache take turns with others.
    sets = max(1, min(_CALLS, -(-(2**28) // (sum(lengths) * 2 * KV_HEADS * HEAD_DIM * 2))))
    ids = np.random.default_rng(0).permutation(np.arange(1, sum(pages) * sets + 1)).astype(np.int32)
    tables = np.zeros((sets, len(pages), max(pages)), np.int32)
    for table in tables:
        for row, count in zip(table, pages, strict=True):
            row[:count], ids = ids[:count], ids[count:]
    metadata = [
        AttentionMetadata(
            jnp.asarray(table),
            jnp.asarray(lengths, jnp.int32),
            jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            max(counts),
        )
        for table in tables
    ]
    tokens = sum(counts)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (tokens, Q_HEADS, HEAD_DIM), jnp.bfloat16)
    k, v = (jax.random.normal(key, (tokens, KV_HEADS, HEAD_DIM), jnp.bfloat16) for key in keys[1:3])
    shape = (sum(pages) * sets + 1, page_size, 2 * KV_HEADS, HEAD_DIM)
    cache = jax.jit(lambda: jax.random.normal(keys[3], shape, jnp.bfloat16))()

    @functools.partial(jax.jit, donate_argnums=1)
    def chain(q: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        for call in range(_CALLS):
            step = metadata[call % sets]
            out, cache = ragged_paged_attention(
                q, k, v, cache, step, scale=HEAD_DIM**-0.5, implementation="mosaic_gpu"
            )
            q = q + out * jnp.bfloat16(1e-3)
        return q, cache

    seconds: list[float] = []
    for _ in range(2 + _RUNS):
        start = time.perf_counter()
        out, cache = chain(q, cache)
        out.block_until_ready()
        seconds.append(time.perf_counter() - start)

    def run() -> None:
        nonlocal cache
        for _ in range(_RUNS):
            out, cache = chain(q, cache)
            out.block_until_ready()

    kinds = {
        name.removeprefix(_KERNEL_PREFIX).partition("_")[0]: statistics.median(durations)
        for name, durations in kernel_times(run).items()
        if name.startswith(_KERNEL_PREFIX)
    }
    return Measured(sum(kinds.values()), kinds, min(seconds[2:]) / _CALLS * 1e6)


def kernel_times(run: Callable[[], None]) -> dict[str, list[float]]:
    """Microseconds of every kernel that a function launches, by name, from the profiler's trace."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and "Stream" in event["args"]["name"]
    }
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            times.setdefault(event["name"], []).append(event["dur"])
    return times


def best_seconds(run: Callable[[], jax.Array]) -> float:
    """Of five runs after one that compiles."""
    run().block_until_ready()
    seconds: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_bandwidth() -> float:
    """Bytes per second of sums over 2 GiB."""
    times, x = 10, jnp.ones(2**30, jnp.bfloat16)
    total = jax.jit(
        lambda x: lax.fori_loop(
            0, times, lambda _, s: s + jnp.sum(x * (s * 0 + 1).astype(x.dtype), dtype=jnp.float32), 0.0
        )
    )
    return times * x.nbytes / best_seconds(lambda: total(x))


def product_rate() -> float:
    """Floating-point operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    times, n = 10, 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / 64
    chain = jax.jit(lambda x: lax.fori_loop(0, times, lambda _, y: x @ y, x))
    return times * 2 * n**3 / best_seconds(lambda: chain(x))


def cudnn_prefill_rate(tokens: int) -> float:
    """The same of cuDNN's causal attention over contiguous arrays."""
    times = 10
    shape = (1, tokens, Q_HEADS, HEAD_DIM)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    k, v = k[:, :, :KV_HEADS], v[:, :, :KV_HEADS]
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    chain = jax.jit(lambda q: lax.fori_loop(0, times, lambda _, q: attend(q, k, v), q))
    return times * attention_flops([(tokens, tokens)]) / best_seconds(lambda: chain(q))


def attention_flops(rows: list[tuple[int, int]]) -> int:
    """Operations of both products, what causality hides left out."""
    seen = sum(count * length - count * (count - 1) // 2 for count, length in rows)
    return 4 * HEAD_DIM * Q_HEADS * seen


def report(
    results: Results, case: Case, measured: Measured, *, page_size: int, bandwidth: float, cudnn: float
) -> None:
    """Emits a case's records; of a mixed one also how much longer its two halves take one after the other."""
    decodes = [row for row in case.rows if row[0] == 1]
    chunks = [row for row in case.rows if row[0] > 1]
    results.add(case.name, "us", measured.us, "us")
    results.add(case.name, "call_us", measured.call_us, "us")
    for kind, us in measured.kinds.items():
        results.add(case.name, f"{kind}_us", us, "us")
    if chunks and decodes:
        halves = [measure(Case(case.name, rows), page_size) for rows in (decodes, chunks)]
        serial_us = sum(half.us for half in halves)
        results.add(case.name, "serial_us", serial_us, "us")
        results.add(case.name, "speedup_over_serial", serial_us / measured.us, "1")
    elif decodes:
        read = sum(length for _, length in decodes) * 2 * KV_HEADS * HEAD_DIM * 2
        results.add(case.name, "bandwidth_share", read / (measured.us * 1e-6) / bandwidth, "1")
        results.add(case.name, "kernel_share", read / (measured.kinds["decode"] * 1e-6) / bandwidth, "1")
    else:
        rate = attention_flops(chunks) / (measured.kinds["prefill"] * 1e-6)
        results.add(case.name, "tflops", rate / 1e12, "TFLOP/s")
        results.add(case.name, "cudnn_share", rate / cudnn, "1")


def main(argv: list[str] | None = None) -> int:
    """Measures the ceilings, then every case."""
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--trace", type=Path, help="a request trace (csv.gz) to draw contexts from")
    parser.add_argument("--case", action="append", help="only these (repeatable)")
    add_output_flag(parser)
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"runs on a GPU; JAX found {jax.default_backend()}")
    results = Results("kernels", jax_device(), args.output)
    bandwidth, cudnn = read_bandwidth(), cudnn_prefill_rate(8192)
    results.add("ceiling", "read_bandwidth", bandwidth / 1e9, "GB/s")
    results.add("ceiling", "product_rate", product_rate() / 1e12, "TFLOP/s")
    results.add("ceiling", "cudnn_prefill_8192", cudnn / 1e12, "TFLOP/s")
    for case in make_cases(args.trace):
        if args.case is None or case.name in args.case:
            measured = measure(case, args.page_size)
            report(results, case, measured, page_size=args.page_size, bandwidth=bandwidth, cudnn=cudnn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
