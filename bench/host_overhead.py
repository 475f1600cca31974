"""Host milliseconds per step: what the engine spends beside the model, at many running requests.

    python bench/host_overhead.py --running 64,256

An executor that computes nothing answers at once, so all that is left is ours. Every request decodes one
token a step; with pages of ``--page-size`` tokens each request takes a new page every so many steps, at
steps of its own. Metrics, in CPU milliseconds of the process per step (so a busy machine does not show):

- ``core_ms_per_step``: all of `EngineCore.step` (predict, schedule, prepare, dispatch, post-process, learn);
- ``schedule_ms_per_step``, ``prepare_ms_per_step``, ``update_ms_per_step``: its parts that grow with requests
  (timed in a run of their own);
- ``output_ms_per_step``: detokenising and building a streamed output for every request, on top.

Each is the median over ``--repeats`` runs of ``--steps`` steps.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import sys
import time
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import decoders, models

from bench.results import Results, add_output_flag, host_device, int_list
from jaxserve.config import SchedulerConfig
from jaxserve.core.assembly import Assembly, assemble
from jaxserve.core.batch import StepBatch, prepare
from jaxserve.core.buckets import BucketLadder, default_decode_rows, default_mixed_tokens
from jaxserve.core.cost_model import CostModel, UnknownDevice
from jaxserve.core.plan import StepPlan, StepResult
from jaxserve.core.predictor import MeanLengthPredictor
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.input_processor import RequestGroup
from jaxserve.engine.output_processor import OutputProcessor, TrackedGroup
from jaxserve.loading.tokenizer import SpecialTokens, Tokenizer
from jaxserve.request import Request, SamplingParams

_PROMPT_TOKENS = 16
_VOCAB_SIZE = 256
_WARM_UP_STEPS = 64
_CLOCK = time.process_time


class InstantExecutor:
    """Answers every step at once, with a token id that depends on the row and the step."""

    def __init__(self, num_slots: int) -> None:
        self._rounds = [[(row + turn) % _VOCAB_SIZE for row in range(num_slots)] for turn in range(7)]

    def dispatch(self, batch: StepBatch) -> StepPlan:
        return batch.plan

    def collect(self, handle: StepPlan) -> StepResult:
        turns, rows = range(handle.step, handle.step + handle.num_decode_steps), len(handle.rows)
        return StepResult([self._rounds[turn % len(self._rounds)][:rows] for turn in turns])


class Part:
    """A function whose calls are timed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = _CLOCK()
        try:
            return self._function(*args, **options)
        finally:
            self.seconds += _CLOCK() - start


class Bench:
    """An engine core in steady decode: ``running`` requests, none of which ends within ``steps`` steps."""

    def __init__(self, running: int, steps: int, page_size: int, pipeline_depth: int) -> None:
        self._max_tokens = steps + _WARM_UP_STEPS + pipeline_depth + 2 + running
        pages = -(-(_PROMPT_TOKENS + page_size + self._max_tokens) // page_size)
        budget = running * (_PROMPT_TOKENS + page_size)
        assembly = Assembly(
            scheduler=SchedulerConfig(),
            ladder=BucketLadder(
                default_decode_rows(running, 1), default_mixed_tokens(budget, running), running
            ),
            num_slots=running,
            num_pages=1 + running * pages,
            page_size=page_size,
            watermark_pages=0,
            max_queued_requests=running,
            prefix_caching=True,
            prefix_preloading=True,
        )
        self._costs = CostModel(UnknownDevice())
        self.scheduler = assemble(assembly, self._costs)
        self.parts = {"schedule": Part(self.scheduler.schedule), "update": Part(self.scheduler.update)}
        self.parts["prepare"] = Part(functools.partial(prepare, num_slots=running))
        self._depth = pipeline_depth
        self.outputs = OutputProcessor(lambda request_id, stop: None)
        # Prompts of different lengths: requests outgrow their pages at different steps.
        self._groups = [self._group(index, _PROMPT_TOKENS + index % page_size) for index in range(running)]

    def _group(self, index: int, prompt_tokens: int) -> RequestGroup:
        params = SamplingParams(max_tokens=self._max_tokens, ignore_eos=True)
        prompt = [(index + position) % _VOCAB_SIZE for position in range(prompt_tokens)]
        request = Request(
            id=f"request-{index}",
            prompt_token_ids=prompt,
            params=params,
            arrival_time=0.0,
            max_tokens=self._max_tokens,
            seed=index,
        )
        return RequestGroup(request.id, None, prompt, params, (request,))

    def make_core(self, *, timed_parts: bool) -> EngineCore[StepPlan]:
        """The core, warmed up into steady decode.

        Args:
            timed_parts: wrap scheduler and *prepare* in timers; they cost a little themselves.
        """
        num_slots = len(self._groups)
        if timed_parts:
            self.scheduler.schedule = self.parts["schedule"]  # type: ignore[method-assign]
            self.scheduler.update = self.parts["update"]  # type: ignore[method-assign]
        core: EngineCore[StepPlan] = EngineCore(
            scheduler=self.scheduler,
            executor=InstantExecutor(num_slots),
            prepare=self.parts["prepare"] if timed_parts else functools.partial(prepare, num_slots=num_slots),
            predictor=MeanLengthPredictor(),
            clock=time.monotonic,
            pipeline_depth=self._depth,
            costs=self._costs,
        )
        tokenizer = _tokenizer()
        for group in self._groups:
            self.outputs.add(TrackedGroup(group, True, tokenizer))
            core.add(group.requests[0])
        for _ in range(_WARM_UP_STEPS):
            self.outputs.process(core.step())
        for part in self.parts.values():
            part.seconds = 0.0
        return core


def _tokenizer() -> Tokenizer:
    """One token a letter: real detokenising, no model file."""
    words = [chr(ord("a") + index % 26) * (1 + index // 26) for index in range(_VOCAB_SIZE)]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, SpecialTokens())


def measure(running: int, steps: int, page_size: int, pipeline_depth: int) -> dict[str, float]:
    """CPU milliseconds per step of one run, by metric."""
    core = Bench(running, steps, page_size, pipeline_depth).make_core(timed_parts=False)
    start = _CLOCK()
    for _ in range(steps):
        core.step()
    values = {"core": _CLOCK() - start}
    bench = Bench(running, steps, page_size, pipeline_depth)
    core = bench.make_core(timed_parts=True)
    output_s = 0.0
    for _ in range(steps):
        updates = core.step()
        start = _CLOCK()
        outputs = bench.outputs.process(updates)
        output_s += _CLOCK() - start
        if len(outputs) != running:
            raise RuntimeError(f"{len(outputs)} of {running} requests moved in a step of steady decode")
    values |= {name: part.seconds for name, part in bench.parts.items()} | {"output": output_s}
    return {f"{name}_ms_per_step": 1e3 * seconds / steps for name, seconds in values.items()}


def profile(running: int, steps: int, page_size: int, pipeline_depth: int) -> None:
    """Prints where the time goes, function by function."""
    bench = Bench(running, steps, page_size, pipeline_depth)
    core = bench.make_core(timed_parts=False)
    with cProfile.Profile() as profiler:
        for _ in range(steps):
            bench.outputs.process(core.step())
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)


def main(argv: list[str] | None = None) -> int:
    """Measures every number of running requests asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--running", type=int_list, default=(64, 256), help="numbers of running requests")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median is reported")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--pipeline-depth", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print a profile in place of numbers")
    add_output_flag(parser)
    args = parser.parse_args(argv)
    if args.profile:
        for running in args.running:
            profile(running, args.steps, args.page_size, args.pipeline_depth)
        return 0
    results = Results("host_overhead", host_device(), args.output)
    for running in args.running:
        runs = [
            measure(running, args.steps, args.page_size, args.pipeline_depth) for _ in range(args.repeats)
        ]
        for metric in runs[0]:
            results.add_repeats(f"running-{running}", metric, [run[metric] for run in runs], "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
