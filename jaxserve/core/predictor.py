"""Output-length prediction: the *predict* stage, and its part of the *learn* stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

from jaxserve.request import FinishReason, Request


class LengthPrediction(NamedTuple):
    """Quantiles of the whole output's length, in tokens, given what was generated so far."""

    median: float
    upper: float  # exceeded by one request in ten


class LengthPredictor(Protocol):
    """Guesses how many tokens a request will output, and learns from those that finished."""

    def predict(self, request: Request) -> LengthPrediction:
        """Called when a request joins, when it has outgrown its upper quantile, and when a probe landed."""
        ...

    def observe(self, request: Request) -> None:
        """Called once for every request that finished, for whatever reason.

        Only a request whose reason is STOP shows its length; any other is only known to be longer.
        """
        ...


@runtime_checkable
class ProbeReader(Protocol):
    """A predictor that uses what a trained head reads from hidden states."""

    def landed(self, request: Request, generated: int, log_remaining: Sequence[float]) -> None:
        """A running request's state after ``generated`` output tokens was read; see `probing.ProbeResult`."""
        ...


@runtime_checkable
class ReportingPredictor(Protocol):
    """A predictor that knows how right it has been."""

    def stats(self) -> dict[str, Any]:
        """Plain numbers by name; may be called from another thread."""
        ...


def within_limits(request: Request, median: float, upper: float) -> LengthPrediction:
    """Clips quantiles to what is possible: more than was generated, at most the request's own limit."""
    least, most = len(request.output_token_ids) + 1.0, float(request.max_tokens)
    median = min(max(median, least), most)
    return LengthPrediction(median, min(max(upper, median), most))


@final
class MeanLengthPredictor:
    """The running mean of finished output lengths, clipped to the request's own limit.

    The baseline that every learned predictor has to beat. Before the first observation it predicts the limit.
    Its upper quantile assumes that lengths are exponential: the tenth that is longest starts at ln 10 means.
    """

    def __init__(self, weight: float = 0.02) -> None:
        self._weight = weight
        self._mean: float | None = None

    def predict(self, request: Request) -> LengthPrediction:
        if self._mean is None:
            return within_limits(request, request.max_tokens, request.max_tokens)
        generated = len(request.output_token_ids)  # exponential lengths have no memory
        return within_limits(request, generated + self._mean, generated + math.log(10) * self._mean)

    def observe(self, request: Request) -> None:
        if request.finish_reason is not FinishReason.STOP:
            return
        length = len(request.output_token_ids)
        self._mean = (
            float(length) if self._mean is None else self._mean + self._weight * (length - self._mean)
        )
