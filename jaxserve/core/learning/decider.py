"""The state machine behind the choices: what was learnt, whom to trust, and chance by number of the epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, final

from jaxserve.core.learning.context import Float64Array
from jaxserve.core.learning.linucb import ArmPrior, LinUCB

DEFAULT: Final = 0  # index of the arm that the configuration says
BAD_EPOCHS: Final = 2
REST_EPOCHS: Final = 5
EXPLORATION: Final = 0.02


class Decision(NamedTuple):
    """A choice.

    Attributes:
        arm: its index.
        propensity: the probability with which it was taken.
        reason: ``best`` (highest mean and bonus), ``explored`` (by chance), ``rest`` (the default for a
            while, after bad epochs), ``unsafe`` (no arm is known to be safe), ``frozen`` (highest mean).
        means, bonuses: of all arms.
    """

    arm: int
    propensity: float
    reason: str
    means: tuple[float, ...]
    bonuses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


@final
class Decider:
    """Says which arm is next. The same calls give the same decisions: a restart repeats them from its log.

    One choice in fifty is by chance among the safe arms, so that each of them has a propensity above 0 and
    logs can be evaluated off-policy. After two bad epochs in a row the default rests the engine for five.

    Args:
        num_arms: the first is the default.
        seed: of chance.
    """

    def __init__(
        self,
        num_arms: int,
        num_features: int,
        *,
        priors: Sequence[ArmPrior | None] = (),
        seed: int = 0,
    ) -> None:
        self._bandit = LinUCB(num_arms, num_features, priors)
        self._seed = seed
        self._epoch = 0
        self._bad_epochs = 0
        self._rest_epochs = 0

    def learn(self, arm: int, features: Float64Array, reward: float, *, missed: bool) -> bool:
        """Takes in an epoch; returns whether it was bad.

        Bad is one of another arm than the default that missed an objective, and was worth less than the
        default would be at its lower bound: where everybody misses, the default is no refuge.
        """
        is_bad = missed and arm != DEFAULT and not self._may_equal_default(features, reward)
        self._bandit.learn(arm, features, reward)
        self._bad_epochs = self._bad_epochs + 1 if is_bad else 0
        if self._bad_epochs >= BAD_EPOCHS:
            self._bad_epochs, self._rest_epochs = 0, REST_EPOCHS
        return is_bad

    def _may_equal_default(self, features: Float64Array, reward: float) -> bool:
        estimates = self._bandit.estimates(features)
        lower_bound = estimates.means[DEFAULT] - estimates.bonuses[DEFAULT]
        return bool(estimates.plays[DEFAULT] > 0 and reward >= lower_bound)

    def decide(self, features: Float64Array, safe: Sequence[int], *, is_frozen: bool = False) -> Decision:
        """The next arm, for a context and the arms that are safe in it; frozen, that of the highest mean."""
        self._epoch += 1
        estimates = self._bandit.estimates(features)
        means, bonuses = tuple(estimates.means.tolist()), tuple(estimates.bonuses.tolist())
        arm, propensity, reason = self._choose(means, bonuses, safe, is_frozen=is_frozen)
        return Decision(arm, propensity, reason, means, bonuses)

    def _choose(
        self, means: Sequence[float], bonuses: Sequence[float], safe: Sequence[int], *, is_frozen: bool
    ) -> tuple[int, float, str]:
        if self._rest_epochs > 0 and not is_frozen:
            self._rest_epochs -= 1
            return DEFAULT, 1.0, "rest"
        if not safe:
            return DEFAULT, 1.0, "unsafe"
        if is_frozen:
            return max(safe, key=lambda arm: means[arm]), 1.0, "frozen"
        best = max(safe, key=lambda arm: means[arm] + bonuses[arm])
        chance = random.Random(f"{self._seed}/{self._epoch}")
        explores = chance.random() < EXPLORATION
        arm = chance.choice(list(safe)) if explores else best
        share = EXPLORATION / len(safe)
        propensity = share + (1.0 - EXPLORATION if arm == best else 0.0)
        return arm, propensity, "explored" if explores else "best"
