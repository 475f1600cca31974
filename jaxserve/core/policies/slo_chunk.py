"""Composition ``slo``: the largest chunk with which every decode keeps its objective."""

from __future__ import annotations

from typing import final

from jaxserve.core.policies.step_search import ChunkSearch
from jaxserve.core.policy import PolicyContext, StepView

SAFETY = 0.9  # of the time that there is
LEAST_CHUNK = 32  # prompts must get on even when every objective is missed


@final
class SloChunk:
    """Searches the chunk on the cost model, against the objective for the time between tokens.

    Token k of a request is due at ``first token + k * objective``; the step may take as long as the most
    pressed decode allows, and never longer than the objective. A deadline that would be missed with no
    prefill at all does not count: nothing is won by starving prompts for it.
    """

    def __init__(self, search: ChunkSearch, tpot_slo_s: float) -> None:
        self._search = search
        self._tpot_slo_s = tpot_slo_s

    @classmethod
    def from_context(cls, context: PolicyContext) -> SloChunk:
        return cls(ChunkSearch.from_context(context), context.config.tpot_slo_s)

    def prefill_tokens(self, view: StepView) -> int:
        if not view.decodes:
            return view.budget_left
        return self._search.largest_within(view, SAFETY * self.allowed_s(view), LEAST_CHUNK)

    def allowed_s(self, view: StepView) -> float:
        """How long the step may take."""
        unavoidable_s, allowed_s = self._search.seconds(view, 0), self._tpot_slo_s
        for request in view.decodes:
            if request.first_token_time is None:
                continue
            token = request.num_tokens - request.num_prompt_tokens - 1  # the one that this step makes
            slack_s = request.first_token_time + token * self._tpot_slo_s - view.now
            if unavoidable_s <= slack_s < allowed_s:
                allowed_s = slack_s
        return allowed_s
