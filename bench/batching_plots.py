"""The pictures of `batching_modes`: slot timelines, throughput bars, latency percentiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from bench.batching_runs import IDLE, Run, slot_waste_share
from bench.measures import RequestTimes, present, throughput
from jaxserve.config import Batching

_MOST_STEPS = 600  # more would not be seen apart
_COLORS = {"static": "#b07aa1", "dynamic": "#f28e2b", "continuous": "#4e79a7"}
_GREY = (0.80, 0.80, 0.80)
_GREYISH = 0.05  # colours whose channels are this close look like waste
_PALETTE_STRIDE = 7  # neighbours in time get colours far apart


def draw_all(folder: Path, title: str, runs: Mapping[Batching, Sequence[Run]]) -> list[Path]:
    """Draws the three plots of one workload; returns their files.

    Args:
        folder: made if missing.
        title: the workload, and how it arrives.
        runs: the repeated runs of each mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = title.replace(" ", "-").replace(",", "")
    figures = {
        "timeline": timeline({mode: repeats[0] for mode, repeats in runs.items()}, title),
        "throughput": throughput_bars(runs, title),
        "percentiles": percentile_curves(runs, title),
    }
    paths = [folder / f"{stem}-{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def timeline(runs: Mapping[Batching, Run], title: str) -> Figure:
    """One panel a mode: a row is a slot, a column a step, a colour a request; grey computes nothing."""
    figure = Figure(figsize=(11, 2.6 * len(runs)), layout="constrained")
    axes: Any = figure.subplots(len(runs), 1, squeeze=False, sharex=True)
    colors = np.asarray(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    palette = colors[np.ptp(colors, axis=1) > _GREYISH]
    for axis, (mode, run) in zip(axes[:, 0], runs.items(), strict=True):
        shown = run.slots[:_MOST_STEPS].T
        image = palette[(shown * _PALETTE_STRIDE) % len(palette)]
        image[shown == IDLE] = _GREY
        axis.imshow(image, aspect="auto", interpolation="nearest", origin="lower")
        waste = f"{slot_waste_share(run.slots):.0%} of slot-steps wasted"
        axis.set_title(f"{mode}, {run.batch_size} slots: {waste}, {len(run.slots)} steps", loc="left")
        axis.set_ylabel("slot")
    axes[-1, 0].set_xlabel(f"step (the first {_MOST_STEPS} at most)")
    figure.suptitle(f"Who sits in which slot: {title}")
    return figure


def throughput_bars(runs: Mapping[Batching, Sequence[Run]], title: str) -> Figure:
    """Median output tokens per second of each mode, with the range over repeats."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis: Any = figure.subplots()
    for position, (mode, repeats) in enumerate(runs.items()):
        rates = [throughput(run.times) for run in repeats]
        middle = float(np.median(rates))
        spread = [[middle - min(rates)], [max(rates) - middle]]
        axis.bar(position, middle, yerr=spread, capsize=4, color=_COLORS[mode])
        axis.annotate(f"{middle:.0f}", (position, middle / 2), ha="center", color="white")
    axis.set_xticks(range(len(runs)), [f"{mode}\n(batch {r[0].batch_size})" for mode, r in runs.items()])
    axis.set_ylabel("output tokens / s")
    axis.set_title(title)
    return figure


def percentile_curves(runs: Mapping[Batching, Sequence[Run]], title: str) -> Figure:
    """TTFT and TPOT at every percentile, all repeats together."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    percents = np.linspace(0, 100, 101)
    panels: list[tuple[str, Callable[[RequestTimes], float | None], float]] = [
        ("TTFT (s)", lambda t: t.ttft, 1.0),
        ("TPOT (ms)", lambda t: t.tpot, 1e3),
    ]
    for axis, (label, pick, factor) in zip(axes, panels, strict=True):
        for mode, repeats in runs.items():
            values = present(pick(times) for run in repeats for times in run.times)
            if values:
                curve = factor * np.percentile(values, percents)
                axis.plot(percents, curve, label=mode, color=_COLORS[mode])
        axis.set_xlabel("percentile of requests")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    return figure
