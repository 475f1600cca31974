"""Step times from a recording: the cost model fitted to what a real engine took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.assembly import Assembly
from jaxserve.core.cost_model import CostModel, StepFeatures, features_of
from jaxserve.core.plan import Bucket
from jaxserve.core.roofline import prior_from_json
from jaxserve.errors import ConfigError
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.replay import replay

type Sample = tuple[Bucket, StepFeatures, float]


def samples_of(records: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """(bucket, features, seconds) of every step of a recording.

    Raises:
        ConfigError: if its plans cannot be made again, so that nobody knows what was timed.
    """
    found = replay(records)
    if found.first_difference is not None:
        raise ConfigError(f"recording: plan {found.first_difference} differs in its replay")
    times = [record["step_s"] for record in records if record["e"] == "done"]
    return [
        (plan.bucket, features_of(plan), seconds)
        for plan, seconds in zip(found.plans, times, strict=False)  # the last may never have been read
    ]


def cluster_like(records: Sequence[Mapping[str, Any]], num_engines: int = 1) -> Cluster:
    """Engines like the recorded one, whose steps take what its steps took. Raises ConfigError."""
    prior = prior_from_json(records[0]["prior"])
    times = CostModel(prior, forgetting=1.0)
    samples = samples_of(records)
    times.fit(samples)
    label = f"simulated (calibrated on {len(samples)} steps of a recording)"
    return Cluster(num_engines, Assembly.from_json(records[0]["assembly"]), prior, times, label)
