"""Learning in the simulator: a trace under each arm alone, and what that says to begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.config import LearningConfig
from jaxserve.core.cost_model import CostModel
from jaxserve.core.learning.arms import Arm, make_arms
from jaxserve.core.learning.context import FEATURES
from jaxserve.core.learning.energy import modelled_energy
from jaxserve.core.learning.prior import prior_entry, prior_to_json
from jaxserve.core.learning.setup import make_tuner
from jaxserve.core.learning.tuner import Tuner
from jaxserve.core.roofline import Roofline
from jaxserve.errors import ConfigError
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import TraceRequest


class ArmRun(NamedTuple):
    """A trace under one arm; ``epochs`` are the records of a log, header left out."""

    arm: Arm
    result: SimulationResult
    epochs: list[dict[str, Any]]

    @property
    def rewards(self) -> list[float]:
        """Of the epochs in which enough was seen."""
        return [epoch["reward"] for epoch in self.epochs if epoch["learns"]]


def cluster_arms(cluster: Cluster) -> tuple[Arm, ...]:
    """The arms of each of its engines; the first is what the configuration says."""
    assembly = cluster.assembly
    return make_arms(assembly.scheduler, assembly.ladder, assembly.num_slots)


def tuner_maker(
    cluster: Cluster,
    learning: LearningConfig,
    *,
    arms: Sequence[Arm] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    write: Callable[[dict[str, Any]], None] = lambda record: None,
    seed: int = 0,
) -> Callable[[CostModel], Tuner]:
    """What `simulate` makes an engine's tuner with; the rest as `make_tuner` has it."""

    def make(costs: CostModel) -> Tuner:
        meter = modelled_energy(cluster.prior, 0.0) if isinstance(cluster.prior, Roofline) else None
        return make_tuner(
            learning, cluster.assembly, costs, arms=arms, meter=meter, records=records, write=write, seed=seed
        )

    return make


def run_arm(
    trace: Sequence[TraceRequest],
    cluster: Cluster,
    options: SimulationOptions,
    learning: LearningConfig,
    arm: Arm,
) -> ArmRun:
    """Plays one arm from the first request to the last; rewards are measured as for a learner.

    Raises:
        ConfigError: for a cluster of several engines.
    """
    if cluster.num_engines != 1:
        raise ConfigError(f"cluster: has {cluster.num_engines} engines; arms are measured on one")
    records: list[dict[str, Any]] = []
    maker = tuner_maker(cluster, learning, arms=[arm], write=records.append)
    result = simulate(trace, cluster, options, make_tuner=maker)
    return ArmRun(arm, result, records[1:])


def prior_of(runs: Sequence[ArmRun], source: str) -> dict[str, Any]:
    """The contents of a file for ``learning_prior``; several runs of an arm are put together."""
    epochs: dict[Arm, list[tuple[list[float], float]]] = {}
    for run in runs:
        seen = [(epoch["played_features"], epoch["reward"]) for epoch in run.epochs if epoch["learns"]]
        epochs.setdefault(run.arm, []).extend(seen)
    entries = [
        prior_entry(
            arm,
            np.array([features for features, _ in seen]).reshape(-1, len(FEATURES)),
            np.array([reward for _, reward in seen]),
        )
        for arm, seen in epochs.items()
    ]
    return prior_to_json(entries, source)
