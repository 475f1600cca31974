"""Victim ``value``: the most predicted remaining work for the seconds that resuming costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.core.policy import PolicyContext
from jaxserve.core.resume_costs import ResumeCosts
from jaxserve.request import Request


@final
class ValueVictim:
    """Who would keep its pages longest, for what computing or copying them back costs, whichever is less.

    Like ``most_remaining`` it never chooses the one with the smallest value while another runs, so somebody
    always finishes. A request that has outlived its prediction has more to come than one token: as much
    again as the upper quantile of what was predicted says.
    """

    def __init__(self, costs: ResumeCosts) -> None:
        self._costs = costs

    @classmethod
    def from_context(cls, context: PolicyContext) -> ValueVictim:
        return cls(context.resume)

    def choose(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=self._value)

    def _value(self, request: Request) -> float:
        predicted = request.predicted_output_tokens
        expected = float(request.max_tokens) if predicted is None else predicted
        generated = len(request.output_token_ids)
        if generated >= expected:
            expected = min(request.predicted_output_upper, float(request.max_tokens))
        return max(1.0, expected - generated) / self._costs.resume_s(request)
