"""Pictures of simulated runs; needs matplotlib (the ``bench`` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.simulator.simulation import SimulationResult


def draw(folder: Path, title: str, runs: Mapping[str, SimulationResult]) -> Path:
    """TTFT, TPOT and E2E at every percentile, a line for each policy; returns the file.

    Raises:
        ConfigError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots: need matplotlib (pip install 'jaxserve-engine[bench]')") from None
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes: Any = figure.subplots(1, 3)
    percents = np.linspace(0, 100, 101)
    for name, run in runs.items():
        times = [request.times for request in run.requests]
        panels = (
            [t.ttft for t in times],
            [1e3 * t.tpot for t in times if t.tpot is not None] or [0.0],
            [t.e2e for t in times],
        )
        for axis, values in zip(axes, panels, strict=True):
            axis.plot(percents, np.percentile(values, percents), label=name)
    for axis, label in zip(axes, ("TTFT (s)", "TPOT (ms)", "E2E (s)"), strict=True):
        axis.set_xlabel("percentile of requests")
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "percentiles.png"
    figure.savefig(path, dpi=130)
    return path
