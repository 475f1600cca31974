"""Energy of the devices: the interface of a meter, and a model for where there is none."""

from __future__ import annotations

import dataclasses
from typing import Final, Protocol, final

from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.roofline import Roofline


class EnergyMeter(Protocol):
    """Joules that the devices have used."""

    @property
    def source(self) -> str:
        """``measured`` or ``modelled``."""
        ...

    def stepped(self, features: StepFeatures, decode_steps: int) -> None:
        """A step is done: its (mean decode step's) features, and how many decode steps it had."""
        ...

    def joules(self, now: float) -> float:
        """Since the meter was made, up to ``now``; never falls."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class PowerProfile:
    """Watts of a device: idle, and what its memory and its arithmetic add at their peaks."""

    idle_w: float
    memory_w: float
    compute_w: float


# Assumed: the board's rated power (700 W for both), about a tenth of it idle, the rest divided in halves.
POWER_PROFILES: Final = {"H100": PowerProfile(70.0, 315.0, 315.0), "H200": PowerProfile(70.0, 315.0, 315.0)}


@final
class ModelledEnergy:
    """``P = idle + memory MBU + compute MFU``: no measurement, and labelled so.

    MBU and MFU times a step's duration are the seconds that its bytes and operations take at the peaks.
    """

    source = "modelled"

    def __init__(self, roofline: Roofline, power: PowerProfile, start: float) -> None:
        self._roofline = roofline
        self._power = power
        self._start = start
        self._work_j = 0.0

    def stepped(self, features: StepFeatures, decode_steps: int) -> None:
        memory_s, compute_s = self._roofline.least_seconds(features.tokens, features)
        work_j = self._power.memory_w * memory_s + self._power.compute_w * compute_s
        self._work_j += self._roofline.num_devices * decode_steps * work_j

    def joules(self, now: float) -> float:
        return self._roofline.num_devices * self._power.idle_w * (now - self._start) + self._work_j


def modelled_energy(roofline: Roofline, start: float) -> ModelledEnergy | None:
    """The model for a device whose power is assumed; None for another one."""
    names = [name for name in POWER_PROFILES if roofline.device.name.startswith(name)]
    return ModelledEnergy(roofline, POWER_PROFILES[names[0]], start) if names else None
