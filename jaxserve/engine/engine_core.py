"""The step loop: predict, schedule, prepare, execute, post-process, learn.

One code path for every pipeline depth. At depth 0 a step's result is read before the next is planned; at
depth d, up to d further steps are launched first. Clock, executor, predictor and scheduler are passed in, so
that the simulator runs these same objects with a virtual clock and a cost model as the executor.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxserve.core.batch import Executor, StepBatch
from jaxserve.core.cost_model import CostModel, features_of
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.tuner import QueueState, Tuner
from jaxserve.core.plan import StepPlan, StepResult
from jaxserve.core.predictor import LengthPrediction, LengthPredictor, ProbeReader, ReportingPredictor
from jaxserve.core.probing import Probing
from jaxserve.core.scheduler import Scheduler
from jaxserve.core.updates import StepUpdates
from jaxserve.engine.hidden_recording import HiddenRecorder
from jaxserve.engine.recording import Recorder
from jaxserve.engine.stats import STAGES, BucketStats, EngineStats, StageTimer
from jaxserve.errors import StepFailedError
from jaxserve.request import FinishReason, Request, RequestStatus

_LOG = logging.getLogger(__name__)
_STEP_TIME_WEIGHT = 0.1
_MOST_FAILURES = 3  # steps in a row: an engine that cannot run any must not say that it is ready


class _InFlight[Handle](NamedTuple):
    plan: StepPlan
    handle: Handle
    launched: float


class EngineCore[Handle]:
    """Runs steps. Not thread-safe: one thread adds, ends and steps."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        executor: Executor[Handle],
        prepare: Callable[[StepPlan], StepBatch],
        predictor: LengthPredictor,
        clock: Callable[[], float],
        pipeline_depth: int,
        costs: CostModel | None = None,
        recorder: Recorder | None = None,
        probing: Probing[Any] | None = None,
        hidden_recorder: HiddenRecorder | None = None,
        tuner: Tuner | None = None,
    ) -> None:
        """Puts the parts together.

        Args:
            costs: learns from the steps, if given; the scheduler's policies may hold the same.
            recorder: is told everything that a replay needs, if given.
            probing: looks at running requests' hidden states, if given; a predictor that is a `ProbeReader`
                and the hidden recorder hear of them.
            hidden_recorder: keeps them as training data, if given.
            tuner: chooses the scheduler's arm every epoch, if given.
        """
        self._scheduler = scheduler
        self._executor = executor
        self._prepare = prepare
        self._predictor = predictor
        self._clock = clock
        self._depth = pipeline_depth
        self._costs = costs
        self._recorder = recorder
        self._probing = probing
        self._reader = predictor if isinstance(predictor, ProbeReader) else None
        self._hidden_recorder = hidden_recorder
        self._tuner = tuner
        self._in_flight: deque[_InFlight[Handle]] = deque()
        self._last_collected = clock()
        self._num_failures = 0  # since a result was read
        self.stats = EngineStats()
        self._timers = {stage: StageTimer(self.stats, stage, clock) for stage in STAGES}
        if tuner is not None:
            self.retune(tuner.arm)  # a log that goes on has one

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def prediction_stats(self) -> dict[str, Any] | None:
        """How right the length predictor has been; None if it does not say."""
        predictor = self._predictor
        if not isinstance(predictor, ReportingPredictor):
            return None
        probing = self._probing
        counts = {} if probing is None else {"launches": probing.num_launches, "probes": probing.num_probes}
        return {**predictor.stats(), **counts}

    def learning_stats(self) -> dict[str, Any] | None:
        """What the tuner has done; None without one."""
        return None if self._tuner is None else self._tuner.stats()

    @property
    def has_work(self) -> bool:
        """Whether a step could do anything."""
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Predicts a request's length, so that its place in the queue may depend on it, and queues it.

        Raises what `Scheduler.add` raises.
        """
        now = self._clock()
        with self._timers["predict"]:
            self._predict(request)
        if self._recorder is not None:
            self._recorder.added(request, now)
        self._scheduler.add(request, now)
        if self._tuner is not None:
            self._tuner.arrived(request, now)

    def _predict(self, request: Request) -> None:
        request.predicted_output_tokens, request.predicted_output_upper = self._predictor.predict(request)
        request.note_limit()

    def revise(self, request_id: str, prediction: LengthPrediction) -> None:
        """Gives a live request another prediction, made elsewhere: a replay's."""
        request = self._scheduler.get(request_id)
        if request is not None:
            request.predicted_output_tokens, request.predicted_output_upper = prediction
            request.note_limit()

    def retune(self, arm: Arm) -> None:
        """Puts an arm in force from the next step on: the tuner's, or a replay's."""
        now = self._clock()
        self._scheduler.retune(arm, now)
        if self._recorder is not None:
            self._recorder.retuned(arm, now)

    def end(
        self,
        request_id: str,
        reason: FinishReason,
        *,
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> None:
        """Ends a request if it is alive: an abort, or a stop string found in its text."""
        request = self._scheduler.get(request_id)
        if request is not None:
            now = self._clock()
            if self._recorder is not None:
                self._recorder.ended(request, reason, now)
            self._scheduler.end(request, reason, now, stop_reason=stop_reason, error=error)

    def step(self) -> StepUpdates:
        """Plans and launches one step, reads the oldest result that is due, and returns what changed.

        The *predict* stage runs when a request is added; the other five run here.

        Raises:
            StepFailedError: if the executor has failed several times in a row.
        """
        try:
            return self._step()
        except StepFailedError as error:
            return self._lose_steps(error)

    def _lose_steps(self, error: StepFailedError) -> StepUpdates:
        """Goes on after a step that could not be run: whoever it was for, and all who ran, get the error."""
        now = self._clock()
        if self._recorder is not None:
            self._recorder.lost(now)
        self._num_failures += 1
        if self._num_failures > _MOST_FAILURES:
            raise error
        self._drop_in_flight()
        self._scheduler.lose_device(now, str(error))
        updates = self._finish_step(StepUpdates())
        _LOG.error("%s; it ended %d requests", error, len(updates.ended))
        return updates

    def _step(self) -> StepUpdates:
        timers = self._timers
        with timers["schedule"]:
            now = self._clock()
            plan = self._scheduler.schedule(now)
        if self._recorder is not None:
            self._recorder.planned(plan, now)
        if plan is not None:
            with timers["prepare"]:
                batch = self._prepare(plan)
            with timers["execute"]:
                self._in_flight.append(_InFlight(plan, self._executor.dispatch(batch), self._clock()))
            if self._probing is not None:
                with timers["predict"]:
                    self._probing.dispatched(plan, self._scheduler.get)
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._depth):
            return self._finish_step(StepUpdates())
        with timers["execute"]:
            done = self._in_flight.popleft()
            result = self._executor.collect(done.handle)
        self._num_failures = 0
        with timers["post_process"]:
            now = self._clock()
            updates = self._scheduler.update(result, now)
        with timers["learn"]:
            step_s = self._learn(done, result, now, updates)
        if self._recorder is not None:
            self._recorder.collected(result, updates, now, step_s)
        return self._finish_step(updates)

    def _land(self, probing: Probing[Any], step: int) -> None:
        """Hands out the probes that a step's result shows to be done."""
        for request, probe, result, row in probing.landed(step):
            if self._hidden_recorder is not None and result.states is not None:
                self._hidden_recorder.probed(request, probe.generated, result.states[row])
            if self._reader is None or result.log_remaining is None:
                continue
            if request.status is RequestStatus.RUNNING:  # whoever waits has its place in a queue already
                self._reader.landed(request, probe.generated, result.log_remaining[row].tolist())
                self._predict(request)
                if self._recorder is not None:
                    self._recorder.refreshed(request)
        if self._hidden_recorder is not None:
            self._hidden_recorder.step_done()

    def stop(self, reason: FinishReason, error: str) -> StepUpdates:
        """Ends everything at once, steps in flight included: the engine closes, or its executor failed."""
        self._drop_in_flight()
        self._scheduler.stop(reason, self._clock(), error)
        return self._finish_step(StepUpdates())

    def _drop_in_flight(self) -> None:
        self._in_flight.clear()
        if self._probing is not None:
            self._probing.drop_in_flight()

    def _finish_step(self, updates: StepUpdates) -> StepUpdates:
        updates.ended += self._scheduler.take_ended()
        finished = self.stats.finished
        for request in updates.ended:
            if request.finish_reason is not None:
                reason = request.finish_reason.value
                finished[reason] = finished.get(reason, 0) + 1
                with self._timers["learn"]:
                    self._forget(request)
        return updates

    def _forget(self, request: Request) -> None:
        """Learns what there is to learn from a request that has ended."""
        self._predictor.observe(request)
        if self._tuner is not None:
            self._tuner.finished(request, self._clock())
        if self._probing is not None:
            self._probing.finished(request)
        if self._hidden_recorder is not None:
            self._hidden_recorder.finished(request)
        if self._recorder is not None:
            self._recorder.finished(request)

    def _learn(self, done: _InFlight[Handle], result: StepResult, now: float, updates: StepUpdates) -> float:
        """Counts and learns; returns the seconds that the step took on the device."""
        plan, stats = done.plan, self.stats
        bucket = stats.buckets.setdefault(plan.bucket, BucketStats())
        num_tokens = plan.num_tokens
        stats.steps += 1
        stats.scheduled_tokens += num_tokens
        bucket.steps += 1
        bucket.tokens += num_tokens
        bucket.padded_tokens += plan.num_padded_tokens
        # A step starts on the device when it was launched or when its predecessor was done.
        step_s = result.device_s or now - max(done.launched, self._last_collected)
        self._last_collected = now
        weight = max(_STEP_TIME_WEIGHT, 1.0 / bucket.steps)
        bucket.mean_step_s += weight * (step_s - bucket.mean_step_s)
        decode_steps = len(result.token_ids)
        if decode_steps:  # none if all rows had stopped before
            features = features_of(plan)
            if self._costs is not None:
                self._costs.observe(plan.bucket, features, step_s / decode_steps)
            if self._tuner is not None:
                self._tuner.stepped(features, decode_steps)
        for request in self._scheduler.take_outgrown():
            self._predict(request)
            if self._recorder is not None:
                self._recorder.predicted_again(request)
        if self._probing is not None:
            self._land(self._probing, plan.step)
        stats.output_tokens += len(updates.token_ids)
        if self._tuner is not None and self._tuner.is_due(now):
            self._choose(self._tuner, now)
        return step_s

    def _choose(self, tuner: Tuner, now: float) -> None:
        """Ends an epoch."""
        before, queue = tuner.arm, self._scheduler.stats()
        occupancy = queue.num_used_pages / queue.num_usable_pages
        arm = tuner.choose(now, QueueState(queue.num_waiting, occupancy))
        if arm != before:
            self.retune(arm)
