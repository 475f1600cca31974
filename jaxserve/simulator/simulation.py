"""Runs a trace through a simulated cluster."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import math
import multiprocessing
from collections.abc import Callable, Sequence
from typing import get_args

from jaxserve.config import Prediction
from jaxserve.core.cost_model import CostModel
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.fused_predictor import make_length_predictor
from jaxserve.core.known_lengths import make_known_length_predictor
from jaxserve.core.learning.tuner import Tuner
from jaxserve.core.predictor import LengthPredictor
from jaxserve.errors import ConfigError
from jaxserve.request import Request
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.executor import SimulatedStep
from jaxserve.simulator.instance import Instance, make_request
from jaxserve.simulator.measures import RequestTimes, percentile, summary, weighted_percentile
from jaxserve.simulator.routers import ROUTERS
from jaxserve.simulator.trace import TraceRequest

_MOST_OUTPUT = 8192


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """How a trace is run.

    Attributes:
        router: a name in `ROUTERS`.
        predictor: ``mean`` or ``fused`` (learn from what finished), or a name in `KNOWN_LENGTH_PREDICTORS`.
        sigma: of the noise of ``noisy`` and ``shuffled``.
        seed: of that noise.
        pipeline_depth: steps launched before their predecessor's result is read.
        host_s: seconds of the host's own work a step.
        forces_lengths: requests end at their limit, as in benches that ignore end tokens; else with a stop
            token, of which the scheduler learns a step late.
        learns: whether the policies' cost model learns from the steps; else it is right from the start.
        keep_steps: keep every step, for a timeline.
    """

    router: str = "least_load"
    predictor: str = "mean"
    sigma: float = 0.7
    seed: int = 0
    pipeline_depth: int = 1
    host_s: float = 0.0
    forces_lengths: bool = False
    learns: bool = False
    keep_steps: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What became of one request; times in seconds since the trace began."""

    id: str
    engine: int
    client: str
    prompt_tokens: int
    output_tokens: int
    arrival: float
    first_scheduled: float
    first_token: float
    finished: float
    num_preemptions: int

    @property
    def times(self) -> RequestTimes:
        return RequestTimes(self.arrival, self.first_token, self.finished, self.output_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class SimulationResult:
    """A run.

    Attributes:
        requests: in order of the trace.
        gaps: seconds between tokens, and how many rows had that gap.
        steps: of each engine, if they were kept.
        counters: name -> (value, unit), of the whole cluster.
    """

    requests: list[FinishedRequest]
    gaps: list[tuple[float, int]]
    steps: list[list[SimulatedStep]]
    counters: dict[str, tuple[float, str]]

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Name -> (value, unit)."""
        times = [request.times for request in self.requests]
        e2e = [t.e2e for t in times]
        waits = [request.first_scheduled - request.arrival for request in self.requests]
        return {
            **summary(times),
            "ttft_max_s": (max(t.ttft for t in times), "s"),
            "e2e_mean_s": (sum(e2e) / len(e2e), "s"),
            "itl_p50_ms": (1e3 * weighted_percentile(self.gaps, 50), "ms"),
            "itl_p99_ms": (1e3 * weighted_percentile(self.gaps, 99), "ms"),
            "wait_mean_s": (sum(waits) / len(waits), "s"),
            "wait_p99_s": (percentile(waits, 99), "s"),
            "wait_max_s": (max(waits), "s"),
            **self.counters,
        }


def simulate(
    trace: Sequence[TraceRequest],
    cluster: Cluster,
    options: SimulationOptions,
    *,
    decision_log: DecisionLog | None = None,
    predictor: LengthPredictor | None = None,
    make_tuner: Callable[[CostModel], Tuner] | None = None,
    jobs: int = 1,
) -> SimulationResult:
    """Runs every request to its end.

    Args:
        decision_log: of a cluster of one engine.
        predictor: in place of the one that the options name; with one job.
        make_tuner: of each engine, from the cost model of its policies; with one job.
        jobs: processes; more than one needs a router that does not look at the engines (round_robin).

    Raises:
        ConfigError: for unknown names, or requests that fit no engine.
    """
    if options.router not in ROUTERS:
        raise ConfigError(f"router={options.router!r}: must be one of {', '.join(ROUTERS)}")
    most = (cluster.assembly.num_pages - 1 - cluster.assembly.watermark_pages) * cluster.assembly.page_size
    longest = max(row.prompt_tokens + row.output_tokens for row in trace)
    if longest > most:
        raise ConfigError(f"trace: a request has {longest} tokens, an engine's pages hold {most}")
    if jobs == 1 or cluster.num_engines == 1:
        engines = range(cluster.num_engines)
        return _simulate_some(trace, cluster, options, engines, decision_log, predictor, make_tuner)
    if predictor is not None or make_tuner is not None:
        raise ConfigError(f"jobs={jobs}: a predictor of its own, or learning, needs jobs=1")
    if options.router != "round_robin":
        raise ConfigError(f"jobs={jobs}: needs router=round_robin, not {options.router}")
    shares = [range(job, cluster.num_engines, jobs) for job in range(jobs)]
    fresh = multiprocessing.get_context("spawn")  # a copy of a process with threads may lock up
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        futures = [pool.submit(_simulate_some, trace, cluster, options, share) for share in shares]
        return _merged([future.result() for future in futures])


def _simulate_some(
    trace: Sequence[TraceRequest],
    cluster: Cluster,
    options: SimulationOptions,
    engines: range,
    decision_log: DecisionLog | None = None,
    predictor: LengthPredictor | None = None,
    make_tuner: Callable[[CostModel], Tuner] | None = None,
) -> SimulationResult:
    """The part of a simulation that happens on some of the engines."""
    lengths = {str(index): row.output_tokens for index, row in enumerate(trace)}
    make_predictor = (lambda: predictor) if predictor else _predictors(options, lengths)
    instances = {
        engine: Instance(
            cluster.assembly,
            prior=cluster.prior,
            times=cluster.times,
            lengths=lengths,
            predictor=make_predictor(),
            pipeline_depth=options.pipeline_depth,
            learns=options.learns,
            host_s=options.host_s,
            keep_steps=options.keep_steps,
            decision_log=decision_log,
            make_tuner=make_tuner,
        )
        for engine in engines
    }
    is_collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic, and there are millions of small objects
    try:
        _run(trace, cluster.num_engines, options, instances)
    finally:
        if is_collecting:
            gc.enable()
    return _result(instances)


def _run(
    trace: Sequence[TraceRequest],
    num_engines: int,
    options: SimulationOptions,
    instances: dict[int, Instance],
) -> None:
    def send(instance: Instance, index: int) -> None:
        row = trace[index]
        instance.run_until(row.arrival_s)
        limit = row.output_tokens if options.forces_lengths else max(_MOST_OUTPUT, row.output_tokens)
        instance.add(make_request(index, row, limit))

    if options.router == "round_robin":  # nobody looks at another: each runs to its end, in warm caches
        for engine, instance in instances.items():
            for index in range(engine, len(trace), num_engines):
                send(instance, index)
            instance.run_until(math.inf)
        return
    router, everyone = ROUTERS[options.router](), list(instances.values())
    for index, row in enumerate(trace):
        for instance in everyone:
            instance.run_until(row.arrival_s)
        send(everyone[router.choose(index, everyone)], index)
    for instance in everyone:
        instance.run_until(math.inf)


def _predictors(options: SimulationOptions, lengths: dict[str, int]) -> Callable[[], LengthPredictor]:
    """What makes an engine's predictor: one that learns is each engine's own."""
    if options.predictor in get_args(Prediction):
        return lambda: make_length_predictor(options.predictor)
    known = make_known_length_predictor(options.predictor, lengths, sigma=options.sigma, seed=options.seed)
    return lambda: known


def _result(instances: dict[int, Instance]) -> SimulationResult:
    requests = [_finished(r, engine) for engine, i in instances.items() for r in i.finished]
    requests.sort(key=lambda request: int(request.id))
    executors = [instance.executor for instance in instances.values()]
    stats = [instance.core.stats for instance in instances.values()]
    end = max((instance.clock.now for instance in instances.values()), default=0.0)
    computed = sum(s.scheduled_tokens for s in stats)
    padded = sum(e.num_padded_tokens for e in executors)
    caches = [s for i in instances.values() if (s := i.core.scheduler.prefix_cache_stats()) is not None]
    tiers = [cache.host for cache in caches if cache.host is not None]
    counters = {
        "steps": (float(sum(s.steps for s in stats)), "steps"),
        "preemptions": (float(sum(r.num_preemptions for r in requests)), "requests"),
        "scheduled_tokens": (float(computed), "tokens"),
        "padded_tokens": (float(padded), "tokens"),
        "prefix_lookup_tokens": (float(sum(cache.lookup_tokens for cache in caches)), "tokens"),
        "prefix_hit_tokens": (float(sum(cache.hit_tokens for cache in caches)), "tokens"),
        "prefix_host_hit_tokens": (float(sum(cache.host_hit_tokens for cache in caches)), "tokens"),
        "prefix_evicted_pages": (float(sum(cache.num_evicted_pages for cache in caches)), "pages"),
        "host_saved_bytes": (float(sum(tier.saved_bytes for tier in tiers)), "B"),
        "host_loaded_bytes": (float(sum(tier.loaded_bytes for tier in tiers)), "B"),
        "host_wasted_bytes": (float(sum(tier.wasted_bytes for tier in tiers)), "B"),
        "preloaded_bytes": (float(sum(tier.preloaded_bytes for tier in tiers)), "B"),
        "preload_useful_bytes": (float(sum(tier.preload_useful_bytes for tier in tiers)), "B"),
        "preload_wasted_bytes": (float(sum(tier.preload_wasted_bytes for tier in tiers)), "B"),
        "busy_s": (sum(e.busy_s for e in executors), "s"),
        "makespan_s": (end, "s"),
    }
    return SimulationResult(
        requests,
        [gap for e in executors for gap in e.gaps],
        [e.steps or [] for e in executors],
        counters,
    )


def _finished(request: Request, engine: int) -> FinishedRequest:
    assert request.first_scheduled_time is not None
    assert request.first_token_time is not None
    assert request.finish_time is not None
    return FinishedRequest(
        request.id,
        engine,
        request.client,
        request.num_prompt_tokens,
        len(request.output_token_ids),
        request.arrival_time,
        request.first_scheduled_time,
        request.first_token_time,
        request.finish_time,
        request.num_preemptions,
    )


def _merged(parts: Sequence[SimulationResult]) -> SimulationResult:
    counters = dict(parts[0].counters)
    for part in parts[1:]:
        for name, (value, unit) in part.counters.items():
            before = counters[name][0]
            counters[name] = (max(before, value) if name == "makespan_s" else before + value, unit)
    return SimulationResult(
        sorted((r for part in parts for r in part.requests), key=lambda request: int(request.id)),
        [gap for part in parts for gap in part.gaps],
        [steps for part in parts for steps in part.steps],
        counters,
    )
