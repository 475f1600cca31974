"""What an arm would do to both objectives at a load, as the cost model sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.context import Load
from jaxserve.core.learning.reward import Objectives

_MOST_ROUNDS = 12
_CLOSE = 0.01
_P99_Z = 2.33


class Forecast(NamedTuple):
    """99th percentiles in seconds; infinite for a load that cannot be served."""

    ttft_s: float
    tpot_s: float


_OVERLOADED = Forecast(math.inf, math.inf)


@final
class Guard:
    """Which arms are safe: those with which the cost model predicts both objectives to be met.

    A fluid model. With n decodes a step that has none of a prompt takes D(n), a full one F(n). Of each step's
    time, arriving prompts need the share f = prompt tokens that arrive meanwhile / (budget - n) of full
    steps, so that a step takes D + f (F - D) on average; n follows by Little's law. Time between tokens: that
    mean, and how much it varies over a short request. First token: an M/G/1 queue of prompts,
    served at F / (budget - n) a token, its wait taken for exponential; and the steps of a long prompt. The
    ordering of the queue is not in it: what that does to the tail is left to what is measured.

    Args:
        costs: predicts steps; refined while the engine runs.
        ladder: compiled shapes.
        num_slots: requests that run at once.
        num_cache_tokens: that the KV pages hold.
    """

    def __init__(
        self,
        costs: CostModel,
        ladder: BucketLadder,
        objectives: Objectives,
        *,
        num_slots: int,
        num_cache_tokens: int,
    ) -> None:
        self._costs = costs
        self._ladder = ladder
        self._objectives = objectives
        self._num_slots = num_slots
        self._num_cache_tokens = num_cache_tokens

    def forecasts(self, arms: Sequence[Arm], load: Load) -> list[Forecast]:
        """Of each arm."""
        budgets = dict.fromkeys(arm.max_num_batched_tokens for arm in arms)
        of = {budget: self.forecast(budget, load) for budget in budgets}
        return [of[arm.max_num_batched_tokens] for arm in arms]

    def is_safe(self, forecast: Forecast) -> bool:
        return self._objectives.are_met_by(forecast.ttft_s, forecast.tpot_s)

    def forecast(self, budget: int, load: Load) -> Forecast:
        """With a token budget, at a load."""
        context = load.prompt_tokens + load.output_tokens / 2
        most_rows = min(self._num_slots, self._num_cache_tokens / context)
        step_s = decode_s = full_s = self._decode_s(1.0, context)
        rows = 0.0
        for _ in range(_MOST_ROUNDS):
            rows = load.requests_s * load.output_tokens * step_s
            if rows > most_rows:
                return _OVERLOADED
            decode_s, full_s = self._decode_s(rows, context), self._full_s(rows, context, budget, load)
            prompt_share = load.prompt_tokens_s * (full_s - decode_s) / (budget - rows)
            if prompt_share >= 1.0:
                return _OVERLOADED
            before, step_s = step_s, decode_s / (1.0 - prompt_share)
            if abs(step_s - before) <= _CLOSE * step_s:
                break
        full_share = min(1.0, load.prompt_tokens_s * step_s / (budget - rows))
        deviation = math.sqrt(full_share * (1.0 - full_share) / max(load.short_output - 1.0, 1.0))
        tpot_s = min(full_s, step_s + _P99_Z * deviation * (full_s - decode_s))
        return Forecast(self._ttft_s(budget - rows, step_s, full_s, load), tpot_s)

    def _ttft_s(self, chunk: float, step_s: float, full_s: float, load: Load) -> float:
        token_s = full_s / chunk
        busy = load.prompt_tokens_s * token_s
        if busy >= 1.0:
            return math.inf
        mean_wait_s = load.requests_s * load.prompt_squares * token_s**2 / (2.0 * (1.0 - busy))
        wait_s = mean_wait_s / busy * math.log(100.0 * busy) if busy > 0.01 else 0.0
        return step_s + wait_s + math.ceil(load.long_prompt / chunk) * full_s

    def _decode_s(self, rows: float, context: float) -> float:
        count = max(1, math.ceil(rows))
        bucket = self._ladder.choose_decode(min(count, self._num_slots))
        return self._costs.predict(bucket, StepFeatures(count, round(count * context), 0.0, count))

    def _full_s(self, rows: float, context: float, budget: int, load: Load) -> float:
        count = math.ceil(rows)
        decodes = StepFeatures(count, round(count * context), 0.0, count)
        features = decodes.with_prefill(budget - count, round(load.prompt_tokens / 2))
        return self._costs.predict(self._ladder.choose_mixed(budget), features)
