"""Scheduling policies on traces, simulated: who gains what, who pays for it, and where nothing is gained.

    python bench/scheduling.py --parts saturation,bursts,fairness,starvation,ladder --output results.jsonl

Every run is the engine's own scheduler and step loop on a virtual clock; the device is a profile whose label
is in each record. Parts:

- ``saturation``: orderings on the Azure conversation trace at loads from half to all of what the engine can
  serve (its throughput with everything there at once); noisy, perfect, shuffled and constant predictions.
  ``wait_share`` is what of the mean E2E under `fcfs` is waiting for a slot: no order can gain more than that
  at the same step times.
- ``bursts``: chats that decode while long prompts come in bursts: compositions, and no chunking at all.
- ``fairness``: two clients that always wait, one asking for ten times as much.
- ``starvation``: a long request among short ones that come faster than they can be served.
- ``ladder``: static, dynamic, iteration level, pages, chunks, prefix cache, searched chunks, predicted order,
  fused attention (`pod_times.py`); several workloads, 32 and 256 slots.
- ``decisions``: CPU milliseconds of one decision at 256 running and 10,000 waiting requests.
- ``scale``: seconds to simulate 100,000 requests on eight engines.
- ``command``: seconds of `jaxserve simulate` with three policies, as docs/scheduling.md has it.
- ``sweep``: policies by load on the real engine, beside the simulator (`load_sweep.py`); only if named.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import load_sweep
from bench.pod_times import with_pod
from bench.results import Results, add_output_flag, float_list, host_device, int_list, jax_device
from bench.shapes import add_shape_flag
from bench.sim_vs_real import POLICIES
from bench.workloads import find_traces, synthetic_trace
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import SchedulerConfig
from jaxserve.core.known_lengths import make_known_length_predictor
from jaxserve.core.policies.registry import ORDERINGS
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.instance import Instance, make_request
from jaxserve.simulator.measures import percentile
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import TraceRequest, at_once, at_rate, poisson, read_trace, repeated, uniform

BUCKETS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
SWEEP = "sweep"
_PAGE, _RESERVED = 16, 8192  # tokens of a KV page; without paging, of a request's place
_REQUESTS, _SWEEP_REQUESTS = 4000, 150
_SET_HERE = frozenset({"ordering", "max_wait_s", "seed"})
CONVERSATION, CODE, PREFIXES = "azure2023_conv", "azure2023_code", "mooncake_conversation"
SHOWN = (
    "output_tok_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttft_max_s", "itl_p50_ms", "itl_p99_ms",
    "e2e_mean_s", "e2e_p50_s", "e2e_p99_s", "wait_mean_s", "wait_max_s", "preemptions",
)  # fmt: skip


class Bench:
    """Simulates on one machine, and emits what comes out."""

    def __init__(
        self,
        results: Results,
        cluster: str,
        traces: Path | None,
        requests: int,
        slots: Sequence[int],
        seed: int,
    ) -> None:
        self._results = results
        self.slots = slots
        self._cluster = cluster
        self._traces = traces
        self.requests = requests
        self.seed = seed

    def trace(self, name: str) -> tuple[str, list[TraceRequest]]:
        """Real data if there are any, else drawn from a fit; the name says which."""
        path = None if self._traces is None else self._traces / f"{name}.csv.gz"
        if path is not None and path.is_file():
            return name, read_trace(path, self.requests)
        drawn = synthetic_trace(self.requests, self.seed)
        return f"{CONVERSATION}-synthetic", drawn

    def prefixes(self, most: int) -> list[TraceRequest]:
        """Conversations whose prompts begin alike, of 16,384 tokens at most; none without the file."""
        path = None if self._traces is None else self._traces / f"{PREFIXES}.jsonl.gz"
        if path is None or not path.is_file():
            return []
        fitting = [row for row in read_trace(path) if row.prompt_tokens + row.output_tokens <= 16384]
        return fitting[:most]

    def run(
        self,
        trace: Sequence[TraceRequest],
        *,
        predictor: str = "mean",
        noise_seed: int = 0,
        page_size: int = _PAGE,
        shares_prefixes: bool = True,
        fuses_attention: bool = False,
        **scheduler: Any,
    ) -> tuple[Cluster, SimulationResult]:
        """Runs a trace with 8B shapes; ``scheduler`` are fields of `SchedulerConfig`."""
        slots, budget = scheduler.get("max_num_seqs", 256), scheduler.get("max_num_batched_tokens", 2048)
        buckets = tuple(n for n in (*BUCKETS, 4096, 8192, 16384) if slots < n <= budget)
        cluster = make_cluster(
            ClusterConfig(
                cluster=self._cluster,
                token_buckets=buckets,
                page_size=page_size,
                enable_prefix_caching=shares_prefixes,
            ),
            SchedulerConfig(**scheduler),
        )
        if fuses_attention:
            cluster = with_pod(cluster)
        options = SimulationOptions(predictor=predictor, seed=noise_seed, pipeline_depth=1)
        return cluster, simulate(trace, cluster, options)

    def emit(
        self,
        case: str,
        cluster: Cluster,
        result: SimulationResult,
        base: SimulationResult | None,
        **more: Any,
    ) -> None:
        """A run's metrics, and its ratios to the base of its comparison."""
        own = result.metrics()
        theirs = base.metrics() if base is not None else {}
        for name in SHOWN:
            value, unit = own[name]
            ratio = {"ratio": value / theirs[name][0]} if name in theirs and theirs[name][0] else {}
            self._results.add(case, name, value, unit, machine=cluster.label, **ratio, **more)

    def add(self, case: str, metric: str, value: float, unit: str, **more: Any) -> None:
        self._results.add(case, metric, value, unit, **more)


def saturation_rate(bench: Bench, trace: Sequence[TraceRequest], **scheduler: Any) -> float:
    """Requests a second that the engine serves when it never has to wait for any."""
    _, result = bench.run(at_once(trace), **scheduler)
    return load_sweep.service_rate([request.times for request in result.requests])


def saturation(bench: Bench) -> None:
    """Orderings against first come, first served, by load."""
    policies: dict[str, tuple[str, dict[str, Any]]] = {
        "latency": ("noisy", {"ordering": "sjf", "max_wait_s": 60.0}),
        "balanced": ("noisy", {"ordering": "sjf", "max_wait_s": 8.0}),
        "latency-oracle": ("oracle", {"ordering": "sjf", "max_wait_s": 60.0}),
        "latency-shuffled": ("shuffled", {"ordering": "sjf", "max_wait_s": 60.0}),
        "latency-constant": ("constant", {"ordering": "sjf", "max_wait_s": 60.0}),
        "mlfq": ("mean", {"ordering": "mlfq"}),
        "priority": ("mean", {"ordering": "priority"}),
    }
    name, trace = bench.trace(CONVERSATION)
    for slots in bench.slots:
        loads = (0.94, 1.0) if slots >= 64 else (0.5, 0.8, 0.94, 1.0)
        full = saturation_rate(bench, trace, max_num_seqs=slots)
        bench.add("fcfs", "saturation_rate", full, "requests/s", workload=name, slots=slots)
        for load in loads:
            arriving = at_rate(trace, load * full)
            cluster, base = bench.run(arriving, max_num_seqs=slots)
            where = {"workload": name, "load": load, "slots": slots}
            bench.emit("fcfs", cluster, base, None, **where)
            own = base.metrics()
            wait_share = own["wait_mean_s"][0] / own["e2e_mean_s"][0]
            bench.add("fcfs", "wait_share", wait_share, "share", machine=cluster.label, **where)
            for case, (predictor, options) in policies.items():
                for noise_seed in range(2 if predictor == "noisy" else 1):
                    cluster, result = bench.run(
                        arriving, predictor=predictor, noise_seed=noise_seed, max_num_seqs=slots, **options
                    )
                    more = {"predictor": predictor, "noise_seed": noise_seed}
                    bench.emit(case, cluster, result, base, **more, **where)


def bursts(bench: Bench) -> None:
    """Chats decode; every two thirds of a second two prompts of 4,000 tokens come at once.

    More rarely, the stalls would be too few of all gaps to show in their 99th percentile.
    """
    chats = poisson(uniform((20, 200), (100, 400), bench.requests // 4, bench.seed), 8.0, bench.seed)
    times = [0.67 * i for i in range(3, int(chats[-1].arrival_s / 0.67))]
    prompts = [TraceRequest(time, 4000, 20) for time in times for _ in range(2)]
    trace = sorted([*chats, *prompts])
    cluster, whole = bench.run(trace, max_num_seqs=128, max_num_batched_tokens=16384)
    where = {"workload": "chats-and-bursts-of-prompts"}
    bench.emit("unchunked", cluster, whole, None, **where)
    variants: dict[str, dict[str, Any]] = {
        "chunked-2048": {},
        "chunked-512": {"max_num_batched_tokens": 512},
        "slo-17ms": {"composition": "slo", "tpot_slo_s": 0.017},
        "slo-25ms": {"composition": "slo", "tpot_slo_s": 0.025},
        "slo-40ms": {"composition": "slo", "tpot_slo_s": 0.040},
        "phase-25ms": {"composition": "phase", "tpot_slo_s": 0.025},
        "partition": {"composition": "partition"},
        "slo-25ms-spf": {"composition": "slo", "tpot_slo_s": 0.025, "ordering": "spf"},
    }
    for case, options in variants.items():
        cluster, result = bench.run(trace, max_num_seqs=128, **options)
        bench.emit(case, cluster, result, whole, **where)
        itl = result.metrics()
        ratio = itl["itl_p99_ms"][0] / itl["itl_p50_ms"][0]
        bench.add(case, "itl_p99_over_p50", ratio, "ratio", machine=cluster.label, **where)


def fairness(bench: Bench) -> None:
    """Service (prompt tokens + 2 x output tokens) of two clients while both wait."""
    many = [TraceRequest(0.0, 400, 200, "flood") for _ in range(4000)]
    few = [TraceRequest(0.0, 100, 50, "calm") for _ in range(4000)]
    for ordering in ("fcfs", "fair", "dlpm", "sjf"):
        cluster, result = bench.run(sorted([*many, *few]), max_num_seqs=32, ordering=ordering)
        both_until = min(
            max(r.first_scheduled for r in result.requests if r.client == client)
            for client in ("flood", "calm")
        )
        service = {"flood": 0.0, "calm": 0.0}
        for r in result.requests:
            if r.first_scheduled < both_until:
                share = min(1.0, (both_until - r.first_scheduled) / (r.finished - r.first_scheduled))
                service[r.client] += r.prompt_tokens + 2 * share * r.output_tokens
        ratio = service["flood"] / service["calm"]
        bench.add(ordering, "service_ratio", ratio, "ratio", machine=cluster.label, workload="two-clients")


def starvation(bench: Bench) -> None:
    """Short requests come at 1.5 times what can be served; every hundredth is long."""
    lengths = [TraceRequest(0.0, 100, 1500 if i % 100 == 50 else 40) for i in range(bench.requests)]
    full = saturation_rate(bench, lengths, max_num_seqs=16)
    trace = at_rate([r._replace(arrival_s=float(i)) for i, r in enumerate(lengths)], 1.5 * full)
    cases: dict[str, dict[str, Any]] = {
        "fcfs": {},
        "sjf-8s": {"ordering": "sjf", "max_wait_s": 8.0},
        "sjf-60s": {"ordering": "sjf", "max_wait_s": 60.0},
        "mlfq": {"ordering": "mlfq"},
        "priority": {"ordering": "priority"},
    }
    for case, options in cases.items():
        cluster, result = bench.run(trace, predictor="oracle", max_num_seqs=16, **options)
        waits = [r.first_scheduled - r.arrival for r in result.requests]
        long = [w for w, r in zip(waits, result.requests, strict=True) if r.output_tokens == 1500]
        where = {"machine": cluster.label, "workload": "short-stream-at-1.5"}
        bench.add(case, "wait_max_s", max(waits), "s", **where)
        bench.add(case, "wait_max_of_long_s", max(long), "s", **where)
        bench.add(case, "wait_p50_s", percentile(waits, 50), "s", **where)
        if case != "fcfs":
            bound = wait_bound_s(result, options.get("max_wait_s", 8.0))
            bench.add(case, "wait_bound_s", bound, "s", **where)


def wait_bound_s(result: SimulationResult, cap_s: float) -> float:
    """The longest wait that the cap permits: the cap, and the time to serve those promoted before.

    The promoted are served by arrival. So before a request that is promoted at ``t`` come only those that
    were promoted earlier and still wait at ``t``. So many starts took at most this long in this run.
    """
    promoted = sorted((r.arrival + cap_s, r.first_scheduled) for r in result.requests)
    promoted = [(promotion, start) for promotion, start in promoted if start > promotion]
    most_before = 0
    for index, (promotion, _) in enumerate(promoted):
        most_before = max(most_before, sum(start > promotion for _, start in promoted[: index + 1]))
    starts = sorted(r.first_scheduled for r in result.requests)
    return cap_s + max(b - a for a, b in zip(starts, starts[most_before:], strict=False))


def ladder(bench: Bench) -> None:
    """Each rung adds one thing to the one before; negative steps stay in.

    Before the rung ``paged`` every request reserves memory for the longest there may be, as one page.
    """
    whole = {"max_num_batched_tokens": 16384}
    searched = {"composition": "slo", "tpot_slo_s": 0.04}
    reserved = {"page_size": _RESERVED, "shares_prefixes": False, **whole}
    sjf = {**searched, "ordering": "sjf"}
    rungs: list[tuple[str, str, dict[str, Any]]] = [
        ("static", "mean", {"batching": "static", **reserved}),
        ("dynamic", "mean", {"batching": "dynamic", **reserved}),
        ("iteration-level", "mean", reserved),
        ("paged", "mean", {"shares_prefixes": False, **whole}),
        ("chunked", "mean", {"shares_prefixes": False}),
        ("prefix-cache", "mean", {}),
        ("searched-chunks", "mean", searched),
        ("sjf-mean-length", "mean", sjf),
        ("sjf-noisy", "noisy", sjf),
        ("sjf-oracle", "oracle", sjf),
        ("fused-attention", "oracle", {**sjf, "fuses_attention": True}),
    ]
    for (name, trace), slots in itertools.product(_workloads(bench), (32, 256)):
        full = saturation_rate(bench, trace, max_num_seqs=slots)
        loads = {"at-once": at_once(trace), "load-0.9": poisson(trace, 0.9 * full, bench.seed)}
        for arrivals, load in loads.items():
            before: SimulationResult | None = None
            for rung, predictor, options in rungs:
                cluster, result = bench.run(load, predictor=predictor, max_num_seqs=slots, **options)
                bench.emit(rung, cluster, result, before, workload=name, arrivals=arrivals, slots=slots)
                before = result


def _workloads(bench: Bench) -> list[tuple[str, list[TraceRequest]]]:
    count = min(bench.requests, 1000)
    made = [("seed-burst-50-1000", uniform((50, 1000), (50, 1000), count, bench.seed))]
    for name in (CONVERSATION, CODE):
        found, trace = bench.trace(name)
        made.append((found, trace[:count]))
    prefixes = bench.prefixes(count)
    return [*made, (PREFIXES, prefixes)] if prefixes else made


def decisions(bench: Bench) -> None:
    """CPU milliseconds of `Scheduler.schedule` in steady decode with a long queue behind it."""
    running, waiting, steps = 256, 10_000, 400
    rows = [TraceRequest(0.0, 64 + i % 64, 4000, f"client-{i % 50}") for i in range(running)]
    rows += [TraceRequest(0.001 * i, 100 + i % 900, 50 + i % 500, f"client-{i % 50}") for i in range(waiting)]
    for ordering in ORDERINGS:
        spent = [_decision_ms(ordering, rows, running, steps) for _ in range(3)]
        where = {"running": running, "waiting": waiting, "steps": steps}
        for metric, values in (
            ("schedule_ms", [s[0] for s in spent]),
            ("schedule_p99_ms", [s[1] for s in spent]),
        ):
            bench.add(ordering, metric, sorted(values)[1], "ms", **where)


def _decision_ms(
    ordering: str, rows: Sequence[TraceRequest], running: int, steps: int
) -> tuple[float, float]:
    scheduler = SchedulerConfig(max_num_seqs=running, ordering=ordering, max_wait_s=30.0)  # type: ignore[arg-type]
    cluster = make_cluster(ClusterConfig(num_pages=200_000, token_buckets=BUCKETS[4:]), scheduler)
    lengths = {str(index): row.output_tokens for index, row in enumerate(rows)}
    options = SimulationOptions(predictor="noisy")
    instance = Instance(
        cluster.assembly, prior=cluster.prior, times=cluster.times, lengths=lengths,
        predictor=make_known_length_predictor("noisy", lengths, sigma=options.sigma, seed=0),
    )  # fmt: skip
    for index, row in enumerate(rows):
        instance.core.add(make_request(index, row, 8192))
        if index == running - 1:
            for _ in range(64):
                instance.core.step()
    inner, times = instance.core.scheduler.schedule, list[float]()

    def timed(now: float) -> Any:
        start = time.process_time()
        plan = inner(now)
        times.append(time.process_time() - start)
        return plan

    instance.core.scheduler.schedule = timed  # type: ignore[method-assign]
    for _ in range(steps):
        instance.core.step()
    return 1e3 * sum(times) / len(times), 1e3 * percentile(times, 99)


def scale(bench: Bench) -> None:
    """Seconds to simulate 100,000 requests of the conversation trace on eight engines, in two processes."""
    name, trace = bench.trace(CONVERSATION)
    full = saturation_rate(bench, trace)
    requests = at_rate(repeated(trace, 100_000), 8 * 0.8 * full)
    cluster = make_cluster(ClusterConfig(cluster="8xH100"), SchedulerConfig())
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = simulate(requests, cluster, SimulationOptions(router="round_robin"), jobs=2)
    wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    where = {"machine": cluster.label, "workload": name, "requests": len(requests), "processes": 2}
    tokens = sum(r.output_tokens for r in result.requests)
    bench.add("100k-on-8", "wall_s", wall_s, "s", **where)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    bench.add("100k-on-8", "cpu_s", cpu_s, "s", **where)
    bench.add("100k-on-8", "output_tokens", tokens, "tokens", **where)
    bench.add("100k-on-8", "steps", result.counters["steps"][0], "steps", **where)


def command(bench: Bench) -> None:
    """Wall seconds of the command, Python's start included: a first try, and the whole trace."""
    name, trace = bench.trace(CONVERSATION)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.csv"
        rows = [f"{row.arrival_s},{row.prompt_tokens},{row.output_tokens}\n" for row in trace]
        path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(rows))
        program = [sys.executable, "-m", "jaxserve.cli.main", "simulate", "--trace", str(path)]
        flags = ["--policy=fcfs,latency,balanced", "--predictor=noisy", "--max-num-seqs=64"]
        few, all_of_it = min(3000, len(trace)), len(trace)
        for case, count, rate, jobs in (("first-try", few, 11, 1), ("whole-trace", all_of_it, 13, 2)):
            options = [f"--requests={count}", f"--rate={rate}", f"--jobs={jobs}"]
            start = time.perf_counter()
            subprocess.run([*program, *flags, *options], check=True, capture_output=True)
            wall_s = time.perf_counter() - start
            where = {"workload": name, "requests": count, "policies": 3, "processes": jobs}
            bench.add(f"command-{case}", "wall_s", wall_s, "s", **where)


PARTS: dict[str, Callable[[Bench], None]] = {
    "saturation": saturation,
    "bursts": bursts,
    "fairness": fairness,
    "starvation": starvation,
    "ladder": ladder,
    "decisions": decisions,
    "scale": scale,
    "command": command,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts that are named."""
    args = _parser().parse_args(argv)
    traces = find_traces(args.traces)
    simulated = [part for part in args.parts if part != SWEEP]
    if simulated:
        requests = args.requests or _REQUESTS
        results = Results("scheduling", host_device(), args.output)
        bench = Bench(results, args.cluster, traces, requests, args.slots, args.bench_seed)
        for part in simulated:
            PARTS[part](bench)
    if SWEEP in args.parts:
        args.requests = args.requests or _SWEEP_REQUESTS
        results = Results("scheduling", jax_device(), args.output)
        load_sweep.run(args, engine_options(args, _SET_HERE), results, traces)
    return 0


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in (*PARTS, SWEEP)]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join((*PARTS, SWEEP))}")
    return parts


def _parser() -> CommandParser:
    parser = CommandParser(prog="scheduling", description=__doc__)
    parser.add_argument(
        "--parts",
        type=_parts,
        default=[*PARTS],
        help=f"which, separated by commas (default: all but {SWEEP})",
    )
    parser.add_argument(
        "--requests", type=int, help=f"of each trace (default: {_REQUESTS}; {SWEEP}: {_SWEEP_REQUESTS} a run)"
    )
    parser.add_argument("--cluster", default="1xH100m", help="what is simulated (default: %(default)s)")
    parser.add_argument(
        "--slots",
        type=int_list,
        default=(16, 64),
        help="saturation: requests at once; low loads only below 64 (default: 16,64)",
    )
    parser.add_argument("--bench-seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="folder of real data")
    add_output_flag(parser)
    parser.add_argument("--loads", type=float_list, default=(0.5, 0.8, 0.94), help="sweep: 0.5,0.8,0.94")
    parser.add_argument(
        "--policies", type=load_sweep.policies_of, default=[*POLICIES], help=f"sweep: {','.join(POLICIES)}"
    )
    parser.add_argument("--prompt-scale", type=float, default=1.0, help="sweep: divides prompt lengths")
    parser.add_argument("--output-scale", type=float, default=1.0, help="sweep: divides output lengths")
    add_shape_flag(parser)
    add_engine_flags(parser, without=_SET_HERE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
