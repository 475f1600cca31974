"""LinUCB (Li et al., WWW 2010, algorithm 1) over a sliding window: a linear model of each arm's reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np

from jaxserve.core.learning.context import Float64Array

WINDOW = 200  # epochs
ALPHA = 0.6


class ArmPrior(NamedTuple):
    """What is known of an arm before it was played.

    Attributes:
        gram: sum of x x^T over epochs elsewhere, [features, features].
        moment: sum of reward x, [features].
    """

    gram: Float64Array
    moment: Float64Array


class Estimates(NamedTuple):
    """Of each arm in one context, [arms].

    Attributes:
        means: expected rewards.
        bonuses: for what is not known about them.
        plays: epochs that they come from, those of the prior included.
    """

    means: Float64Array
    bonuses: Float64Array
    plays: Float64Array


@final
class LinUCB:
    """``A = I + sum x x^T`` and ``b = sum r x`` over the last epochs and the prior, which does not slide out.

    Rewards are centred on the mean of all: a ridge regression draws what it does not know towards 0, and an
    arm that nobody has played is then taken for an ordinary one and not for a worthless one. The first
    feature must be 1. Every choice is a fresh solve: nothing drifts, and a restart gets the same bits.
    """

    def __init__(self, num_arms: int, num_features: int, priors: Sequence[ArmPrior | None] = ()) -> None:
        self._num_arms, self._num_features = num_arms, num_features
        self._gram = np.zeros((num_arms, num_features, num_features))
        self._moment = np.zeros((num_arms, num_features))
        for arm, prior in enumerate(priors):
            if prior is not None:
                self._gram[arm], self._moment[arm] = prior
        self._arms = np.full(WINDOW, -1)  # played in each epoch of the window, in a ring
        self._squares = np.zeros((WINDOW, num_features * num_features))
        self._rewarded = np.zeros((WINDOW, num_features))
        self._next = 0
        self._sums: tuple[Float64Array, Float64Array] | None = None  # until the next epoch

    def learn(self, arm: int, features: Float64Array, reward: float) -> None:
        """Adds an epoch."""
        self._arms[self._next] = arm
        self._squares[self._next] = np.outer(features, features).ravel()
        self._rewarded[self._next] = reward * features
        self._next = (self._next + 1) % WINDOW
        self._sums = None

    def estimates(self, features: Float64Array) -> Estimates:
        """Of all arms in a context, [features]."""
        if self._sums is None:
            is_of = (self._arms == np.arange(self._num_arms)[:, None]).astype(np.float64)
            squares = (is_of @ self._squares).reshape(self._gram.shape)
            self._sums = self._gram + squares, self._moment + is_of @ self._rewarded
        gram, moment = self._sums
        plays = gram[:, 0, 0]
        mean = float(moment[:, 0].sum() / max(plays.sum(), 1e-9))
        inverse = np.linalg.inv(gram + np.eye(self._num_features))
        projected = inverse @ features  # [arms, features]
        means = mean + ((moment - mean * gram[:, :, 0]) * projected).sum(1)
        bonuses = ALPHA * np.sqrt(np.maximum(projected @ features, 0.0))
        return Estimates(means, bonuses, plays)
