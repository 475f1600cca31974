"""Step times from recordings: the cost model, and a device's profile, fitted to what a real engine took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.core.assembly import Assembly
from jaxserve.core.cost_model import CostModel, StepFeatures, features_of
from jaxserve.core.nnls import nnls
from jaxserve.core.plan import Bucket
from jaxserve.core.roofline import DeviceProfile, ModelShape, Roofline, prior_from_json
from jaxserve.errors import ConfigError
from jaxserve.simulator.cluster import Cluster
from jaxserve.simulator.replay import replay

type Sample = tuple[Bucket, StepFeatures, float]

_LEAST_STEPS = 16
_MOST_ROUNDS = 50


def samples_of(records: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """(bucket, features, seconds) of every step of a recording; of a loop those of its mean decode step.

    Raises:
        ConfigError: if its plans cannot be made again, so that nobody knows what was timed.
    """
    found = replay(records)
    if found.first_difference is not None:
        raise ConfigError(f"recording: plan {found.first_difference} differs in its replay")
    results = [record for record in records if record["e"] == "done"]
    return [
        (plan.bucket, features_of(plan), result["step_s"] / result["decode_steps"])
        for plan, result in zip(found.plans, results, strict=False)  # the last may never have been read
        if result["decode_steps"]  # else all of its rows had stopped before
    ]


def cluster_like(*recordings: Sequence[Mapping[str, Any]], num_engines: int = 1) -> Cluster:
    """Engines like the one that was recorded last; steps take what theirs took in all. Raises ConfigError."""
    header = recordings[-1][0]
    prior = prior_from_json(header["prior"])
    times = CostModel(prior, forgetting=1.0)
    samples = [sample for records in recordings for sample in samples_of(records)]
    times.fit(samples)
    label = f"simulated (calibrated on {len(samples)} steps of a recording)"
    return Cluster(num_engines, Assembly.from_json(header["assembly"]), prior, times, label)


def observed_device(
    name: str, memory_bytes: float, model: ModelShape, num_devices: int, samples: Sequence[Sample]
) -> DeviceProfile:
    """A device without a data sheet: its peaks are the best rates of all steps, its links unknown."""
    unit = DeviceProfile(
        name, 1.0, 1.0, memory_bytes, 1.0, 1.0, 1.0, 0.0, 0.0, False, "peaks: the best of all steps"
    )
    ideal = Roofline(unit, model, num_devices)
    rates = [
        [amount / seconds for amount in ideal.least_seconds(features.tokens, features)]
        for _, features, seconds in samples
    ]
    memory_bytes_s, peak_flops = (max(column) for column in zip(*rates, strict=True))
    return dataclasses.replace(unit, peak_flops=peak_flops, memory_bytes_s=memory_bytes_s)


def fit_device(
    device: DeviceProfile, model: ModelShape, num_devices: int, samples: Sequence[Sample]
) -> DeviceProfile:
    """The profile whose roofline is nearest to measured steps, by least squares on relative errors.

    Fits the overhead of a step and the shares of both peaks; what collectives take stays as it was. A step
    is bound by memory or by arithmetic as the last fit says, until none changes sides.

    Raises:
        ConfigError: for too few samples.
    """
    if len(samples) < _LEAST_STEPS:
        raise ConfigError(f"samples: {len(samples)} steps, a profile needs {_LEAST_STEPS}")
    ideal = Roofline(device, model, num_devices)
    least = np.array([ideal.least_seconds(bucket.tokens, features) for bucket, features, _ in samples])
    seconds = np.array([s - ideal.collective_seconds(bucket.tokens) for bucket, _, s in samples])
    weights = 1.0 / np.array([s for _, _, s in samples])
    slopes = np.array([1.0 / device.memory_efficiency, 1.0 / device.flops_efficiency])
    overhead_s, bound_by = 0.0, np.full(len(samples), -1)
    for _ in range(_MOST_ROUNDS):
        before, bound_by = bound_by, np.argmax(least * slopes, axis=1)
        if (bound_by == before).all():
            break
        columns = [np.ones_like(seconds), *(least[:, side] * (bound_by == side) for side in (0, 1))]
        matrix, target = np.stack(columns, axis=1) * weights[:, None], seconds * weights
        fitted = nnls(matrix.T @ matrix, matrix.T @ target)
        is_used = matrix[:, 1:].any(axis=0)
        slopes = np.where(is_used, np.maximum(1.0, fitted[1:]), slopes)  # no share is above one
        rest = seconds - (least * slopes).max(axis=1)
        overhead_s = max(0.0, float((rest * weights**2).sum() / (weights**2).sum()))
    return dataclasses.replace(
        device,
        memory_efficiency=float(1.0 / slopes[0]),
        flops_efficiency=float(1.0 / slopes[1]),
        step_overhead_s=overhead_s,
        calibrated=True,
    )
