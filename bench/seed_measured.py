"""The article's burst on the device that is there: the measured half of `seed_tables.py`.

All on one model and its kernels; what differs is how requests are batched:

- ``typical-static-32``: batches of 32, prompts padded to the batch's longest, all rows decoded to the batch's
  longest output (only what was asked for counts), host and device taking turns. A server that launches
  kernels one by one would be slower still; that is not imitated.
- ``static-32``: batches of 32 without padding, host and device overlapped.
- ``continuous-N``: N slots, chunked prefill.

Static servers repeat the same batch over and over, so a few batches measure their throughput.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.measures import percentile, throughput
from bench.real_engine import RealEngine, real_engine
from bench.results import Results
from bench.shapes import model_of, prompt_source
from bench.workloads import Item, Workload, with_poisson_arrivals
from jaxserve.config import EngineConfig
from jaxserve.engine.build import LoadedModel
from jaxserve.simulator.trace import uniform

PARTS = ("burst", "ttft")
_ROWS = (32, 64, 128, 256, 384, 512)
TOKENS = (256, 512, 1024, 2048)
_WAVES = 12  # requests for each slot in the burst of as many slots as the static server has
_TTFT_CUT = 0.9


class Sizes(NamedTuple):
    """What is run: numbers of requests, slots, lengths."""

    lengths: tuple[int, int]
    requests: int
    static_batches: int
    batch: int
    slots: tuple[int, ...]
    rates: tuple[float, ...]
    rate_requests: int
    seed: int


class Measured:
    """Runs on the device, and records."""

    def __init__(
        self, results: Results, config: EngineConfig, model: LoadedModel, shape: str | None, sizes: Sizes
    ) -> None:
        self._results = results
        self._config = config
        self._model = model
        self._sizes = sizes
        lengths = uniform(sizes.lengths, sizes.lengths, sizes.requests, sizes.seed)
        prompts = prompt_source(model, shape, None, sizes.seed)
        self._prompts = prompts
        items = [Item(prompts.exactly(row.prompt_tokens), row.output_tokens) for row in lengths]
        low, high = sizes.lengths
        self.burst = Workload(f"seed-burst-{low}-{high}", items)

    def part(self, count: int) -> Workload:
        """The first requests of the burst."""
        return dataclasses.replace(self.burst, items=self.burst.items[:count])

    def engine_config(self, slots: int) -> EngineConfig:
        """An engine of so many slots, with the shapes that these workloads need."""
        budget = self._config.scheduler.max_num_batched_tokens or max(TOKENS[-1], 2 * slots)
        scheduler = dataclasses.replace(
            self._config.scheduler, max_num_seqs=slots, max_num_batched_tokens=budget
        )
        runner = dataclasses.replace(
            self._config.runner,
            row_buckets=(*(n for n in _ROWS if n < slots), slots),
            token_buckets=(*(n for n in TOKENS if slots < n < budget), budget),
        )
        return dataclasses.replace(self._config, scheduler=scheduler, runner=runner)

    def padded(self, workload: Workload) -> Workload:
        """Every batch's requests as long as its longest, prompts and outputs."""
        items: list[Item] = []
        for batch in itertools.batched(workload.items, self._sizes.batch):
            prompt = max(len(item.prompt_token_ids) for item in batch)
            output = max(item.output_tokens for item in batch)
            items += [Item(self._prompts.exactly(prompt), output) for _ in batch]
        return dataclasses.replace(workload, items=items)

    def add(self, case: str, metric: str, value: float, unit: str, why: str, **more: Any) -> None:
        """One measured number, beside the article's if it has one."""
        if "seed" in more:
            more["ratio"] = value / more["seed"]
        self._results.add(
            case, metric, value, unit,
            machine=f"{self._model.name}, {self._model.placement.mesh.size} device(s)",
            evidence="measured", explanation=why, **more,
        )  # fmt: skip

    def rate(self, case: str, engine: RealEngine, workload: Workload, why: str, **scheduler: Any) -> float:
        """Output tokens per second of a burst; recorded."""
        served = engine.serve(workload, recorded=False, **scheduler)
        rate = throughput(served.times)
        self.add(case, "output_tok_s", rate, "tokens/s", why, requests=len(served.times))
        return rate

    def run_burst(self, small: RealEngine) -> dict[str, float]:
        """The batching modes at the static server's number of slots: case -> output tokens/s."""
        batch = self._sizes.batch
        few = self.part(self._sizes.static_batches * batch)
        typical = f"typical-static-{batch}"
        padded = self.padded(few)
        served = small.serve(padded, recorded=False, batching="static", pipeline_depth=0)
        share = few.output_tokens / padded.output_tokens
        rates = {typical: share * throughput(served.times)}
        why = "padded prompts, all rows to the longest output, no overlap; tokens asked for count"
        self.add(typical, "output_tok_s", rates[typical], "tokens/s", why, requests=len(few.items))
        case = f"static-{batch}"
        rates[case] = self.rate(case, small, few, "ragged prompts, overlapped", batching="static")
        case = f"continuous-{batch}"
        rates[case] = self.rate(case, small, self.part(_WAVES * batch), "iteration level, same slots")
        return rates

    def add_ratios(self, rates: dict[str, float]) -> None:
        """Each continuous run over both static servers."""
        batch = self._sizes.batch
        static, typical = rates[f"static-{batch}"], rates[f"typical-static-{batch}"]
        for case, rate in rates.items():
            if case.startswith("continuous"):
                self.add(case, "over_static", rate / static, "ratio", "over the ragged static server")
                why = "over the typical static server; the article says 9"
                self.add(case, "over_typical_static", rate / typical, "ratio", why, seed=9.0)

    def ttfts(self, engine: RealEngine, case: str, **scheduler: Any) -> dict[float, float]:
        """Rate -> P99 TTFT in seconds under independent arrivals; recorded."""
        found: dict[float, float] = {}
        for rate in self._sizes.rates:
            load = with_poisson_arrivals(self.part(self._sizes.rate_requests), rate, self._sizes.seed)
            served = engine.serve(load, recorded=False, **scheduler)
            times = [t.ttft for t in served.times]
            for metric, value in (
                ("ttft_mean_s", sum(times) / len(times)),
                ("ttft_p50_s", percentile(times, 50)),
                ("ttft_p99_s", percentile(times, 99)),
            ):
                why = f"open loop, {rate:g} requests/s, {len(times)} requests"
                self.add(case, metric, value, "s", why, rate=rate)
            found[rate] = percentile(times, 99)
        return found


def run(args: argparse.Namespace, results: Results, config: EngineConfig) -> None:
    """Measures the parts that are named, with the model of ``args.shape`` or the configured one."""
    sizes = Sizes(
        args.lengths, args.requests, args.static_batches, args.batch, args.slots,
        args.rates, args.rate_requests, args.bench_seed,
    )  # fmt: skip
    if config.model.max_model_len is None:
        model_options = dataclasses.replace(config.model, max_model_len=_padded_length(sizes.lengths[1]))
        config = dataclasses.replace(config, model=model_options)
    model = model_of(config, args.shape)
    measured = Measured(results, config, model, args.shape, sizes)
    rates: dict[str, float] = {}
    before: dict[float, float] = {}
    with real_engine(measured.engine_config(sizes.batch), model) as small:
        if "burst" in args.measure:
            rates = measured.run_burst(small)
        if "ttft" in args.measure:
            before = measured.ttfts(small, f"static-{sizes.batch}", batching="static")
    for slots in sizes.slots:
        case = f"continuous-{slots}"
        with real_engine(measured.engine_config(slots), model) as large:
            if rates:
                rates[case] = measured.rate(case, large, measured.burst, "chunked prefill, all at once")
            after = measured.ttfts(large, case) if before else {}
        for rate, seconds in after.items():
            why = f"1 - {case} / static-{sizes.batch} in P99 TTFT, both at {rate:g}/s"
            cut = 1 - seconds / before[rate]
            measured.add(case, "ttft_p99_cut", cut, "share", why, seed=_TTFT_CUT, rate=rate)
    if rates:
        measured.add_ratios(rates)


def _padded_length(longest: int) -> int:
    """Room for a prompt and an output of the longest, in whole pages of any size."""
    return -(-2 * longest // 128) * 128


def parts_of(text: str) -> Sequence[str]:
    """Parses ``burst,ttft`` for argparse."""
    parts = text.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return parts
