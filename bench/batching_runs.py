"""Runs one workload under one batching mode at one batch size, and records who sat in which slot."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.measures import RequestTimes, request_times, steady_throughput, summary
from bench.real_engine import check_lengths, generate
from bench.workloads import Item, Workload
from jaxserve.config import Batching, EngineConfig
from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import Bucket, StepPlan, StepResult
from jaxserve.engine.build import LoadedModel, load_model, make_core, make_engine, make_runner
from jaxserve.runner.model_runner import ModelRunner, StepHandle
from jaxserve.runner.resolve import ResolvedConfig

MODES: tuple[Batching, ...] = ("static", "dynamic", "continuous")
IDLE = -1
_LOG = logging.getLogger(__name__)

type SlotTable = npt.NDArray[np.int32]


class TimedStep(NamedTuple):
    """One step: its shape, and the seconds from its launch, or its predecessor's end, to its result."""

    bucket: Bucket
    seconds: float


class Recorder:
    """An executor that passes everything on to a runner, and keeps the plans and when their tokens came."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.plans: list[StepPlan] = []
        self.token_times: list[tuple[float, int]] = []
        self.steps: list[TimedStep] = []
        self._last_end = 0.0

    def dispatch(self, batch: StepBatch) -> StepHandle:
        self.plans.append(batch.plan)
        if len(self.plans) - len(self.steps) == 1:  # nothing was running
            self._last_end = time.monotonic()
        return self._runner.dispatch(batch)

    def collect(self, handle: StepHandle) -> StepResult:
        result = self._runner.collect(handle)
        now = time.monotonic()
        self.steps.append(TimedStep(handle.plan.bucket, now - self._last_end))
        self._last_end = now
        for decode_step in range(len(result.token_ids)):
            rows = sum(row.samples and row.num_tokens > decode_step for row in handle.plan.rows)
            self.token_times.append((now, rows))
        return result


def slot_table(plans: list[StepPlan], num_slots: int) -> SlotTable:
    """int32 [steps, slots]: which request (ids are numbers) was computed in a slot, `IDLE` if none was."""
    table = np.full((len(plans), num_slots), IDLE, np.int32)
    for step, plan in enumerate(plans):
        for row in plan.rows:
            table[step, row.slot] = int(row.request_id)
    return table


def slot_waste_share(table: SlotTable) -> float:
    """Slot-steps in which nothing was computed, neither prompt nor output, as a share of all slot-steps."""
    return float((table == IDLE).mean()) if table.size else 0.0


def step_metrics(steps: list[TimedStep]) -> dict[str, tuple[float, str]]:
    """Mean milliseconds of a decode step and of one with prefill; the latter's share of steps and of time."""
    decode, mixed = (
        [step.seconds for step in steps if step.bucket.is_decode is is_decode] for is_decode in (True, False)
    )
    return {
        "decode_step_ms": (1e3 * statistics.fmean(decode or [0.0]), "ms"),
        "mixed_step_ms": (1e3 * statistics.fmean(mixed or [0.0]), "ms"),
        "mixed_steps_share": (len(mixed) / max(len(steps), 1), "share"),
        "mixed_time_share": (sum(mixed) / max(sum(decode + mixed), 1e-9), "share"),
    }


class Run(NamedTuple):
    """One run of a workload."""

    mode: Batching
    batch_size: int
    times: list[RequestTimes]
    slots: SlotTable
    token_times: list[tuple[float, int]]
    steps: list[TimedStep]

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Name -> (value, unit)."""
        return summary(self.times) | {
            "steady_tok_s": (steady_throughput(self.token_times, self.times), "tokens/s"),
            "slot_waste_share": (slot_waste_share(self.slots), "share"),
            **step_metrics(self.steps),
        }


class Runners:
    """One model, loaded once, and a compiled runner for each batch size; a mode is only another scheduler."""

    def __init__(self, config: EngineConfig, batch_sizes: tuple[int, ...], *, progress: bool) -> None:
        self._config = config
        self.model: LoadedModel = load_model(config, progress=progress)
        self._batch_sizes = batch_sizes
        self._progress = progress
        self._runners: dict[int, tuple[ResolvedConfig, ModelRunner]] = {}

    def prepare(self, max_model_len: int) -> None:
        """Compiles for every batch size, and runs each once: nothing later is done for the first time."""
        page_size = self._config.cache.page_size or self.model.platform.default_page_size
        most = self.model.module.config.max_position_embeddings
        padded_len = min(-(-max_model_len // page_size) * page_size, most)
        self._config = dataclasses.replace(
            self._config, model=dataclasses.replace(self._config.model, max_model_len=padded_len)
        )
        for size in self._batch_sizes:
            config = self._with("continuous", size)
            self._runners[size] = make_runner(config, self.model, progress=self._progress)
            prompt = [1] * min(8, max_model_len - 4)
            self.run("continuous", size, Workload("warm-up", [Item(prompt, 4)] * (size + 1)))

    def run(self, mode: Batching, batch_size: int, workload: Workload) -> Run:
        """Makes the requests at their times and waits for all. Raises RuntimeError if anything compiled."""
        resolved, runner = self._runners[batch_size]
        config = self._with(mode, batch_size)
        recorder = Recorder(runner)
        core = make_core(config, resolved, recorder, runner.prepare)
        engine = make_engine(config, self.model, resolved, runner, core)
        try:
            compiles = engine.compiles_after_warmup
            outputs = generate(engine, workload)
            compiles = engine.compiles_after_warmup - compiles
        finally:
            engine.close()
        if compiles:
            raise RuntimeError(f"{compiles} compilations in the timed window of {mode} at {batch_size}")
        check_lengths(workload, outputs)
        times = [request_times(output) for output in outputs]
        run = Run(
            mode,
            batch_size,
            times,
            slot_table(recorder.plans, resolved.num_slots),
            recorder.token_times,
            recorder.steps,
        )
        _LOG.info("%s, batch %d, %s: %s", mode, batch_size, workload.name, run.metrics())
        return run

    def _with(self, mode: Batching, batch_size: int) -> EngineConfig:
        scheduler = dataclasses.replace(self._config.scheduler, batching=mode, max_num_seqs=batch_size)
        return dataclasses.replace(self._config, scheduler=scheduler)


def offline_config(options: dict[str, Any], num_requests: int) -> EngineConfig:
    """Every request may wait in the queue, and computes all of its prompt, unless options say otherwise.

    Repeated runs have the same prompts, and traces of lengths do not say which prompts begin alike.
    """
    defaults = {"max_queued_requests": num_requests, "enable_prefix_caching": False}
    return EngineConfig.from_flat(defaults | options)
