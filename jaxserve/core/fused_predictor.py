"""Output lengths from all that is known: experts before an answer begins, a trained head while it grows.

Before the first token, experts (`length_experts`) speak of the whole length. The residuals of what they said
together are kept, so that a request of which ``t`` tokens are there is compared with those that came so far:
the median of the residuals that reach beyond ``t``, which is the survival baseline. If hidden states are
read, a trained head speaks of what remains; both are fused by their errors at that stage of an answer.

Requests that ended by themselves show their length. Those that were cut teach only what they prove: that they
were longer than expected, if they were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from jaxserve.core.fusion import BASELINE, BiasCorrection, ConformalLevel, Residuals, RunningMean, Weights
from jaxserve.core.length_experts import (
    ClientExpert,
    ConversationExpert,
    EverybodyExpert,
    LengthExpert,
    PatternExpert,
    PrefixExpert,
)
from jaxserve.core.predictor import (
    LengthPrediction,
    LengthPredictor,
    MeanLengthPredictor,
    within_limits,
)
from jaxserve.request import FinishReason, Request

HEAD = "hidden_states"
_PRIOR_MEMORY = 200
# Tokens generated at which the next stage begins; each has weights of its own.
_STAGES = (32, 128, 512)
_STAGE_NAMES = [f"from_{start}" for start in (1, *_STAGES)]
_MEDIAN = 0.5
# Beyond all experience, what remains is as long as what is there, within a factor.
_TAIL_MEDIAN, _TAIL_UPPER = 0.7, 2.3
_UPPER_STEP = 0.05
_MOST_LOG = 20.0  # a head that says more than 10^8 tokens says nothing


class _Said(NamedTuple):
    """A prediction made while a request ran, to be judged at its end; logarithms of 1 + remaining tokens."""

    generated: int
    estimates: Mapping[str, float]
    upper: float


class _Head(NamedTuple):
    """What the head said when ``generated`` tokens were there."""

    generated: int
    median: float
    upper: float


@dataclasses.dataclass(slots=True)
class _Live:
    """What was said of a request that has not ended."""

    estimates: dict[str, float]
    expected: float  # corrected for bias
    upper: float
    head: _Head | None = None
    said: list[_Said] = dataclasses.field(default_factory=list[_Said])


@final
class _Stage:
    """What is learnt of predictions at one stage of an answer."""

    def __init__(self) -> None:
        self.weights = Weights()
        self.coverage = RunningMean(_PRIOR_MEMORY)
        self.upper_shift = 0.0  # added to the upper quantile: pinball descent on what came true


def default_experts() -> dict[str, LengthExpert]:
    """One of each kind, by the name under which statistics have it."""
    return {
        BASELINE: EverybodyExpert(),
        "pattern": PatternExpert(),
        "client": ClientExpert(),
        "conversation": ConversationExpert(),
        "prefix": PrefixExpert(),
    }


@final
class FusedLengthPredictor:
    """A `LengthPredictor`, and a `ProbeReader` if the engine looks at hidden states.

    Args:
        experts: by name; `BASELINE` must be among them. Default: `default_experts`.
    """

    def __init__(self, experts: Mapping[str, LengthExpert] | None = None) -> None:
        self._experts = dict(default_experts() if experts is None else experts)
        if BASELINE not in self._experts:
            raise ValueError(f"experts={sorted(self._experts)}: must have {BASELINE!r}")
        self._prior = RunningMean(_PRIOR_MEMORY)
        self._weights = Weights()
        self._bias = BiasCorrection()
        self._residuals = Residuals()
        self._level = ConformalLevel()
        self._stages = [_Stage() for _ in range(len(_STAGES) + 1)]
        self._live: dict[Request, _Live] = {}
        self._mae, self._baseline_mae = RunningMean(_PRIOR_MEMORY), RunningMean(_PRIOR_MEMORY)

    # ------------------------------------------------------------------ saying

    def predict(self, request: Request) -> LengthPrediction:
        if self._prior.count == 0:
            return within_limits(request, request.max_tokens, request.max_tokens)
        live = self._live.get(request)
        if live is None:
            live = self._live[request] = self._before_it_begins(request)
        generated = len(request.output_token_ids)
        median, upper = self._remaining(live, generated)
        if generated > 0:
            median, upper = self._while_it_grows(live, generated, median, upper)
        return within_limits(request, generated + math.expm1(median), generated + math.expm1(upper))

    def landed(self, request: Request, generated: int, log_remaining: Sequence[float]) -> None:
        live = self._live.get(request)
        if live is not None:
            _, median, upper = log_remaining
            live.head = _Head(generated, median, upper)

    def _before_it_begins(self, request: Request) -> _Live:
        estimates: dict[str, float] = {}
        for name, expert in self._experts.items():
            estimate = expert.estimate(request, self._prior.value)
            if estimate is not None and math.isfinite(estimate):
                estimates[name] = estimate
        expected = self._weights.fuse(estimates) + self._bias.value
        upper = self._residuals.quantile(self._level.level, -math.inf)
        return _Live(estimates, expected, expected + (_TAIL_UPPER if upper is None else upper))

    def _remaining(self, live: _Live, generated: int) -> tuple[float, float]:
        """Median and upper quantile of log(1 + remaining), of requests that came so far."""
        passed = math.log1p(generated) - live.expected if generated else -math.inf
        found: list[float] = []
        for level, tail in ((_MEDIAN, _TAIL_MEDIAN), (self._level.level, _TAIL_UPPER)):
            residual = self._residuals.quantile(level, passed)
            if residual is None:
                remaining = tail * (generated + 1) if generated else math.expm1(live.expected) * tail
            else:
                remaining = math.expm1(live.expected + residual) - generated
            found.append(math.log1p(max(remaining, 1.0)))
        return found[0], found[1]

    def _while_it_grows(
        self, live: _Live, generated: int, median: float, upper: float
    ) -> tuple[float, float]:
        stage = self._stages[_stage_of(generated)]
        medians, uppers = {BASELINE: median}, {BASELINE: upper}
        if live.head is not None:
            since = generated - live.head.generated
            medians[HEAD], uppers[HEAD] = (
                math.log1p(max(math.expm1(min(value, _MOST_LOG)) - since, 1.0))
                for value in (live.head.median, live.head.upper)
            )
        weights = stage.weights.of(medians)
        median = sum(weights[name] * value for name, value in medians.items())
        upper = sum(weights[name] * value for name, value in uppers.items()) + stage.upper_shift
        upper = max(upper, median)
        live.said.append(_Said(generated, medians, upper))
        return median, upper

    # ------------------------------------------------------------------ learning

    def observe(self, request: Request) -> None:
        live = self._live.pop(request, None)
        length = len(request.output_token_ids)
        z, is_whole = math.log1p(length), request.finish_reason is FinishReason.STOP
        if request.finish_reason is FinishReason.ERROR or length == 0:
            return
        if live is None:
            if is_whole:
                self._take(request, z)
            return
        self._judge_growing(live, length, is_whole=is_whole)
        if is_whole or z > live.upper:
            self._level.learn(missed=z > live.upper)
        if is_whole or z > live.expected:
            if is_whole:
                self._mae.add(abs(math.expm1(live.expected) - length))
                self._baseline_mae.add(abs(math.expm1(live.estimates[BASELINE]) - length))
            self._weights.learn(live.estimates, z)
            self._residuals.add(z - live.expected)
            self._bias.learn(z - live.expected)
            self._take(request, z)

    def _take(self, request: Request, z: float) -> None:
        self._prior.add(z)
        for expert in self._experts.values():
            expert.observe(request, z)

    def _judge_growing(self, live: _Live, length: int, *, is_whole: bool) -> None:
        for generated, estimates, upper in live.said:
            if generated >= length:
                continue
            stage, truth = self._stages[_stage_of(generated)], math.log1p(length - generated)
            missed = truth > upper
            if is_whole or missed:
                stage.coverage.add(float(not missed))
                stage.upper_shift += _UPPER_STEP * (float(missed) - 0.1)
            if is_whole or truth > max(estimates.values()):
                stage.weights.learn(estimates, truth)

    def stats(self) -> dict[str, Any]:
        """Errors, coverage and weights, of the newest few hundred requests that ended by themselves."""
        weights = self._weights.of(self._experts)
        return {
            "mae_tokens": self._mae.value,
            "baseline_mae_tokens": self._baseline_mae.value,
            "upper_coverage": self._level.coverage.value,
            "upper_level": self._level.level,
            "log_rmse": self._weights.errors(),
            "weights": weights,
            "while_growing": {
                label: {
                    "upper_coverage": stage.coverage.value,
                    "log_rmse": stage.weights.errors(),
                    "weights": stage.weights.of((BASELINE, HEAD)),
                }
                for label, stage in zip(_STAGE_NAMES, self._stages, strict=True)
            },
        }


def make_length_predictor(name: str) -> LengthPredictor:
    """A predictor that learns from what it sees, by its name in `jaxserve.config.Prediction`."""
    return MeanLengthPredictor() if name == "mean" else FusedLengthPredictor()


def _stage_of(generated: int) -> int:
    return sum(generated >= start for start in _STAGES)
