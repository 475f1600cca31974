"""`import jaxserve` is cheap: command-line help and host-only programs start without JAX."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 0.5
DEVICE_SIDE = (
    "jax",
    "jaxlib",
    "flax",
    "orbax",
    "jaxserve.models",
    "jaxserve.pallas_kernels",
    "jaxserve.runner",
)


def import_seconds(module: str, cwd: Path) -> float:
    """What `-X importtime` says that the module and all that it imports cost."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    report = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stderr
    (microseconds,) = re.findall(
        rf"^import time:\s*\d+ \|\s*(\d+) \| {re.escape(module)}$", report, re.MULTILINE
    )
    return int(microseconds) / 1e6


def test_importing_is_fast(tmp_path: Path) -> None:
    assert min(import_seconds("jaxserve", tmp_path) for _ in range(3)) < LIMIT_S


@pytest.mark.parametrize("module", ["jaxserve", "jaxserve.core", "jaxserve.config", "jaxserve.cli.main"])
def test_importing_loads_no_device_code(module: str, tmp_path: Path) -> None:
    program = f"import sys, {module}; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in loaded
    assert not set(DEVICE_SIDE) & set(loaded)
