"""The part ``tiers`` of bench/prefix.py: a host tier, keeping and preloading, on traces in the simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from bench.results import Results
from jaxserve.config import SchedulerConfig
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import TraceRequest

_GIB = 1 << 30
_TIMES = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "output_tok_s")
_BYTES = (
    "host_saved_bytes",
    "host_loaded_bytes",
    "host_wasted_bytes",
    "preloaded_bytes",
    "preload_useful_bytes",
    "preload_wasted_bytes",
)


class TierCase(NamedTuple):
    """One machine: whether it has host memory, and whether it keeps and preloads."""

    name: str
    has_host: bool
    preloads: bool


CASES = (
    TierCase("one-tier", has_host=False, preloads=False),
    TierCase("one-tier-keeping", has_host=False, preloads=True),
    TierCase("two-tiers", has_host=True, preloads=False),
    TierCase("two-tiers-preloading", has_host=True, preloads=True),
)


def some_conversations(trace: Sequence[TraceRequest], share: int, longest: int) -> list[TraceRequest]:
    """Every ``share``-th conversation of a trace, with its own pauses; requests that do not fit are left out.

    A request goes on with the conversation that has its deepest known block; the first block alone, which may
    be everybody's system prompt, makes none.
    """
    owners: dict[int, int] = {}
    chosen: list[TraceRequest] = []
    num_conversations = 0
    for row in trace:
        known = [block for block in row.block_hashes[:0:-1] if block in owners]
        number = owners[known[0]] if known else num_conversations
        num_conversations += not known
        for block in row.block_hashes[1:]:
            owners.setdefault(block, number)
        if number % share == 0 and row.prompt_tokens + row.output_tokens < longest:
            chosen.append(row._replace(arrival_s=row.arrival_s - trace[0].arrival_s))
    return chosen


def measure_tiers(
    results: Results,
    name: str,
    trace: Sequence[TraceRequest],
    *,
    page_size: int,
    host_gib: float,
    share: int,
) -> None:
    """Every case with the same requests, on the simulator's H100 with Llama-3-8B.

    Args:
        page_size: tokens of a KV page.
        host_gib: host memory for KV pages.
        share: of the trace's conversations these are one in so many.
    """
    machine = ClusterConfig(page_size=page_size)
    where = {"requests": len(trace), "page_size": page_size, "share": share, "host_gib": host_gib}
    for case in CASES:
        mine = dataclasses.replace(
            machine,
            host_kv_bytes=int(host_gib * _GIB) if case.has_host else 0,
            enable_prefix_preloading=case.preloads,
        )
        run = _simulated(list(trace), mine)
        label, counters = f"{name}-{case.name}", run.counters
        lookups = counters["prefix_lookup_tokens"][0]
        results.add(label, "hit_share", counters["prefix_hit_tokens"][0] / lookups, "share", **where)
        host_share = counters["prefix_host_hit_tokens"][0] / lookups
        results.add(label, "host_hit_share", host_share, "share", **where)
        for metric in _TIMES + (_BYTES if case.has_host else ()):
            value, unit = run.metrics()[metric]
            results.add(label, metric, value, unit, **where)


def _simulated(trace: list[TraceRequest], machine: ClusterConfig) -> SimulationResult:
    cluster = make_cluster(machine, SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=8192))
    return simulate(trace, cluster, SimulationOptions(forces_lengths=True))
