"""Composition ``phase``: chunks follow the pressure of prompts and decodes, with hysteresis and forecast."""

from __future__ import annotations

import enum
from typing import final

from jaxserve.core.policies.holt import HoltRate
from jaxserve.core.policies.slo_chunk import LEAST_CHUNK, SloChunk
from jaxserve.core.policies.step_search import ChunkSearch
from jaxserve.core.policy import PolicyContext, StepView
from jaxserve.request import Request

PREFILL_PRESSURE, PREFILL_CALM = 1.2, 0.8
DECODE_PRESSURE, PAGE_PRESSURE = 1.0, 0.85
DEAD_BAND = 0.15
MIN_DWELL = 10  # steps
FORECAST_S = 2.0
FINISHING_STEPS = 32


class Phase(enum.Enum):
    """Whom the step is for."""

    BALANCED = "balanced"
    PREFILL_HEAVY = "prefill_heavy"
    DECODE_HEAVY = "decode_heavy"


@final
class PhasePressure:
    """Three phases, entered by pressure and left with a dead band.

    ``p`` is the time to compute all queued prompt tokens, those included that are forecast to come within two
    seconds, in units of the TTFT objective; ``d`` the predicted time of a step with the least chunk, in units
    of the TPOT objective. (With the phase's own chunk, a phase that is for prompts would end itself.)

    - prefill-heavy, p > 1.2 and d < 0.8: chunks take the whole budget.
    - decode-heavy, d > 1 or pages > 85 % (those of decodes about to finish not counted): the least chunk.
    - balanced: the chunk of `SloChunk`.

    A phase lasts at least ten steps, and is left only when its condition fails by 0.15. A chunk is at most
    twice and at least half its predecessor, so that step times change smoothly.
    """

    def __init__(
        self, search: ChunkSearch, *, ttft_slo_s: float, tpot_slo_s: float, forecast_s: float = FORECAST_S
    ) -> None:
        self._search = search
        self._slo = SloChunk(search, tpot_slo_s)
        self._ttft_slo_s = ttft_slo_s
        self._tpot_slo_s = tpot_slo_s
        self._forecast_s = forecast_s
        self._arriving = HoltRate()
        self._dwell = MIN_DWELL
        self._chunk = 0
        self.phase = Phase.BALANCED
        self.num_switches = 0

    @classmethod
    def from_context(cls, context: PolicyContext) -> PhasePressure:
        config = context.config
        search = ChunkSearch.from_context(context)
        return cls(search, ttft_slo_s=config.ttft_slo_s, tpot_slo_s=config.tpot_slo_s)

    def queued(self, request: Request, now: float) -> None:
        self._arriving.add(request.num_tokens, now)

    def admitted(self, request: Request, now: float) -> None:
        pass

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        pass

    def prefill_tokens(self, view: StepView) -> int:
        if not view.decodes:
            self._chunk = view.budget_left
            return view.budget_left
        self._switch(self._prefill_pressure(view), self._decode_pressure(view), _lasting_occupancy(view))
        if self.phase is Phase.PREFILL_HEAVY:
            wanted = view.budget_left
        elif self.phase is Phase.DECODE_HEAVY:
            wanted = LEAST_CHUNK
        else:
            wanted = self._slo.prefill_tokens(view)
        if self._chunk:
            wanted = min(max(wanted, self._chunk // 2), 2 * self._chunk)
        self._chunk = max(LEAST_CHUNK, min(wanted, view.budget_left))
        return min(self._chunk, view.budget_left)

    def _prefill_pressure(self, view: StepView) -> float:
        rate = max(1, view.budget_left) / self._search.seconds(view, view.budget_left)
        queued = view.partial_tokens + view.waiting_tokens
        coming = self._forecast_s * self._arriving.forecast(self._forecast_s, view.now)
        done = self._forecast_s * self._chunk / self._search.seconds(view, self._chunk)
        return max(queued, queued + coming - done) / rate / self._ttft_slo_s

    def _decode_pressure(self, view: StepView) -> float:
        return self._search.seconds(view, min(LEAST_CHUNK, view.budget_left)) / self._tpot_slo_s

    def _switch(self, prefill: float, decode: float, occupancy: float) -> None:
        self._dwell += 1
        if self._dwell < MIN_DWELL:
            return
        phase = next_phase(self.phase, prefill, decode, occupancy)
        if phase is not self.phase:
            self.phase, self._dwell = phase, 0
            self.num_switches += 1


def next_phase(phase: Phase, prefill: float, decode: float, occupancy: float) -> Phase:
    """The phase after ``phase``, which is kept until its condition fails by the dead band."""
    keep = DEAD_BAND if phase is Phase.DECODE_HEAVY else 0.0
    if decode > DECODE_PRESSURE - keep or occupancy > PAGE_PRESSURE - keep:
        return Phase.DECODE_HEAVY
    keep = DEAD_BAND if phase is Phase.PREFILL_HEAVY else 0.0
    if prefill > PREFILL_PRESSURE - keep and decode < PREFILL_CALM + keep:
        return Phase.PREFILL_HEAVY
    return Phase.BALANCED


def _lasting_occupancy(view: StepView) -> float:
    """Page occupancy without the decodes that are predicted to finish within the next steps."""
    finishing = sum(
        1
        for request in view.decodes
        if request.predicted_output_tokens is not None
        and request.predicted_output_tokens - len(request.output_token_ids) <= FINISHING_STEPS
    )
    return view.page_occupancy * (1.0 - finishing / len(view.decodes))
