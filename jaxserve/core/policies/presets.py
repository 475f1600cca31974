"""Combinations of policies that have a name."""

from __future__ import annotations

from typing import Any

from jaxserve.core.policies.registry import COMPOSITIONS, ORDERINGS
from jaxserve.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "static": {"batching": "static"},
    "dynamic": {"batching": "dynamic"},
    "latency": {"ordering": "sjf", "max_wait_s": 60.0},
    "balanced": {"ordering": "sjf", "max_wait_s": 8.0},
}


def policy_options(name: str) -> dict[str, Any]:
    """Scheduler options of a preset, an ordering or a composition. Raises ConfigError, listing the names."""
    if name in PRESETS:
        return dict(PRESETS[name])
    if name in ORDERINGS:
        return {"ordering": name}
    if name in COMPOSITIONS:
        return {"composition": name}
    known = ", ".join((*PRESETS, *ORDERINGS, *COMPOSITIONS))
    raise ConfigError(f"policy={name!r}: must be one of {known}")
