"""Policies by name; any other name is ``FILE.py:CLASS``, one of the user's own.

Adding one is a file here and its line below; flags, engine and simulator read these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.core.policies.chunked import ChunkedPrefill
from jaxserve.core.policies.continuous import ContinuousAdmission
from jaxserve.core.policies.dlpm import DeficitLongestPrefixMatch
from jaxserve.core.policies.dynamic import DynamicAdmission
from jaxserve.core.policies.fair import VirtualTokenCounters
from jaxserve.core.policies.fcfs import FirstComeFirstServed
from jaxserve.core.policies.latest_victim import LatestVictim
from jaxserve.core.policies.least_urgent_victim import LeastUrgentVictim
from jaxserve.core.policies.lpm import LongestPrefixMatch
from jaxserve.core.policies.mlfq import SkipJoinFeedback
from jaxserve.core.policies.most_remaining_victim import MostRemainingVictim
from jaxserve.core.policies.own import own_policy
from jaxserve.core.policies.partition import PhasePartition
from jaxserve.core.policies.phase_pressure import PhasePressure
from jaxserve.core.policies.predicted_demand import PredictedDemand
from jaxserve.core.policies.priority import ScoredPriority
from jaxserve.core.policies.sjf import ShortestJobFirst
from jaxserve.core.policies.slo_chunk import SloChunk
from jaxserve.core.policies.spf import ShortestPrefillFirst
from jaxserve.core.policies.static import StaticAdmission
from jaxserve.core.policies.strict_priority import StrictPriority
from jaxserve.core.policies.value_victim import ValueVictim
from jaxserve.core.policies.watermark import Watermark
from jaxserve.core.policy import (
    AdmissionPolicy,
    CapacityPolicy,
    CompositionPolicy,
    OrderingPolicy,
    Policies,
    PolicyContext,
    VictimPolicy,
)

ORDERINGS: dict[str, Callable[[PolicyContext], OrderingPolicy]] = {
    "fcfs": lambda context: FirstComeFirstServed(),
    "priority": ScoredPriority.from_context,
    "strict_priority": lambda context: StrictPriority(),
    "sjf": ShortestJobFirst.from_context,
    "mlfq": SkipJoinFeedback.from_context,
    "fair": lambda context: VirtualTokenCounters(),
    "lpm": LongestPrefixMatch.from_context,
    "dlpm": DeficitLongestPrefixMatch.from_context,
    "spf": lambda context: ShortestPrefillFirst(),
}
ADMISSIONS: dict[str, Callable[[PolicyContext], AdmissionPolicy]] = {
    "continuous": lambda context: ContinuousAdmission(),
    "static": lambda context: StaticAdmission(context.num_slots, context.config.batch_window_s),
    "dynamic": lambda context: DynamicAdmission(context.num_slots, context.config.batch_window_s),
}
CAPACITIES: dict[str, Callable[[PolicyContext], CapacityPolicy]] = {
    "watermark": lambda context: Watermark(),
    "predicted": PredictedDemand.from_context,
}
COMPOSITIONS: dict[str, Callable[[PolicyContext], CompositionPolicy]] = {
    "chunked": lambda context: ChunkedPrefill(),
    "slo": SloChunk.from_context,
    "phase": PhasePressure.from_context,
    "partition": PhasePartition.from_context,
}
VICTIMS: dict[str, Callable[[PolicyContext], VictimPolicy]] = {
    "latest": lambda context: LatestVictim(),
    "least_urgent": lambda context: LeastUrgentVictim(),
    "most_remaining": lambda context: MostRemainingVictim(),
    "value": ValueVictim.from_context,
}
# Victim ``auto``: orderings for which the latest is wrong, as they would preempt whom they just admitted.
OWN_VICTIMS = {
    "priority": "least_urgent",
    "strict_priority": "least_urgent",
    "sjf": "most_remaining",
    "mlfq": "most_remaining",
}


def make_policies(context: PolicyContext) -> Policies:
    """The policies that a configuration names. Raises ConfigError for an own one that cannot be made."""
    return Policies(
        ordering=make_ordering(context),
        admission=_make(ADMISSIONS, "batching", context.config.batching, context),
        capacity=make_capacity(context),
        composition=_make(COMPOSITIONS, "composition", context.config.composition, context),
        victim=make_victim(context),
    )


def make_ordering(context: PolicyContext) -> OrderingPolicy:
    """The ordering that a configuration names. Raises ConfigError."""
    return _make(ORDERINGS, "ordering", context.config.ordering, context)


def make_capacity(context: PolicyContext) -> CapacityPolicy:
    """The capacity policy that a configuration names. Raises ConfigError."""
    return _make(CAPACITIES, "capacity", context.config.capacity, context)


def make_victim(context: PolicyContext) -> VictimPolicy:
    """The victim policy that a configuration names, or that goes with its ordering. Raises ConfigError."""
    config = context.config
    name = OWN_VICTIMS.get(config.ordering, "latest") if config.victim == "auto" else config.victim
    return _make(VICTIMS, "victim", name, context)


def _make[P](
    registry: Mapping[str, Callable[[PolicyContext], P]], option: str, name: str, context: PolicyContext
) -> P:
    make = registry.get(name)
    return own_policy(option, name, context) if make is None else make(context)


REGISTRIES: tuple[dict[str, Callable[[PolicyContext], Any]], ...] = (
    ORDERINGS,
    ADMISSIONS,
    CAPACITIES,
    COMPOSITIONS,
    VICTIMS,
)
