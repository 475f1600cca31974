"""Composition ``partition``: phase partitioning of each step's tokens (Nexus, arXiv 2507.06608, section 4).

Nexus splits the SMs of a GPU; XLA has no such thing, and a TPU neither. The same control law here splits the
tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from jaxserve.core.policies.slo_chunk import LEAST_CHUNK
from jaxserve.core.policies.step_search import ChunkSearch
from jaxserve.core.policy import PolicyContext, StepView

DECODE_SLACK = 1.1  # beta: while memory is ample, decode may be so much slower than alone
PREFILL_SLACK = 1.3  # alpha: while memory is scarce, prefill may be
SCARCE, SCARCE_BAND = 0.70, 0.05  # page occupancy
LEAST_CHANGE = 3  # percent of the budget; smaller moves are not made
WHOLE = 100


@final
class PhasePartition:
    """The prompts' share of the budget, in percent, from a dual objective.

    Pages below 70 % in use: the largest share with which decode stays within 1.1 of its best step time.
    Above: the smallest with which prefill stays within 1.3 of its best rate. Five points of dead band
    between; a share that would change by no more than 3 points stays.
    """

    def __init__(self, search: ChunkSearch) -> None:
        self._search = search
        self._is_scarce = False
        self.share = WHOLE
        self.num_flips = 0
        self.num_changes = 0

    @classmethod
    def from_context(cls, context: PolicyContext) -> PhasePartition:
        return cls(ChunkSearch.from_context(context))

    def prefill_tokens(self, view: StepView) -> int:
        if not view.decodes or view.budget_left <= LEAST_CHUNK:
            return view.budget_left
        self._flip(view.page_occupancy)
        share = self.best_share(view)
        if abs(share - self.share) > LEAST_CHANGE:
            self.share = share
            self.num_changes += 1
        return _chunk(view, self.share)

    def best_share(self, view: StepView) -> int:
        """The share that the objective in force asks for."""

        def decode_s(share: int) -> float:
            return self._search.seconds(view, _chunk(view, share))

        def prefill_s(share: int) -> float:  # of one token
            return decode_s(share) / _chunk(view, share)

        if self._is_scarce:
            limit = PREFILL_SLACK * prefill_s(WHOLE)
            decode_share = largest_share(WHOLE - self.share, lambda own: prefill_s(WHOLE - own) <= limit)
            return WHOLE - decode_share
        limit = DECODE_SLACK * self._search.seconds(view, 0)
        return largest_share(self.share, lambda own: decode_s(own) <= limit)

    def _flip(self, occupancy: float) -> None:
        edge = SCARCE - SCARCE_BAND if self._is_scarce else SCARCE
        if (occupancy > edge) != self._is_scarce:
            self._is_scarce = not self._is_scarce
            self.num_flips += 1


def largest_share(start: int, keeps_other: Callable[[int], bool]) -> int:
    """The largest share of the favoured phase, 0 to 100, with which the other phase keeps its limit.

    Greedy from the share in force: down to where it holds, then up as far as it holds; two to four
    evaluations when little has changed. Right if ``keeps_other`` never turns true again as shares grow.
    """
    share = start
    while share > 0 and not keeps_other(share):
        share -= 1
    while share < WHOLE and keeps_other(share + 1):
        share += 1
    return share


def _chunk(view: StepView, share: int) -> int:
    return max(LEAST_CHUNK, view.budget_left * share // WHOLE)
