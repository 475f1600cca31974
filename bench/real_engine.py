"""The real engine as a bench drives it: one model, one compiled runner, another scheduler for each run."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.measures import RequestTimes, request_times
from bench.workloads import Item, Workload
from jaxserve.config import EngineConfig, LearningConfig
from jaxserve.core.known_lengths import make_known_length_predictor
from jaxserve.core.policies.own import METHODS
from jaxserve.core.predictor import LengthPredictor
from jaxserve.core.probing import Probing
from jaxserve.engine.build import (
    Engine,
    LoadedModel,
    device_prior,
    make_core,
    make_engine,
    make_runner,
)
from jaxserve.engine.journals import Journals
from jaxserve.engine.learning import LearningLog
from jaxserve.engine.prediction import make_prediction
from jaxserve.engine.recording import read_recording
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.resolve import ResolvedConfig
from jaxserve.simulator.trace import TraceRequest

_WARM_UP_PROMPT, _WARM_UP_OUTPUT = 8, 4


class Served(NamedTuple):
    """One run of the real engine.

    Attributes:
        times: of each request, in the order of the workload.
        records: the run's recording; empty if it was not recorded.
        stats: of the engine when all had ended.
    """

    times: list[RequestTimes]
    records: list[dict[str, Any]]
    stats: dict[str, Any]


class RealEngine:
    """Serves workloads; the scheduler of each run is made anew from the options given."""

    def __init__(self, config: EngineConfig, model: LoadedModel, *, progress: bool = False) -> None:
        self._config = config
        self._model = model
        self._probes = make_prediction(config, model).probes
        made: tuple[ResolvedConfig, ModelRunner] = make_runner(
            config, model, probes=self._probes, progress=progress
        )
        self.resolved, self._runner = made
        items = [Item([1] * _WARM_UP_PROMPT, _WARM_UP_OUTPUT)] * (self.resolved.num_slots + 1)
        self.serve(Workload("warm-up", items), recorded=False)

    def serve(
        self,
        workload: Workload,
        *,
        predictor: LengthPredictor | None = None,
        recorded: bool = True,
        learning: LearningConfig | None = None,
        **scheduler: Any,
    ) -> Served:
        """Makes the requests at their times and waits for all.

        Args:
            predictor: of output lengths, which is shown no hidden states; by default a new one of the
                configured kind, with the configured head.
            recorded: keep everything that a replay needs; costs the host a little every step.
            learning: of this run; by default as configured.
            scheduler: fields of `SchedulerConfig` in place of the configured ones.

        Raises:
            RuntimeError: if anything compiled, or a request did not get all of its tokens.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording.jsonl"
            options = dataclasses.replace(
                self._config.scheduler, record=str(path) if recorded else None, **scheduler
            )
            config = dataclasses.replace(
                self._config, scheduler=options, learning=learning or self._config.learning
            )
            outputs, stats = self._generate(config, workload, predictor)
            return Served(
                [request_times(output) for output in outputs],
                read_recording(path, [getattr(options, option) for option in METHODS]) if recorded else [],
                stats,
            )

    def _generate(
        self, config: EngineConfig, workload: Workload, predictor: LengthPredictor | None
    ) -> tuple[list[RequestOutput], dict[str, Any]]:
        journals, choices = Journals(config.scheduler), LearningLog(config.learning)
        prediction = make_prediction(config, self._model)
        interval = config.prediction.probe_interval
        core = make_core(
            config, self.resolved, self._runner, self._runner.prepare,
            prior=device_prior(self._model, self.resolved),
            predictor=predictor or prediction.predictor,
            probing=Probing(self._runner, interval) if self._probes and predictor is None else None,
            journals=journals, learning_log=choices,
        )  # fmt: skip
        engine = make_engine(config, self._model, self.resolved, self._runner, core, on_close=journals.close)
        try:
            compiles = engine.compiles_after_warmup
            outputs = generate(engine, workload)
            compiles = engine.compiles_after_warmup - compiles
            stats = engine.stats()
        finally:
            engine.close()
            choices.close()
        if compiles:
            raise RuntimeError(f"{compiles} compilations in the timed window of {workload.name}")
        check_lengths(workload, outputs)
        return outputs, stats

    def close(self) -> None:
        """Frees the device's memory, but for the model's."""
        self._runner.close()


@contextlib.contextmanager
def real_engine(config: EngineConfig, model: LoadedModel, *, progress: bool = False) -> Generator[RealEngine]:
    """An engine that is closed at the end, so that another can have its memory."""
    engine = RealEngine(config, model, progress=progress)
    try:
        yield engine
    finally:
        engine.close()


def generate(engine: Engine, workload: Workload) -> list[RequestOutput]:
    """Submits every request at its arrival time, whatever became of those before (open loop)."""
    inbox: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
    start = time.monotonic()
    for index, item in enumerate(workload.items):
        delay = start + item.arrival_s - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        params = SamplingParams(
            temperature=item.temperature,
            top_p=item.top_p,
            seed=index,
            max_tokens=item.output_tokens,
            ignore_eos=not item.stops,
        )
        group = engine.inputs.from_prompt(item.prompt_token_ids, params, request_id=str(index))
        engine.loop.submit(group, inbox.put, streams=False)
    outputs: dict[str, RequestOutput] = {}
    while len(outputs) < len(workload.items):
        outputs |= {output.request_id: output for output in inbox.get()}
    return [outputs[str(index)] for index in range(len(workload.items))]


def check_lengths(workload: Workload, outputs: Sequence[RequestOutput]) -> None:
    """Raises RuntimeError if a request that does not stop by itself lacks tokens."""
    for item, output in zip(workload.items, outputs, strict=True):
        if not item.stops and len(output.outputs[0].token_ids) != item.output_tokens:
            raise RuntimeError(f"{output} should have had {item.output_tokens} tokens")


def noisy(workload: Workload, seed: int) -> LengthPredictor:
    """Predictions with noise of sigma 0.7, as the simulator draws them."""
    lengths = {str(index): item.output_tokens for index, item in enumerate(workload.items)}
    return make_known_length_predictor("noisy", lengths, sigma=0.7, seed=seed)


def arrivals(records: Sequence[Mapping[str, Any]]) -> list[TraceRequest]:
    """The requests of a recording, in the order of their numbers, at the times at which they came."""
    added = sorted((r for r in records if r["e"] == "add"), key=lambda record: int(record["id"]))
    start = min(record["arrival"] for record in added)
    return [TraceRequest(r["arrival"] - start, r["prompt_tokens"], r["max_tokens"]) for r in added]
