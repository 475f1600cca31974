"""Output-length prediction: the *predict* stage, and its part of the *learn* stage."""

from __future__ import annotations

from typing import Protocol, final

from jaxserve.request import Request


class LengthPredictor(Protocol):
    """Guesses how many tokens a request will output, and learns from those that finished."""

    def predict(self, request: Request) -> float:
        """Expected output tokens, between 1 and ``request.max_tokens``."""
        ...

    def observe(self, request: Request) -> None:
        """Learns from a request that finished by itself."""
        ...


@final
class MeanLengthPredictor:
    """The running mean of finished output lengths, clipped to the request's own limit.

    The baseline that every learned predictor has to beat. Before the first observation it predicts the limit.
    """

    def __init__(self, weight: float = 0.02) -> None:
        self._weight = weight
        self._mean: float | None = None

    def predict(self, request: Request) -> float:
        return (
            float(request.max_tokens)
            if self._mean is None
            else min(max(self._mean, 1.0), float(request.max_tokens))
        )

    def observe(self, request: Request) -> None:
        length = len(request.output_token_ids)
        self._mean = (
            float(length) if self._mean is None else self._mean + self._weight * (length - self._mean)
        )
