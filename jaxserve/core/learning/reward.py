"""What an epoch was worth."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

# So that one epoch in which everybody waited for minutes does not outweigh all others.
_MOST_EXCESS = 1.0


class EpochMeasures(NamedTuple):
    """What was seen in an epoch.

    Attributes:
        seconds: that it took.
        num_arrived, num_finished: requests.
        num_unserved: by which the queue grew.
        num_counted: of those finished, those that began while the arm was in force already.
        num_good: of those counted, those within both objectives.
        ttft_p99_s, tpot_p99_s: of those counted; 0 for none.
        output_tokens: of all that finished.
        joules: energy of the devices; None without a meter.
    """

    seconds: float
    num_arrived: int
    num_finished: int
    num_unserved: int
    num_counted: int
    num_good: int
    ttft_p99_s: float
    tpot_p99_s: float
    output_tokens: int
    joules: float | None

    @property
    def joules_per_token(self) -> float | None:
        return None if self.joules is None else self.joules / max(self.output_tokens, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Service-level objectives, and what missing them and spending energy costs.

    Attributes:
        ttft_slo_s, tpot_slo_s: for the time to the first token, and between tokens.
        ttft_weight, tpot_weight, energy_weight: not negative.
    """

    ttft_slo_s: float
    tpot_slo_s: float
    ttft_weight: float = 0.5
    tpot_weight: float = 0.5
    energy_weight: float = 0.0

    def are_met_by(self, ttft_s: float, tpot_s: float) -> bool:
        return ttft_s <= self.ttft_slo_s and tpot_s <= self.tpot_slo_s

    def reward(self, measures: EpochMeasures, usual_joules_per_token: float | None) -> float:
        """Goodput over what could be, less the weighted excess of both 99th percentiles and the energy.

        Goodput over its reference: the share of requests within both objectives, those by which the queue
        grew counted as outside. An excess counts up to the objective itself.

        Args:
            usual_joules_per_token: energy is measured against it; None leaves it out.
        """
        attained = measures.num_good / max(measures.num_counted, 1)
        served = measures.num_finished / max(measures.num_finished + measures.num_unserved, 1)
        reward = attained * served
        reward -= self.ttft_weight * _excess(measures.ttft_p99_s, self.ttft_slo_s)
        reward -= self.tpot_weight * _excess(measures.tpot_p99_s, self.tpot_slo_s)
        if usual_joules_per_token and measures.joules_per_token is not None:
            reward -= self.energy_weight * measures.joules_per_token / usual_joules_per_token
        return reward


def _excess(value: float, objective: float) -> float:
    return min(_MOST_EXCESS, max(0.0, value / objective - 1.0))
