"""Predictors for experiments, made from the true lengths: perfect, noisy, shuffled, constant.

A policy that uses predictions is judged by all four: what a perfect one could gain, what is left with noise,
that the gain comes from the information (a shuffled one destroys it), and what it costs to know nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import final

from jaxserve.core.predictor import LengthPrediction, LengthPredictor
from jaxserve.errors import ConfigError
from jaxserve.request import Request

_NORMAL = NormalDist()
_UPPER = 0.9
_LARGEST_Z = 6.0


@final
class OraclePredictor:
    """Knows every length."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._lengths = lengths

    def predict(self, request: Request) -> LengthPrediction:
        length = float(self._lengths[request.id])
        return LengthPrediction(length, length)

    def observe(self, request: Request) -> None:
        pass


@final
class NoisyPredictor:
    """The true length times log-normal noise of standard deviation ``sigma``, and honest about that sigma.

    A request that has outlived the guess is guessed again: the quantiles of the same log-normal, given that
    it is longer than what was generated.
    """

    def __init__(self, lengths: Mapping[str, int], sigma: float, seed: int) -> None:
        rng = random.Random(seed)
        self._sigma = sigma
        # In order of the mapping: the same trace gets the same noise, whatever order it is served in.
        self._medians = {name: length * rng.lognormvariate(0.0, sigma) for name, length in lengths.items()}

    def predict(self, request: Request) -> LengthPrediction:
        median, generated = self._medians[request.id], len(request.output_token_ids)
        if self._sigma == 0.0:
            return _beyond_generated(request, median, median)
        passed = 0.0
        if generated:
            z = math.log(generated / median) / self._sigma
            passed = _NORMAL.cdf(min(z, _LARGEST_Z))
        middle, upper = (self._quantile(median, passed + share * (1 - passed)) for share in (0.5, _UPPER))
        return _beyond_generated(request, middle, upper)

    def _quantile(self, median: float, probability: float) -> float:
        z = _NORMAL.inv_cdf(min(max(probability, 1e-9), 1 - 1e-9))
        return median * math.exp(self._sigma * z)

    def observe(self, request: Request) -> None:
        pass


@final
class ConstantPredictor:
    """The same length for everybody."""

    def __init__(self, length: float) -> None:
        self._length = length

    def predict(self, request: Request) -> LengthPrediction:
        generated = len(request.output_token_ids)
        length = self._length if generated < self._length else 2.0 * generated
        return _beyond_generated(request, length, length)

    def observe(self, request: Request) -> None:
        pass


def _beyond_generated(request: Request, median: float, upper: float) -> LengthPrediction:
    # Not clipped to max_tokens: where lengths are forced, that is the true length.
    median = max(median, len(request.output_token_ids) + 1.0)
    return LengthPrediction(median, max(upper, median))


def shuffled(lengths: Mapping[str, int], seed: int) -> dict[str, int]:
    """The same lengths, dealt out to other requests at random."""
    values = list(lengths.values())
    random.Random(seed).shuffle(values)
    return dict(zip(lengths, values, strict=True))


type PredictorMaker = Callable[[Mapping[str, int], float, int], LengthPredictor]

# Name -> (true lengths, sigma, seed) -> predictor.
KNOWN_LENGTH_PREDICTORS: dict[str, PredictorMaker] = {
    "oracle": lambda lengths, sigma, seed: OraclePredictor(lengths),
    "noisy": NoisyPredictor,
    "shuffled": lambda lengths, sigma, seed: NoisyPredictor(shuffled(lengths, seed), sigma, seed),
    "constant": lambda lengths, sigma, seed: ConstantPredictor(sum(lengths.values()) / max(len(lengths), 1)),
}


def make_known_length_predictor(
    name: str, lengths: Mapping[str, int], *, sigma: float = 0.7, seed: int = 0
) -> LengthPredictor:
    """One of `KNOWN_LENGTH_PREDICTORS`. Raises ConfigError, listing the names, for one that is unknown."""
    if name not in KNOWN_LENGTH_PREDICTORS:
        raise ConfigError(f"predictor={name!r}: must be one of {', '.join(KNOWN_LENGTH_PREDICTORS)}")
    return KNOWN_LENGTH_PREDICTORS[name](lengths, sigma, seed)
