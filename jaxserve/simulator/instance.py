"""One engine of a simulated cluster: the engine's own step loop, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import numpy as np

from jaxserve.core.assembly import Assembly, assemble
from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import CostModel, StepCost
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.learning.tuner import Tuner
from jaxserve.core.plan import StepPlan
from jaxserve.core.predictor import LengthPredictor
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.recording import Recorder
from jaxserve.request import Request, SamplingParams
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.executor import STOP_TOKEN, CostExecutor, SimulatedStep, StepTimes
from jaxserve.simulator.tokens import BlockTokens
from jaxserve.simulator.trace import TraceRequest

IDLE_POLL_S = 0.001  # as the engine's thread
_NOTHING = np.zeros((0, 0), np.int32)
_STOPS = frozenset({STOP_TOKEN})
_PARAMS = SamplingParams(max_tokens=None)


def without_arrays(plan: StepPlan) -> StepBatch:
    """The *prepare* stage of a device that reads plans."""
    return StepBatch(plan, _NOTHING)


def make_request(index: int, row: TraceRequest, max_tokens: int) -> Request:
    """Request number ``index`` of a trace, as the engine would see it: its length is not in it."""
    return Request(
        id=str(index),
        prompt_token_ids=BlockTokens(row.block_hashes, row.block_size, row.prompt_tokens, -1 - index),
        params=_PARAMS,
        arrival_time=row.arrival_s,
        max_tokens=max_tokens,
        seed=0,
        stop_token_ids=_STOPS,
        client=row.client,
        priority=row.priority,
    )


@final
class Instance:
    """An engine core with a virtual clock; time passes in `run_until`.

    Args:
        assembly: of its scheduler.
        prior: of the cost model that its policies look at; it learns from the simulated steps if ``learns``.
        times: of the steps.
        lengths: request id -> output tokens; read by the executor, and by nobody else here.
        make_tuner: from that cost model; chooses the scheduler's arm every epoch.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        prior: StepCost,
        times: StepTimes,
        lengths: Mapping[str, int],
        predictor: LengthPredictor,
        pipeline_depth: int = 1,
        learns: bool = False,
        host_s: float = 0.0,
        keep_steps: bool = False,
        decision_log: DecisionLog | None = None,
        recorder: Recorder | None = None,
        make_tuner: Callable[[CostModel], Tuner] | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.executor = CostExecutor(
            self.clock,
            times,
            lengths,
            assembly.num_slots,
            host_s=host_s,
            host=assembly.host,
            keep_steps=keep_steps,
        )
        costs = CostModel(prior)
        self.core: EngineCore[SimulatedStep] = EngineCore(
            scheduler=assemble(assembly, costs, decision_log),
            executor=self.executor,
            prepare=without_arrays,
            predictor=predictor,
            clock=self.clock,
            pipeline_depth=pipeline_depth,
            costs=costs if learns else None,
            recorder=recorder,
            tuner=None if make_tuner is None else make_tuner(costs),
        )
        self.finished: list[Request] = []
        self._loads: dict[Request, int] = {}
        self.load_tokens = 0  # prompt and predicted output of what is alive

    def add(self, request: Request) -> None:
        """Joins the queue between two steps, as in the engine: never before its arrival, perhaps later."""
        self.clock.advance_to(request.arrival_time)
        self.core.add(request)
        predicted = request.predicted_output_tokens
        load = request.num_prompt_tokens + int(request.max_tokens if predicted is None else predicted)
        self._loads[request] = load
        self.load_tokens += load

    def run_until(self, time: float) -> None:
        """Steps until the clock has reached ``time``, or there is nothing to do."""
        core, clock, executor = self.core, self.clock, self.executor
        while clock.now < time and core.has_work:
            before = executor.num_dispatched, core.stats.steps
            for request in core.step().ended:
                self.finished.append(request)
                self.load_tokens -= self._loads.pop(request)
            if before == (executor.num_dispatched, core.stats.steps) and core.has_work:
                clock.advance_to(min(clock.now + IDLE_POLL_S, time))
