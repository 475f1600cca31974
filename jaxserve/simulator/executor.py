"""The simulator's executor: a step takes what the cost model says; time passes when it is awaited."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import repeat
from typing import NamedTuple, Protocol, final

from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import StepFeatures, features_of
from jaxserve.core.plan import Bucket, StepPlan, StepResult
from jaxserve.core.resume_costs import NO_HOST, HostTier
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
        host: memory for preempted requests. Each direction of its link copies one thing after the other,
            beside the steps.
    """

    def __init__(
        self,
        clock: VirtualClock,
        times: StepTimes,
        lengths: Mapping[str, int],
        num_slots: int,
        *,
        host_s: float = 0.0,
        host: HostTier = NO_HOST,
        keep_steps: bool = False,
    ) -> None:
        self._clock = clock
        self._times = times
        self._lengths = lengths
        self._host_s = host_s
        self._host = host
        self._saved_at: dict[int, float] = {}  # block -> when its copy is complete
        self._arrivals: dict[int, float] = {}  # number of a load that has not landed -> when it is here
        self._reported: set[int] = set()
        self._save_link_free_at = self._load_link_free_at = 0.0
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
        if plan.saves or plan.loads or plan.landings:
            start = self._copy(plan, start)
        self._free_at = end = start + step_s
        self.busy_s += step_s
        self.num_dispatched += 1
        self.num_prefill_tokens += 0 if plan.is_loop else features.tokens - features.sequences
        self.num_padded_tokens += plan.num_padded_tokens
        rows = plan.rows
        token_ids: list[list[int]] = []
        for turn in range(1, decode_steps + 1):
            ends = map(operator.add, rows.starts, repeat(turn) if plan.is_loop else rows.num_tokens)
            is_last = map(operator.eq, ends, map(last.__getitem__, rows.slots))
            token_ids.append([STOP_TOKEN if stop else TOKEN for stop in is_last])
        step = SimulatedStep(plan, start, end, token_ids)
        if self.steps is not None:
            self.steps.append(step)
        return step

    def _copy(self, plan: StepPlan, start: float) -> float:
        """Puts a plan's copies on the link; returns when the step may start: when its landings are here."""
        for save in plan.saves:
            begins = max(start, self._save_link_free_at)
            self._save_link_free_at = begins + self._host.copy_s(len(save.blocks))
            self._saved_at |= dict.fromkeys(save.blocks, self._save_link_free_at)
        for load in plan.loads:
            saved_at = max((self._saved_at[block] for block in load.blocks), default=0.0)
            begins = max(self._clock.now, self._load_link_free_at, saved_at)
            self._load_link_free_at = begins + self._host.copy_s(len(load.blocks))
            self._arrivals[load.number] = self._load_link_free_at
        for number in plan.landings:
            start = max(start, self._arrivals.pop(number))
            self._reported.discard(number)
        return start

    def _arrived(self) -> tuple[int, ...]:
        """Loads that are here and were not reported yet."""
        now, reported = self._clock.now, self._reported
        new = [n for n, at in self._arrivals.items() if at <= now and n not in reported]
        reported.update(new)
        return tuple(new)

    def collect(self, handle: SimulatedStep) -> StepResult:
        end, plan, rows = handle.end, handle.plan, handle.plan.rows
        self._clock.advance_to(end)
        chunks = 0
        for index in () if plan.is_loop else range(len(rows) - 1, -1, -1):
            if rows.num_tokens[index] == 1:
                break
            chunks += 1
            request_id = rows.request_ids[index]
            if rows.samples[index] and request_id in self._preempted_at:  # it was, and goes on
                self.gaps.append((end - self._preempted_at.pop(request_id), 1))
        for decode_step in range(len(handle.token_ids)):
            count = sum([length > decode_step for length in rows.num_tokens]) if decode_step else len(rows)
            if count > chunks and self._last_end is not None:  # the tokens of a loop come all at once
                self.gaps.append((end - self._last_end, count - chunks))
            self._last_end = end
            self.token_times.append((end, count))
        arrived = self._arrived() if self._arrivals else ()
        return StepResult(handle.token_ids, arrived=arrived, device_s=end - handle.start)

    def _decode_steps(self, plan: StepPlan) -> int:
        """Decode steps that run: a loop ends when the last of its rows has its last token."""
        if not plan.is_loop:
            return 1
        rows, last = plan.rows, self._last_position
        left = [last[slot] - start for slot, start in zip(rows.slots, rows.starts, strict=True)]
        return max(0, *map(min, rows.num_tokens, left))
