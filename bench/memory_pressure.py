"""KV memory that is too small: greedy admission against predicted demand, swap against computing again.

    python bench/memory_pressure.py --output results.jsonl

The engine's own scheduler and step loop on a virtual clock; each record says which profile the device is. The
Azure conversation trace, outputs times ``--output-factor``, on as many KV pages as all slots would need on
average, divided by ``--oversubscribed``. Cases are *capacity*-*predictor*, with ``+host`` where preempted
requests may go to host memory. ``greedy`` is capacity ``watermark`` with the latest as victim and computing
again; ``predicted`` takes victim ``value``.

With everything there at once (``load`` is ``saturated``):

- ``preempted_share``: requests that were preempted at least once; ``preemptions`` counts every time;
- ``recomputed_tokens``: computed, lost to a preemption, and not found in the prefix cache or loaded again;
- ``pool_occupancy``: share of the pages that running requests own, and ``slot_efficiency``: share of their
  places that hold a computed token, both averaged over the time in which requests wait;
- ``paged_occupancy``: the same while a slot is free: requests wait for pages, not for slots;
- ``request_rate``: requests per second;
- ``tpot_goodput``: of those, the ones with TPOT within ``--tpot-slo``, whenever they began.

At rates (``load`` is a share of greedy's request rate), ``slo_share``: requests with TTFT and TPOT within
``--ttft-slo`` and ``--tpot-slo``, and ``goodput``: the highest of the rates with 90 % of them, interpolated.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.results import Results, add_output_flag, float_list, host_device
from bench.workloads import find_traces, synthetic_trace
from jaxserve.config import SchedulerConfig
from jaxserve.core.assembly import assemble
from jaxserve.core.cost_model import CostModel
from jaxserve.core.known_lengths import make_known_length_predictor
from jaxserve.core.plan import StepPlan
from jaxserve.core.swap import SwapStats
from jaxserve.core.updates import SchedulerStats
from jaxserve.engine.engine_core import EngineCore
from jaxserve.errors import ConfigError
from jaxserve.request import Request
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.executor import CostExecutor
from jaxserve.simulator.instance import IDLE_POLL_S, make_request, without_arrays
from jaxserve.simulator.measures import RequestTimes, percentile
from jaxserve.simulator.trace import TraceRequest, at_once, at_rate, read_trace

TRACE = "azure2023_conv"
_GOOD = 0.9
_PAGE = 16
_MOST_OUTPUT = 8192
_SEED = 1


class Case(NamedTuple):
    """One way to deal with too little memory."""

    name: str
    scheduler: SchedulerConfig
    predictor: str
    host_kv_bytes: int


class Served(NamedTuple):
    """A run. Shares are means over the time in which requests wait."""

    times: list[RequestTimes]
    preempted: int
    makespan_s: float
    occupancy: float
    efficiency: float
    paged: float
    stats: SchedulerStats
    swaps: SwapStats


@dataclasses.dataclass(slots=True)
class Meter:
    """Averages over time, of steps in which requests wait; ``paged``: and a slot is free."""

    slots: int
    seconds: float = 0.0
    paged_seconds: float = 0.0
    paged: float = 0.0
    occupied: float = 0.0
    efficient: float = 0.0

    def add(self, step_s: float, plan: StepPlan, stats: SchedulerStats) -> None:
        if not stats.num_waiting or not stats.num_used_pages:
            return
        occupied = step_s * stats.num_used_pages / stats.num_usable_pages
        self.seconds += step_s
        self.occupied += occupied
        if stats.num_running < self.slots:
            self.paged_seconds += step_s
            self.paged += occupied
        live = sum(row.start + row.num_tokens for row in plan.rows)
        self.efficient += step_s * live / (stats.num_used_pages * _PAGE)


def cases(slots: int, host_kv_bytes: int, quantile: float, target: float) -> list[Case]:
    """Greedy first: the others are compared with it."""
    greedy = SchedulerConfig(max_num_seqs=slots, victim="latest")
    ours = SchedulerConfig(
        max_num_seqs=slots, capacity="predicted", victim="value",
        demand_quantile=quantile, preempted_target=target,
    )  # fmt: skip
    made = [Case("greedy", greedy, "noisy", 0), Case("greedy+host", greedy, "noisy", host_kv_bytes)]
    for predictor in ("oracle", "noisy", "constant"):
        made.append(Case(f"predicted-{predictor}", ours, predictor, 0))
        made.append(Case(f"predicted-{predictor}+host", ours, predictor, host_kv_bytes))
    return made


def pages_for(trace: Sequence[TraceRequest], slots: int, oversubscribed: float) -> int:
    """Pages of full slots, each request weighing as long as it decodes, divided; the null page included."""
    weight = sum(row.output_tokens for row in trace)
    held = sum(row.output_tokens * (row.prompt_tokens + row.output_tokens / 2 + _PAGE / 2) for row in trace)
    return 1 + int(slots * held / weight / _PAGE / oversubscribed)


def serve(trace: Sequence[TraceRequest], cluster: Cluster, case: Case, sigma: float) -> Served:
    """Runs a trace through one engine, as `jaxserve.simulator.instance.Instance` does, and looks on."""
    lengths = {str(index): row.output_tokens for index, row in enumerate(trace)}
    clock, assembly = VirtualClock(), cluster.assembly
    executor = CostExecutor(
        clock, cluster.times, lengths, assembly.num_slots, host=assembly.host, keep_steps=True
    )
    scheduler = assemble(assembly, CostModel(cluster.prior))
    core = EngineCore(
        scheduler=scheduler,
        executor=executor,
        prepare=without_arrays,
        predictor=make_known_length_predictor(case.predictor, lengths, sigma=sigma, seed=_SEED),
        clock=clock,
        pipeline_depth=1,
    )
    waiting = [
        make_request(index, row, max(_MOST_OUTPUT, row.output_tokens)) for index, row in enumerate(trace)
    ]
    waiting.reverse()
    finished: list[Request] = []
    meter = Meter(assembly.num_slots)
    steps = executor.steps
    assert steps is not None
    while waiting or core.has_work:
        if not core.has_work:
            clock.advance_to(waiting[-1].arrival_time)
        while waiting and waiting[-1].arrival_time <= clock.now:
            core.add(waiting.pop())
        before = executor.num_dispatched, core.stats.steps
        finished += core.step().ended
        if steps:
            meter.add(steps[-1].end - steps[-1].start, steps[-1].plan, scheduler.stats())
            steps.clear()
        if before == (executor.num_dispatched, core.stats.steps):
            clock.advance_to(clock.now + IDLE_POLL_S)
    seconds = max(meter.seconds, 1e-9)
    return Served(
        [_times(request) for request in finished],
        sum(request.num_preemptions > 0 for request in finished),
        clock.now,
        meter.occupied / seconds,
        meter.efficient / seconds,
        meter.paged / max(meter.paged_seconds, 1e-9),
        scheduler.stats(),
        scheduler.swap_stats(),
    )


def _times(request: Request) -> RequestTimes:
    assert request.first_token_time is not None
    assert request.finish_time is not None
    return RequestTimes(
        request.arrival_time, request.first_token_time, request.finish_time, len(request.output_token_ids)
    )


def slo_share(times: Sequence[RequestTimes], ttft_s: float, tpot_s: float) -> float:
    """Requests within both objectives."""
    return sum(t.ttft <= ttft_s and (t.tpot is None or t.tpot <= tpot_s) for t in times) / len(times)


def goodput(points: Sequence[tuple[float, float]]) -> float:
    """The highest rate with enough requests within their objectives, by (rate, share) in order of rates.

    Linear between the last rate that is good enough and the next; 0 if none is, and the last if all are.
    """
    best = 0.0
    for index, (rate, share) in enumerate(points):
        if share >= _GOOD:
            best = rate
            if index + 1 < len(points) and points[index + 1][1] < _GOOD:
                next_rate, next_share = points[index + 1]
                best += (next_rate - rate) * (share - _GOOD) / (share - next_share)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", default="1xH100m", help="one engine (default: %(default)s)")
    parser.add_argument("--model", default="llama-3-8b", help="shape (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="of the trace (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--oversubscribed", type=float, default=1.5, help="(default: %(default)s)")
    parser.add_argument(
        "--output-factor", type=float, default=1.0, help="outputs longer (default: %(default)s)"
    )
    parser.add_argument(
        "--sigma", type=float, default=0.7, help="of noisy predictions (default: %(default)s)"
    )
    parser.add_argument("--quantile", type=float, default=0.75, help="demand_quantile (default: %(default)s)")
    parser.add_argument("--target", type=float, default=0.02, help="preempted_target (default: %(default)s)")
    parser.add_argument(
        "--host-gb", type=float, default=64.0, help="host memory, 1e9 bytes (default: %(default)s)"
    )
    parser.add_argument("--rates", type=float_list, default=(0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3))
    parser.add_argument("--ttft-slo", type=float, default=2.0, help="seconds (default: %(default)s)")
    parser.add_argument("--tpot-slo", type=float, default=0.05, help="seconds (default: %(default)s)")
    parser.add_argument("--cases", default="", help="only those whose names contain this")
    parser.add_argument("--saturated-only", action="store_true", help="no rates")
    parser.add_argument("--traces", type=Path, help="folder of traces")
    add_output_flag(parser)
    args = parser.parse_args(argv)
    try:
        run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """All cases; greedy always, as the others are compared with it."""
    folder = find_traces(args.traces)
    if folder is None:
        trace, source = synthetic_trace(args.requests, _SEED), "synthetic"
    else:
        trace, source = read_trace(folder / f"{TRACE}.csv.gz", args.requests), TRACE
    trace = [
        row._replace(output_tokens=max(1, round(row.output_tokens * args.output_factor))) for row in trace
    ]
    num_pages = pages_for(trace, args.slots, args.oversubscribed)
    results = Results("memory_pressure", host_device(), args.output)
    greedy_rate, greedy_goodput, greedy_steady, greedy_run = 0.0, 0.0, 0.0, None
    gc.disable()
    for case in cases(args.slots, int(args.host_gb * 1e9), args.quantile, args.target):
        if case.name != "greedy" and args.cases not in case.name:
            continue
        cluster = make_cluster(
            ClusterConfig(
                cluster=args.cluster, model=args.model, page_size=_PAGE, num_pages=num_pages,
                host_kv_bytes=case.host_kv_bytes,
            ),
            case.scheduler,
        )  # fmt: skip
        where = {"label": cluster.label, "trace": source, "requests": len(trace), "num_pages": num_pages}
        where |= {"slots": args.slots, "oversubscribed": args.oversubscribed}
        where |= {"output_factor": args.output_factor, "sigma": args.sigma, "quantile": args.quantile}
        where |= {"target": args.target}
        where |= {"tpot_slo_s": args.tpot_slo}
        served = serve(at_once(trace), cluster, case, args.sigma)
        rate = len(trace) / served.makespan_s
        greedy_run, greedy_rate = greedy_run or served, greedy_rate or rate
        steady = rate * slo_share(served.times, math.inf, args.tpot_slo)
        greedy_steady = greedy_steady or steady
        for name, value, unit in (
            ("preempted_share", served.preempted / len(trace), "share"),
            ("preempted_ratio", served.preempted / max(greedy_run.preempted, 1), "of greedy"),
            ("preemptions", served.stats.num_preemptions, "preemptions"),
            ("recomputed_tokens", served.stats.num_lost_tokens, "tokens"),
            (
                "recomputed_ratio",
                served.stats.num_lost_tokens / max(greedy_run.stats.num_lost_tokens, 1),
                "of greedy",
            ),
            ("loaded_tokens", served.swaps.resumed_tokens, "tokens"),
            ("pool_occupancy", served.occupancy, "share"),
            ("paged_occupancy", served.paged, "share"),
            ("slot_efficiency", served.efficiency, "share"),
            ("request_rate", rate, "requests/s"),
            ("request_rate_ratio", rate / greedy_rate, "of greedy"),
            ("tpot_goodput", steady, "requests/s"),
            ("tpot_goodput_ratio", steady / max(greedy_steady, 1e-9), "of greedy"),
            ("e2e_p50_s", percentile([t.e2e for t in served.times], 50), "s"),
            ("tpot_p99_ms", 1e3 * percentile([t.tpot for t in served.times if t.tpot is not None], 99), "ms"),
        ):
            results.add(case.name, name, value, unit, load="saturated", **where)
        if args.saturated_only:
            continue
        points: list[tuple[float, float]] = []
        where |= {"ttft_slo_s": args.ttft_slo}
        for share in args.rates:
            at = at_rate(trace, share * greedy_rate)
            loaded = serve(at, cluster, case, args.sigma)
            good = slo_share(loaded.times, args.ttft_slo, args.tpot_slo)
            points.append((share * greedy_rate, good))
            results.add(case.name, "slo_share", good, "share", load=share, **where)
            results.add(
                case.name, "preempted_share", loaded.preempted / len(trace), "share", load=share, **where
            )
        best = goodput(points)
        greedy_goodput = greedy_goodput or best
        results.add(case.name, "goodput", best, "requests/s", load="rates", **where)
        if greedy_goodput:
            results.add(case.name, "goodput_ratio", best / greedy_goodput, "of greedy", load="rates", **where)
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
