"""Puts an engine's online learning together: its log, and the energy meter of its devices."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from jaxserve.config import LearningConfig
from jaxserve.core.cost_model import StepCost, StepFeatures
from jaxserve.core.learning.energy import EnergyMeter, modelled_energy
from jaxserve.core.roofline import Roofline
from jaxserve.errors import ConfigError
from jaxserve.files import JsonLinesFile

_LOG = logging.getLogger(__name__)


class LearningLog:
    """The file of choices: read when the engine starts, written a line an epoch, on the engine's thread.

    Attributes:
        records: those that were there, header first.
    """

    def __init__(self, config: LearningConfig) -> None:
        """Opens what the configuration names. Raises ConfigError for a file that is no log, or unwritable."""
        self._file: JsonLinesFile | None = None
        self.records: list[dict[str, Any]] = []
        if config.learning == "off" or config.learning_log is None:
            return
        path = Path(config.learning_log).expanduser()
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # an engine that was killed may have left half a line
            self.records = [json.loads(line) for line in whole.splitlines()]
            self._file = JsonLinesFile(path, keep=len(whole.encode()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"learning_log={config.learning_log!r}: {error}") from None

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)

    def close(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()


@final
class NvmlEnergy:
    """What the drivers of NVIDIA GPUs count.

    Args:
        nvml: the module ``pynvml``.
        indices: of the devices, as NVML numbers them.
    """

    source = "measured"

    def __init__(self, nvml: Any, indices: Sequence[int]) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
        self._start_j = self._total_j()

    def stepped(self, features: StepFeatures, decode_steps: int) -> None:
        pass

    def joules(self, now: float) -> float:
        return self._total_j() - self._start_j

    def _total_j(self) -> float:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1e3


def _nvml_energy(indices: Sequence[int]) -> NvmlEnergy | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        _LOG.info("energy is not measured: pynvml is not installed")
        return None
    try:
        return NvmlEnergy(nvml, indices)
    except nvml.NVMLError as error:  # no driver, or an old device
        _LOG.warning("energy is not measured: NVML says %s", error)
        return None


def make_meter(platform: str, indices: Sequence[int], prior: StepCost, start: float) -> EnergyMeter | None:
    """NVML's counters on GPUs where ``pynvml`` is installed, else a model of a known device, else None.

    Args:
        platform: its name.
        indices: of the engine's devices on their host.
        prior: of the cost model.
        start: seconds on the engine's clock.
    """
    if platform == "gpu":
        meter = _nvml_energy(indices)
        if meter is not None:
            return meter
    return modelled_energy(prior, start) if isinstance(prior, Roofline) else None
