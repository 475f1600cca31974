"""A cold start: what arms were worth elsewhere (in the simulator), as a file that a tuner loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.context import FEATURES, Float64Array
from jaxserve.core.learning.linucb import ArmPrior
from jaxserve.errors import ConfigError

VERSION = 1
# A simulation counts for so many epochs of an arm, however long it was: it is not the engine itself, and
# what is measured must outweigh it within a window.
MOST_EPOCHS = 60.0


def prior_entry(arm: Arm, contexts: Float64Array, rewards: Float64Array) -> dict[str, Any]:
    """An arm's line in a file, from the epochs in which it was played.

    Args:
        contexts: [epochs, features].
        rewards: [epochs].
    """
    weight = min(1.0, MOST_EPOCHS / max(len(rewards), 1))
    return {
        "arm": arm.to_json(),
        "epochs": len(rewards),
        "mean_reward": float(rewards.mean()) if len(rewards) else None,
        "A": (weight * contexts.T @ contexts).tolist(),
        "b": (weight * contexts.T @ rewards).tolist(),
    }


def prior_to_json(entries: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
    """A file's contents; ``source`` says in words where they come from."""
    return {"version": VERSION, "source": source, "features": list(FEATURES), "arms": list(entries)}


def read_prior(path: Path, arms: Sequence[Arm]) -> list[ArmPrior | None]:
    """What a file knows of each arm; None of one that is not in it.

    Raises:
        ConfigError: for a file that is missing, has another format, or knows none of them.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION or values["features"] != list(FEATURES):
            raise ConfigError(
                f"learning_prior {path}: version={values['version']} with features {values['features']}: "
                f"must be version {VERSION} with {list(FEATURES)}"
            )
        known = {
            Arm(**entry["arm"]): ArmPrior(_matrix(entry["A"], 2), _matrix(entry["b"], 1))
            for entry in values["arms"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"learning_prior {path}: {type(error).__name__}: {error}") from None
    priors = [known.get(arm) for arm in arms]
    if not any(prior is not None for prior in priors):
        names = ", ".join(arm.name for arm in known)
        raise ConfigError(
            f"learning_prior {path}: has {names}; this engine's are {', '.join(a.name for a in arms)}"
        )
    return priors


def _matrix(values: object, num_axes: int) -> Float64Array:
    array = np.array(values, np.float64)
    if array.shape != (len(FEATURES),) * num_axes or not np.isfinite(array).all():
        raise ValueError(
            f"an array of shape {array.shape} where [features]{' x [features]' * (num_axes - 1)} is due"
        )
    return array
