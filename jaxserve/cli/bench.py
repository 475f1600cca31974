"""`jaxserve bench`: the batching benchmark, which is part of the repository and not of the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jaxserve
from jaxserve.errors import ConfigError

_SCRIPT = Path("bench", "batching_modes.py")


def main(argv: list[str]) -> int:
    """Runs the benchmark with these arguments (``--help`` shows its own)."""
    script = Path(jaxserve.__file__).resolve().parents[1] / _SCRIPT
    if not script.is_file():
        raise ConfigError(
            f"the benchmark is {_SCRIPT} in the repository: run jaxserve from a checkout (pip install -e .)"
        )
    spec = importlib.util.spec_from_file_location("batching_modes", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(argv) or 0
