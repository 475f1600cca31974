"""The largest chunk of prompt whose step takes no longer than it may, by search on the cost model."""

from __future__ import annotations

import bisect
from typing import final

from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.core.policy import PolicyContext, StepView

_GRAIN = 16  # tokens; finer chunks save nothing


@final
class ChunkSearch:
    """Prices a step by how much prefill joins its decodes.

    Args:
        costs: predicts steps.
        chunk_sizes: token counts of the compiled shapes for steps with prefill.
        num_rows: rows of those shapes.
    """

    def __init__(self, costs: CostModel, chunk_sizes: tuple[int, ...], num_rows: int) -> None:
        self._costs = costs
        self._sizes = chunk_sizes
        self._num_rows = num_rows

    @classmethod
    def from_context(cls, context: PolicyContext) -> ChunkSearch:
        return cls(context.costs, context.chunk_sizes, context.num_slots)

    def seconds(self, view: StepView, chunk: int) -> float:
        """Predicted time of the step with so many prompt tokens; 0 of them is a decode step."""
        return self._price(self._decodes(view), view.prefill_context, chunk)

    def largest_within(self, view: StepView, budget_s: float, least: int) -> int:
        """The most prompt tokens, at least ``least``, with which the step is predicted to keep the budget."""
        decodes = self._decodes(view)
        low, high = 0, max(0, view.budget_left // _GRAIN)
        while low < high:  # invariant: low fits, high + 1 does not; the price never falls with the chunk
            middle = (low + high + 1) // 2
            if self._price(decodes, view.prefill_context, middle * _GRAIN) <= budget_s:
                low = middle
            else:
                high = middle - 1
        chunk = min(view.budget_left, max(least, low * _GRAIN))
        is_all = low * _GRAIN + _GRAIN > view.budget_left
        if is_all and self._price(decodes, view.prefill_context, view.budget_left) <= budget_s:
            return view.budget_left
        return chunk

    def _decodes(self, view: StepView) -> StepFeatures:
        count = len(view.decodes)
        return StepFeatures(count, sum([r.num_computed_tokens for r in view.decodes]), 0.0, count)

    def _price(self, decodes: StepFeatures, context: int, chunk: int) -> float:
        features = decodes.with_prefill(chunk, context)
        if chunk == 0:
            return self._costs.predict(Bucket(self._num_rows, self._num_rows), features)
        index = min(bisect.bisect_left(self._sizes, features.tokens), len(self._sizes) - 1)
        return self._costs.predict(Bucket(self._sizes[index], self._num_rows), features)
