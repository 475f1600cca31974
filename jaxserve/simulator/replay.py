"""Plays a recording of a running engine again, and compares the plans step by step."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from jaxserve.core.assembly import Assembly, assemble
from jaxserve.core.batch import StepBatch
from jaxserve.core.cost_model import CostModel
from jaxserve.core.learning.arms import Arm
from jaxserve.core.plan import ScheduledRow, StepPlan, StepResult, plan_digest
from jaxserve.core.predictor import LengthPrediction
from jaxserve.core.roofline import prior_from_json
from jaxserve.engine.engine_core import EngineCore
from jaxserve.errors import StepFailedError
from jaxserve.request import FinishReason, Request, SamplingParams
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.executor import STOP_TOKEN
from jaxserve.simulator.instance import without_arrays
from jaxserve.simulator.tokens import BlockTokens

_END: Mapping[str, Any] = {"e": "end of file"}


class Replay(NamedTuple):
    """What a replay found.

    Attributes:
        num_steps: plans compared.
        first_difference: number of the first plan that differs, or None: all are identical.
        plans: those of the replay.
    """

    num_steps: int
    first_difference: int | None
    plans: list[StepPlan]


@final
class _RecordedPredictor:
    """Says again what was predicted then."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._predictions: dict[str, deque[LengthPrediction]] = defaultdict(deque)
        for record in records:
            if record["e"] in ("add", "predict"):
                self._predictions[record["id"]].append(LengthPrediction(*record["predicted"]))

    def predict(self, request: Request) -> LengthPrediction:
        return self._predictions[request.id].popleft()

    def observe(self, request: Request) -> None:
        pass


@final
class _RecordedExecutor:
    """Steps take as long as they took then, and end whom they ended."""

    def __init__(
        self, clock: VirtualClock, records: Sequence[Mapping[str, Any]], contents: Mapping[str, BlockTokens]
    ) -> None:
        self._clock = clock
        self._contents = contents  # request id -> its tokens, those of the output included
        self._results = deque(record for record in records if record["e"] == "done")
        self.plans: list[StepPlan] = []
        self.fails = False

    def dispatch(self, batch: StepBatch) -> StepPlan:
        self.plans.append(batch.plan)
        self._fail()
        return batch.plan

    def _fail(self) -> None:
        if self.fails:
            raise StepFailedError("as recorded")

    def collect(self, handle: StepPlan) -> StepResult:
        self._fail()
        record = self._results.popleft()
        self._clock.advance_to(record["t"])
        token_ids = [
            [self._token(record["stopped"], handle, row, turn) for row in handle.rows]
            for turn in range(1, record["decode_steps"] + 1)
        ]
        bad_rows = tuple((decode_step, row) for decode_step, row in record["bad_rows"])
        arrived = tuple(record["arrived"])
        return StepResult(token_ids, bad_rows=bad_rows, arrived=arrived, device_s=record["step_s"])

    def _token(self, stopped: Mapping[str, int], plan: StepPlan, row: ScheduledRow, turn: int) -> int:
        """What a row samples in a decode step, from 1."""
        if stopped.get(row.request_id) == turn:
            return STOP_TOKEN
        position = row.start + (turn if plan.is_loop else row.num_tokens)
        return self._contents[row.request_id].at(position)


def replay(records: Sequence[Mapping[str, Any]]) -> Replay:
    """Feeds arrivals, ends and step times of a recording to a scheduler put together like the recorded one.

    Args:
        records: as `jaxserve.engine.recording.read_recording` gives them.
    """
    header = records[0]
    clock = VirtualClock(-1.0)
    contents: dict[str, BlockTokens] = {}
    executor = _RecordedExecutor(clock, records, contents)
    costs = CostModel(prior_from_json(header["prior"]))
    core = EngineCore(
        scheduler=assemble(Assembly.from_json(header["assembly"]), costs),
        executor=executor,
        prepare=without_arrays,
        predictor=_RecordedPredictor(records),
        clock=clock,
        pipeline_depth=header["pipeline_depth"],
        costs=costs,
    )
    recorded: list[str] = []
    pages = {record["n"]: record["pages"] for record in records if record["e"] in ("add", "pages")}
    page_size: int = header["assembly"]["page_size"]
    for record, following in itertools.pairwise([*records[1:], _END]):
        if record["e"] in ("add", "end", "plan", "arm"):
            clock.now = record["t"]
        if record["e"] == "add":
            tokens = BlockTokens(pages[record["n"]], page_size, record["prompt_tokens"], -1 - record["n"])
            contents[record["id"]] = tokens
            core.add(_request(record, tokens))
        elif record["e"] == "refresh":
            core.revise(record["id"], LengthPrediction(*record["predicted"]))
        elif record["e"] == "arm":
            core.retune(Arm(**record["arm"]))
        elif record["e"] == "end":
            core.end(record["id"], FinishReason(record["reason"]))
        elif record["e"] == "plan":
            if record["plan"] is not None:
                recorded.append(record["plan"])
            # Whether it failed when it was launched or an older one when it was read: all of them were lost.
            executor.fails = following["e"] == "lost"
            with contextlib.suppress(StepFailedError):  # one too many: the recorded engine ended, too
                core.step()
            difference = _first_difference(recorded, executor.plans)
            if difference is not None:
                return Replay(len(recorded), difference, executor.plans)
    return Replay(len(recorded), None, executor.plans)


def _first_difference(recorded: Sequence[str], plans: Sequence[StepPlan]) -> int | None:
    """Looks at the newest plan only: those before it were compared in their time."""
    newest = max(len(recorded), len(plans)) - 1
    if len(recorded) != len(plans):
        return newest
    return newest if recorded and recorded[-1] != plan_digest(plans[-1]) else None


def _request(record: Mapping[str, Any], tokens: BlockTokens) -> Request:
    return Request(
        id=record["id"],
        prompt_token_ids=tokens,
        params=SamplingParams(max_tokens=None),
        arrival_time=record["arrival"],
        max_tokens=record["max_tokens"],
        seed=0,
        stop_token_ids=frozenset({STOP_TOKEN}),
        client=record["client"],
        priority=record["priority"],
        deadline=record["deadline"],
    )
