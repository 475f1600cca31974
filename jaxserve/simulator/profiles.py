"""Device profiles by name: those of data sheets, and those fitted to measured steps (`bench/calibrate.py`).

A calibrated profile is a file ``NAME.json``: the device, and for each model that was measured on it the
coefficients of the cost model.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.core.cost_model import CostModel
from jaxserve.core.roofline import DeviceProfile, ModelShape, Roofline, device_profile
from jaxserve.errors import ConfigError

# A bucket that has shown fewer steps hardly saw different contexts: what they cost it cannot say.
_MIN_SAMPLES = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """Steps of one model on a device.

    Attributes:
        num_devices: that shared it.
        costs: what `CostModel.to_json` gave.
        evidence: what was measured and how well the fit predicts, for people.
    """

    model: ModelShape
    num_devices: int
    costs: Mapping[str, Any]
    evidence: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A device, and the models that were measured on it."""

    device: DeviceProfile
    measured: Sequence[MeasuredModel] = ()

    def step_times(self, roofline: Roofline) -> tuple[CostModel, str]:
        """The times of steps, and in words how they are known.

        Buckets that were measured often with a model of this shape take the coefficients found for them.
        """
        times = CostModel(roofline)
        for entry in self.measured:
            if entry.num_devices == roofline.num_devices and entry.model.is_alike(roofline.model):
                often = [bucket for bucket in entry.costs["buckets"] if bucket["samples"] >= _MIN_SAMPLES]
                times.load_json({**entry.costs, "buckets": often})
                return times, f"calibrated on {times.num_samples} steps of {entry.model.name}"
        if self.device.calibrated:
            names = ", ".join(entry.model.name for entry in self.measured)
            return times, f"calibrated on {names}, extrapolated"
        return times, "uncalibrated"


def load_profile(name: str, folder: Path | None = None) -> Profile:
    """A profile by name: from the folder given, those that come with the package, the data sheets.

    Raises:
        ConfigError: for an unknown name, or a file of another format.
    """
    own = importlib.resources.files("jaxserve.simulator") / "calibrated"
    for place in (folder, own):
        file = None if place is None else place / f"{name}.json"
        if file is not None and file.is_file():
            try:
                return profile_from_json(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"profile {name}: {type(error).__name__}: {error}") from None
    try:
        return Profile(device_profile(name))
    except ConfigError as error:
        fitted = sorted(path.name.removesuffix(".json") for path in own.iterdir())
        raise ConfigError(f"{error}, or fitted to measured steps: {', '.join(fitted)}") from None


def profile_from_json(values: Mapping[str, Any]) -> Profile:
    """The inverse of `profile_to_json`."""
    measured = [
        MeasuredModel(
            model=ModelShape(**entry["model"]),
            num_devices=int(entry["num_devices"]),
            costs=entry["costs"],
            evidence=entry["evidence"],
        )
        for entry in values["measured"]
    ]
    return Profile(DeviceProfile(**values["device"]), measured)


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """A profile as plain values."""
    return {
        "device": dataclasses.asdict(profile.device),
        "measured": [dataclasses.asdict(entry) for entry in profile.measured],
    }
