"""Combinations of policies that have a name."""

from __future__ import annotations

from typing import Any

from jaxserve.config import OWN_POLICY
from jaxserve.core.policies.own import own_option
from jaxserve.core.policies.registry import COMPOSITIONS, ORDERINGS
from jaxserve.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "static": {"batching": "static"},
    "dynamic": {"batching": "dynamic"},
    "latency": {"ordering": "sjf", "max_wait_s": 60.0},
    "balanced": {"ordering": "sjf", "max_wait_s": 8.0},
}


def policy_options(name: str) -> dict[str, Any]:
    """Scheduler options of a preset, an ordering, a composition, or ``FILE.py:CLASS`` of any kind.

    Raises:
        ConfigError: for another name (it lists those that there are), or a file that has no such policy.
    """
    if name in PRESETS:
        return dict(PRESETS[name])
    if name in ORDERINGS:
        return {"ordering": name}
    if name in COMPOSITIONS:
        return {"composition": name}
    if OWN_POLICY.fullmatch(name):
        return {own_option(name): name}
    known = ", ".join((*PRESETS, *ORDERINGS, *COMPOSITIONS))
    raise ConfigError(f"policy={name!r}: must be one of {known}, or FILE.py:CLASS")
