"""Where numbers go: one JSON object a line, on stdout and in the file that ``--output`` names.

Every line has bench, case, metric, value, unit, device, jax and commit; a bench may add fields of its own
(``min`` and ``max`` over repeats, ``dtype``), never rename these.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("bench", "case", "metric", "value", "unit", "device", "jax", "commit")
_DIGITS = 5


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside of a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def host_device() -> str:
    """The processor, in words, for numbers that no accelerator has a part in."""
    return f"cpu ({_cpu_name()}, {os.cpu_count()} cores)"


def jax_device() -> str:
    """What JAX runs on, in words; starts its backend."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return host_device()
    return f"{len(devices)} x {devices[0].device_kind}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def jax_version() -> str | None:
    """The installed version, without importing it."""
    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """Emits records of one bench as they come, so that a run that is cut short has said what it knew."""

    def __init__(self, bench: str, device: str, output: Path | None, *, prints: bool = True) -> None:
        self._common: dict[str, Any] = {"device": device, "jax": jax_version(), "commit": commit()}
        self._bench = bench
        self._output = output
        self._prints = prints
        self.records: list[dict[str, Any]] = []

    def add(self, case: str, metric: str, value: float, unit: str, **more: Any) -> None:
        """Emits one number. Raises ValueError if it is not finite: a broken run has no result."""
        if not math.isfinite(value):
            raise ValueError(f"{self._bench} {case} {metric}={value}: not a finite number")
        record = {
            "bench": self._bench,
            "case": case,
            "metric": metric,
            "value": _rounded(value),
            "unit": unit,
        }
        record |= self._common | more
        self.records.append(record)
        line = json.dumps(record)
        if self._prints:
            print(line, flush=True)
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            with self._output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def add_repeats(self, case: str, metric: str, values: Sequence[float], unit: str, **more: Any) -> None:
        """Emits the median of repeated runs, with their minimum, maximum and number."""
        spread = {"min": _rounded(min(values)), "max": _rounded(max(values)), "repeats": len(values)}
        self.add(case, metric, statistics.median(values), unit, **spread, **more)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of result files. Raises ValueError, naming the line, for one that is malformed."""
    records: list[dict[str, Any]] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            missing = [field for field in FIELDS if field not in record]
            if missing:
                raise ValueError(f"{path}:{number}: no field {', '.join(missing)}")
            records.append(record)
    return records


def add_output_flag(parser: argparse.ArgumentParser) -> None:
    """``--output``, the same for every bench."""
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON lines to this file as well"
    )


def int_list(text: str) -> tuple[int, ...]:
    """Parses ``8,16,32`` for argparse."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers like 8,16,32")
    return numbers


def float_list(text: str) -> tuple[float, ...]:
    """Parses ``0.5,0.8`` for argparse."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0.0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers like 0.5,0.8")
    return numbers
