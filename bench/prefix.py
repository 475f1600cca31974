"""The prefix cache: what a hit saves, what the tree costs, and whether it finds what it should.

    python bench/prefix.py --parts ttft --dtype float32           # a shared system prompt, on this device
    python bench/prefix.py --parts ttft --shape llama-3.1-8b      # the same with random weights
    python bench/prefix.py --parts tree                           # operations at 100,000 nodes
    python bench/prefix.py --parts trace,evict,tiers --traces ../shared/traces

``ttft``: requests one after the other, each with ``--system-tokens`` tokens that all share and
``--tail-tokens`` of its own, one output token. *cold*: the shared part is another one in every request.

- ``ttft_p50_ms``; ``ttft_ratio`` is warm over cold;
- ``prefill_saved_share``: prompt tokens that were not computed, of all;
- ``tokens_equal_share`` (``--check``): answers of ``--check-tokens`` tokens, greedy, that are the same
  without a cache. Exact in float32 only.

``tree``: microseconds of one operation in a tree of ``--nodes`` nodes: looking a prompt up, entering with it
(lock and share), leaving (insert what is new, unlock), evicting a page.

``trace``: the requests of Mooncake's traces one at a time through the real scheduler on a virtual clock, with
more pages than they need; then with those of one H100, at the trace's own pace times ``--stretch``.
``hit_share`` is of the prompt tokens; ``hit_tokens`` and ``trie_hit_tokens`` must be equal, and the trie
shares no code with the tree.

``evict``: ``hit_share`` of the same traces in caches of too few blocks, evicting the least recently
used (``lru``) or the least valuable (``value``).

``tiers``: one in ``--share`` conversations of the same traces, with their own pauses, on one simulated H100:
without host memory, with ``--host-gib`` of it, and both with keeping and preloading.

- ``hit_share``, and of it ``host_hit_share``, which was on the host and was loaded; of the prompt tokens;
- ``host_saved_bytes`` went there; ``host_loaded_bytes`` came back, ``host_wasted_bytes`` were given up there
  or computed again; ``preloaded_bytes`` came back in advance, and were ``useful`` or ``wasted``.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.batching_runs import offline_config
from bench.prefix_tiers import measure_tiers, some_conversations
from bench.results import Results, add_output_flag, host_device, jax_device
from bench.shapes import add_shape_flag, model_of
from bench.workloads import find_traces
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import SchedulerConfig
from jaxserve.core.page_pool import PagePool
from jaxserve.core.prefix_cache import PrefixCache
from jaxserve.core.radix_tree import HORIZON_S
from jaxserve.engine.build import make_core, make_engine, make_runner
from jaxserve.engine.llm import LLM
from jaxserve.request import Request, SamplingParams
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.instance import make_request
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import TraceRequest, read_trace

PARTS = ("ttft", "tree", "trace", "evict", "tiers")
_HORIZONS_S = {"lru": 1.0, "value": HORIZON_S}
_CAPACITIES = (1_000, 5_000, 20_000)  # blocks of 512 tokens
TRACES = ("mooncake_conversation", "mooncake_synthetic")
_NOT_HERE = frozenset({"max_num_seqs", "max_model_len", "enable_prefix_caching", "seed"})


# ---------------------------------------------------------------------- what a hit saves


def shared_prompts(
    vocab_size: int, count: int, system_tokens: int, tail_tokens: int, seed: int, *, is_shared: bool
) -> list[list[int]]:
    """Random ids: a system prompt, one for all or one for each, and a tail of its own for each prompt."""
    rng = random.Random(seed)
    first = 256 if vocab_size > 512 else 0  # past the special tokens

    def draw(length: int) -> list[int]:
        return [rng.randrange(first, vocab_size) for _ in range(length)]

    system = draw(system_tokens)
    return [[*(system if is_shared else draw(system_tokens)), *draw(tail_tokens)] for _ in range(count)]


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What one engine did with some prompts, one after the other."""

    ttft_s: list[float]
    answers: list[list[int]]
    num_computed_tokens: int


def serve(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> Served:
    """Answers greedily. Raises RuntimeError if anything was compiled."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    compiles, stats = llm.engine.compiles_after_warmup, llm.engine.loop.core.stats
    before = stats.scheduled_tokens
    ttft_s: list[float] = []
    answers: list[list[int]] = []
    for prompt in prompts:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert output.metrics.ttft_s is not None
        ttft_s.append(output.metrics.ttft_s)
        answers.append(output.outputs[0].token_ids)
    if llm.engine.compiles_after_warmup != compiles:
        raise RuntimeError("something was compiled in the timed window")
    decoded = len(prompts) * (max_tokens - 1)
    return Served(ttft_s, answers, stats.scheduled_tokens - before - decoded)


def measure_ttft(args: argparse.Namespace) -> None:
    """Cold against warm, with one model and one compiled runner."""
    longest = args.system_tokens + args.tail_tokens + args.check_tokens
    config = offline_config(
        {"max_model_len": -(-longest // 128) * 128, "max_num_seqs": 4}
        | engine_options(args, without=_NOT_HERE),
        args.requests,
    )
    model = model_of(config, args.shape)
    resolved, runner = make_runner(config, model, progress=False)
    results = Results("prefix", jax_device(), args.output)

    def engine(*, caches: bool) -> LLM:
        cache = dataclasses.replace(config.cache, enable_prefix_caching=caches)
        mine = dataclasses.replace(config, cache=cache)
        core = make_core(mine, resolved, runner, runner.prepare)
        return LLM.from_engine(make_engine(mine, model, resolved, runner, core))

    def prompts(count: int, seed: int, *, is_shared: bool) -> list[list[int]]:
        size = model.module.config.vocab_size
        return shared_prompts(size, count, args.system_tokens, args.tail_tokens, seed, is_shared=is_shared)

    where = {"model": model.name, "dtype": resolved.dtype, "page_size": resolved.layout.page_size}
    where |= {"system_tokens": args.system_tokens, "tail_tokens": args.tail_tokens}
    total = args.requests * (args.system_tokens + args.tail_tokens)
    try:
        with engine(caches=True) as llm:
            serve(llm, prompts(2, 1, is_shared=False), 1)  # every program has run once
            cold = serve(llm, prompts(args.requests, 2, is_shared=False), 1)
            warm_prompts = prompts(args.requests + 1, 3, is_shared=True)
            serve(llm, warm_prompts[:1], 1)
            warm = serve(llm, warm_prompts[1:], 1)
            medians: dict[str, float] = {}
            for case, served in (("cold", cold), ("warm", warm)):
                medians[case] = statistics.median(served.ttft_s)
                results.add_repeats(case, "ttft_p50_ms", [1e3 * s for s in served.ttft_s], "ms", **where)
                saved = 1.0 - served.num_computed_tokens / total
                results.add(case, "prefill_saved_share", saved, "share", **where)
            results.add("warm", "ttft_ratio", medians["warm"] / medians["cold"], "ratio", **where)
            checked = warm_prompts[1 : 1 + args.check]
            cached = serve(llm, checked, args.check_tokens) if checked else None
        if cached is not None:
            with engine(caches=False) as llm:
                computed = serve(llm, checked, args.check_tokens)
            equal = [a == b for a, b in zip(cached.answers, computed.answers, strict=True)]
            results.add("warm", "tokens_equal_share", sum(equal) / len(equal), "share", **where)
    finally:
        runner.close()


# ---------------------------------------------------------------------- what the tree costs


def measure_tree(args: argparse.Namespace) -> None:
    """Fills a cache with conversations under common system prompts, and times what a request does to it."""
    rng, size = random.Random(args.bench_seed), args.tree_page_size
    systems = [[rng.randrange(50_000) for _ in range(args.system_tokens)] for _ in range(100)]
    pages_each = -(-args.tail_tokens // size) + 1
    num_pages = args.nodes * pages_each + 100 * (args.system_tokens // size + 1) + 10_000
    pool = PagePool(num_pages)
    cache = PrefixCache(pool, size, lambda context: 1.0 + 1e-5 * context)

    def request(index: int) -> Request:
        tail = [rng.randrange(50_000) for _ in range(args.tail_tokens)]
        prompt = [*systems[index % len(systems)], *tail]
        return Request(f"r{index}", prompt, SamplingParams(), float(index), max_tokens=1, seed=0)

    times: dict[str, list[float]] = {"match": [], "enter": [], "leave": [], "evict": []}

    def timed[T](name: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        value = call()
        times[name].append(time.perf_counter() - start)
        return value

    def visit(index: int) -> None:
        one, now = request(index), 0.01 * index
        match = timed("match", lambda: cache.match(one))
        timed("enter", lambda: cache.enter(one, match, now))
        missing = -(-len(one.prompt_token_ids) // size) - len(one.page_ids)
        one.page_ids += pool.allocate(missing)
        one.num_computed_tokens = len(one.prompt_token_ids)
        timed("leave", lambda: cache.leave(one, now, keep=True))
        pool.release(one.page_ids)

    index = 0
    while cache.stats().num_nodes < args.nodes:
        visit(index)
        index += 1
    for values in times.values():
        values.clear()
    for _ in range(args.operations):
        visit(index)
        index += 1
        timed("evict", lambda: cache.evict(1))
    results = Results("prefix", host_device(), args.output)
    where = {"nodes": cache.stats().num_nodes, "page_size": size}
    where |= {"prompt_tokens": args.system_tokens + args.tail_tokens}
    for name, values in times.items():
        microseconds = sorted(1e6 * value for value in values)
        results.add(f"tree-{name}", "p50_us", statistics.median(microseconds), "us", **where)
        results.add(f"tree-{name}", "p99_us", microseconds[int(0.99 * len(microseconds))], "us", **where)


# ---------------------------------------------------------------------- whether it finds what it should


def trie_hit_tokens(trace: Sequence[TraceRequest], page_size: int) -> int:
    """Tokens that requests, one after the other, find of those before them, in whole pages and without limit.

    Counted on the block hashes themselves: a number stands for everything before its block as well.
    """
    seen: set[tuple[int, int]] = set()
    found = 0
    for row in trace:
        blocks = row.block_size // page_size
        names = [
            (row.block_hashes[page // blocks], page % blocks)
            for page in range(row.prompt_tokens // page_size)
        ]
        for name in names[: (row.prompt_tokens - 1) // page_size]:
            if name not in seen:
                break
            found += page_size
        seen.update(names)
    return found


def _traces(args: argparse.Namespace) -> Iterator[tuple[str, list[TraceRequest]]]:
    folder = find_traces(args.traces)
    for name in TRACES:
        path = None if folder is None else folder / f"{name}.jsonl.gz"
        if path is None or not path.is_file():
            print(f"{name}: no trace found (--traces)", file=sys.stderr)
        else:
            yield name, read_trace(path, args.trace_requests)


def measure_traces(args: argparse.Namespace) -> None:
    """Raises RuntimeError if the cache does not find exactly what the trie finds."""
    for name, trace in _traces(args):
        measure_trace(args, name, trace)


def measure_trace(args: argparse.Namespace, name: str, trace: list[TraceRequest]) -> None:
    """One trace: without limit against the trie, then within the memory of one device."""
    label = f"simulated, {host_device()}"
    results = Results("prefix", label, args.output)
    size = args.trace_page_size
    lookups = sum(row.prompt_tokens for row in trace)
    where = {"requests": len(trace), "page_size": size}
    # One at a time, one output token each: a virtual day between two of them.
    alone = [row._replace(arrival_s=86_400.0 * i, output_tokens=1) for i, row in enumerate(trace)]
    pages = sum(-(-(row.prompt_tokens + 1) // size) for row in trace) + 1000
    unlimited = _simulated(alone, size, num_pages=pages, caches=True)
    hits, expected = unlimited.counters["prefix_hit_tokens"][0], trie_hit_tokens(trace, size)
    results.add(name, "hit_tokens", hits, "tokens", **where)
    results.add(name, "trie_hit_tokens", expected, "tokens", **where)
    results.add(name, "hit_share", hits / lookups, "share", **where)
    if hits != expected:
        raise RuntimeError(f"{name}: the cache found {hits:.0f} tokens, a trie finds {expected}")
    paced = [
        row._replace(arrival_s=args.stretch * (row.arrival_s - trace[0].arrival_s))
        for row in trace
        if row.prompt_tokens + row.output_tokens < args.longest
    ]
    where |= {"requests": len(paced), "stretch": args.stretch}
    with_cache = _simulated(paced, size, num_pages=None, caches=True)
    without = _simulated(paced, size, num_pages=None, caches=False)
    lookups = with_cache.counters["prefix_lookup_tokens"][0]
    case = f"{name}-1xH100"
    results.add(case, "hit_share", with_cache.counters["prefix_hit_tokens"][0] / lookups, "share", **where)
    results.add(case, "trie_hit_share", trie_hit_tokens(paced, size) / lookups, "share", **where)
    for label, run in (("with", with_cache), ("without", without)):
        for metric in ("ttft_mean_s", "ttft_p99_s", "output_tok_s"):
            value, unit = run.metrics()[metric]
            results.add(f"{case}-{label}", metric, value, unit, **where)


def measure_evictions(args: argparse.Namespace) -> None:
    """Hits of one request after the other, at the trace's times, in caches that are too small."""
    results = Results("prefix", f"counted, {host_device()}", args.output)
    for name, trace in _traces(args):
        for capacity in _CAPACITIES:
            for policy, horizon_s in _HORIZONS_S.items():
                share = hit_share(trace, capacity, horizon_s)
                where = {"requests": len(trace), "blocks": capacity}
                results.add(f"{name}-{policy}", "hit_share", share, "share", **where)


def hit_share(trace: Sequence[TraceRequest], num_blocks: int, horizon_s: float) -> float:
    """Share of the prompt tokens found by requests that fit; a block of the trace is a page."""
    pool = PagePool(1 + num_blocks)
    size = trace[0].block_size
    cache = PrefixCache(pool, size, lambda context: 1.0, horizon_s)
    for index, row in enumerate(trace):
        num_pages = -(-row.prompt_tokens // size)
        if num_pages > num_blocks:
            continue
        one, now = make_request(index, row, 1), row.arrival_s
        cache.commit(now)
        cache.enter(one, cache.match(one), now)
        missing = num_pages - len(one.page_ids)
        cache.evict(max(0, missing - pool.num_free))
        one.page_ids += pool.allocate(missing)
        one.num_computed_tokens = row.prompt_tokens
        cache.leave(one, now, keep=True)
        pool.release(one.page_ids)
    stats = cache.stats()
    return stats.hit_tokens / stats.lookup_tokens


def measure_two_tiers(args: argparse.Namespace) -> None:
    """Every trace on one tier and on two, with and without preloading."""
    results = Results("prefix", f"simulated, {host_device()}", args.output)
    for name, trace in _traces(args):
        chosen = some_conversations(trace, args.share, args.longest)
        found = trie_hit_tokens(chosen, args.trace_page_size)
        share = found / sum(row.prompt_tokens for row in chosen)
        where = {"requests": len(chosen), "page_size": args.trace_page_size, "share": args.share}
        results.add(f"{name}-unlimited", "trie_hit_share", share, "share", **where)
        measure_tiers(
            results, name, chosen, page_size=args.trace_page_size, host_gib=args.host_gib, share=args.share
        )


def _simulated(
    trace: list[TraceRequest], page_size: int, *, num_pages: int | None, caches: bool
) -> SimulationResult:
    machine = ClusterConfig(page_size=page_size, num_pages=num_pages, enable_prefix_caching=caches)
    cluster = make_cluster(machine, SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=8192))
    return simulate(trace, cluster, SimulationOptions(forces_lengths=True))


def make_parser() -> CommandParser:
    """The bench's own flags, then the engine's."""
    parser = CommandParser(prog="prefix.py", description=__doc__)
    parser.add_argument("--parts", default="ttft,tree", help=f"of {','.join(PARTS)} (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20, help="ttft: requests of each case")
    parser.add_argument("--system-tokens", type=int, default=1024)
    parser.add_argument("--tail-tokens", type=int, default=100)
    parser.add_argument("--check", type=int, default=4, metavar="N", help="ttft: answers compared")
    parser.add_argument("--check-tokens", type=int, default=16, metavar="N", help="ttft: tokens of each")
    parser.add_argument("--nodes", type=int, default=100_000, help="tree: nodes")
    parser.add_argument("--operations", type=int, default=5000, help="tree: of each kind, timed")
    parser.add_argument("--tree-page-size", type=int, default=16)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="trace: folder of the traces")
    parser.add_argument("--trace-requests", type=int, metavar="N", help="trace: so many of each")
    parser.add_argument("--trace-page-size", type=int, default=128, help="trace: divides 512")
    parser.add_argument("--stretch", type=float, default=8.0, help="trace: times multiplied, for one device")
    parser.add_argument("--longest", type=int, default=100_000, help="trace: tokens, for one device")
    parser.add_argument("--share", type=int, default=4, metavar="N", help="tiers: one in N conversations")
    parser.add_argument("--host-gib", type=float, default=400.0, help="tiers: host memory for KV pages")
    parser.add_argument("--bench-seed", type=int, default=0)
    add_shape_flag(parser)
    add_output_flag(parser)
    add_engine_flags(parser, without=_NOT_HERE)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures the parts that are named."""
    parser = make_parser()
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts {unknown[0]}: must be of {', '.join(PARTS)}")
    if args.trace_page_size < 1 or 512 % args.trace_page_size:
        parser.error(f"--trace-page-size {args.trace_page_size}: must divide 512")
    measures = {
        "ttft": measure_ttft,
        "tree": measure_tree,
        "trace": measure_traces,
        "evict": measure_evictions,
        "tiers": measure_two_tiers,
    }
    for part in parts:
        measures[part](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
