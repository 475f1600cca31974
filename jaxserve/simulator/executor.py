"""The simulator's executor: a step takes what the cost model says; time passes when it is awaited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, final

from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import StepFeatures, features_of
from jaxserve.core.plan import Bucket, StepPlan, StepResult
from jaxserve.simulator.clock import VirtualClock

TOKEN, STOP_TOKEN = 0, 1


class StepTimes(Protocol):
    """Says how long steps take: a `CostModel`."""

    def predict(self, bucket: Bucket, features: StepFeatures) -> float: ...


class SimulatedStep(NamedTuple):
    """A step that was dispatched; its token ids are as in `StepResult`."""

    plan: StepPlan
    start: float
    end: float
    token_ids: list[list[int]]


@final
class CostExecutor:
    """Runs steps one after the other, as a device does.

    A step starts when it is dispatched or when its predecessor ends, whichever is later. A request's true
    length is known here and nowhere else: its last token is the stop token.

    Args:
        clock: moved to a step's end when its result is collected.
        times: of the steps.
        lengths: request id -> output tokens.
        num_slots: of the scheduler.
        host_s: of the host's own work a step, which is hidden while the device is busy.
    """

    def __init__(
        self,
        clock: VirtualClock,
        times: StepTimes,
        lengths: Mapping[str, int],
        num_slots: int,
        *,
        host_s: float = 0.0,
        keep_steps: bool = False,
    ) -> None:
        self._clock = clock
        self._times = times
        self._lengths = lengths
        self._host_s = host_s
        self._last_position = [0] * num_slots  # after which a slot's request has its last token
        self._free_at = 0.0
        self._last_end: float | None = None
        self._preempted_at: dict[str, float] = {}
        self.gaps: list[tuple[float, int]] = []  # between tokens, and how many rows had it
        self.token_times: list[tuple[float, int]] = []
        self.steps: list[SimulatedStep] | None = [] if keep_steps else None
        self.num_dispatched = 0
        self.num_prefill_tokens = 0
        self.num_padded_tokens = 0
        self.busy_s = 0.0

    def dispatch(self, batch: StepBatch) -> SimulatedStep:
        plan, last = batch.plan, self._last_position
        for admission in plan.admissions:
            length = self._lengths[admission.request_id]
            last[admission.slot] = admission.num_prompt_tokens + length - 1
        for request_id in plan.preempted_ids:
            self._preempted_at[request_id] = self._clock.now
        features = features_of(plan)
        decode_steps = self._decode_steps(plan)
        step_s = decode_steps * self._times.predict(plan.bucket, features)
        self._clock.now += self._host_s
        start = max(self._clock.now, self._free_at)
        self._free_at = end = start + step_s
        self.busy_s += step_s
        self.num_dispatched += 1
        self.num_prefill_tokens += 0 if plan.is_loop else features.tokens - features.sequences
        self.num_padded_tokens += plan.num_padded_tokens
        step = SimulatedStep(plan, start, end, self._token_ids(plan, decode_steps))
        if self.steps is not None:
            self.steps.append(step)
        return step

    def collect(self, handle: SimulatedStep) -> StepResult:
        end, plan = handle.end, handle.plan
        self._clock.advance_to(end)
        chunks = 0
        for row in () if plan.is_loop else reversed(plan.rows):
            if row[3] == 1:
                break
            chunks += 1
            if row[4] and row[0] in self._preempted_at:  # it goes on after having been preempted
                self.gaps.append((end - self._preempted_at.pop(row[0]), 1))
        for decode_step in range(len(handle.token_ids)):
            rows = sum([row[3] > decode_step for row in plan.rows]) if decode_step else len(plan.rows)
            decodes = rows - chunks
            if decodes and self._last_end is not None:  # the tokens of a loop come all at once
                self.gaps.append((end - self._last_end, decodes))
            self._last_end = end
            self.token_times.append((end, rows))
        return StepResult(handle.token_ids, device_s=end - handle.start)

    def _token_ids(self, plan: StepPlan, decode_steps: int) -> list[list[int]]:
        last = self._last_position
        if plan.is_loop:
            return [
                [STOP_TOKEN if row[2] + turn == last[row[1]] else TOKEN for row in plan.rows]
                for turn in range(1, decode_steps + 1)
            ]
        return [[STOP_TOKEN if row[2] + row[3] == last[row[1]] else TOKEN for row in plan.rows]]

    def _decode_steps(self, plan: StepPlan) -> int:
        """Decode steps that run: a loop ends when the last of its rows has its last token."""
        if not plan.is_loop:
            return 1
        last = self._last_position
        return max(0, *[min(row.num_tokens, last[row.slot] - row.start) for row in plan.rows])
