"""Combines estimates by how right they have been, and keeps quantiles honest. No clock, no randomness.

Estimates are of a logarithm of tokens. Three things are learnt from what came true:

- each expert's squared error, an EWMA; weights are its inverse, sharpened, because experts see overlapping
  histories: plain inverse variances would let five bad ones outvote a good one;
- the bias that all have in common, an EWMA of what is left over;
- what the upper quantile lacks: adaptive conformal inference (Gibbs and Candes 2021).

An expert has no say before it has been right or wrong often enough, and if all together have been worse than
the baseline alone, the baseline speaks alone: whoever is hostile or says nothing costs no more than that.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Mapping
from typing import final

UPPER = 0.9
BASELINE = "everybody"
_MEMORY = 200  # completions that an error remembers
_PROBATION = 20  # completions before an expert has a say
_SHARPNESS = 4.0
_FLOOR = 1e-3  # of squared errors
_BIAS_WEIGHT = 0.03
_MARGIN = 0.98  # of the baseline's squared error, above which the baseline speaks alone
_MISS_STEP = 0.01
_MOST_RESIDUALS = 256
_FEWEST_RESIDUALS = 8


@final
class RunningMean:
    """A mean that fades: of all at first, of the last ``memory`` or so later."""

    __slots__ = ("_memory", "count", "value")

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self._memory)


@final
class Weights:
    """Weights of named experts from their errors."""

    def __init__(self) -> None:
        self._errors: dict[str, RunningMean] = {BASELINE: RunningMean(_MEMORY)}
        self._fused = RunningMean(_MEMORY)

    def of(self, names: Iterable[str]) -> dict[str, float]:
        """Weights that sum to one, of those that give an estimate; the baseline must be among them."""
        names = list(names)
        trusted = self._trusted(names)
        baseline = self._errors[BASELINE].value
        is_worse = self._fused.count >= _PROBATION and self._fused.value > _MARGIN * baseline
        if is_worse or not trusted:
            trusted = {BASELINE: 1.0}
        total = sum(trusted.values())
        return {name: trusted.get(name, 0.0) / total for name in names}

    def fuse(self, estimates: Mapping[str, float]) -> float:
        """The weighted mean."""
        weights = self.of(estimates)
        return sum([weights[name] * value for name, value in estimates.items()])

    def learn(self, estimates: Mapping[str, float], truth: float) -> None:
        """Compares estimates with what came true; what the trusted ones say together is judged as well."""
        trusted = self._trusted(estimates)
        if trusted:
            fused = sum([weight * estimates[name] for name, weight in trusted.items()]) / sum(
                trusted.values()
            )
            self._fused.add((fused - truth) ** 2)
        for name, value in estimates.items():
            self._errors.setdefault(name, RunningMean(_MEMORY)).add((value - truth) ** 2)

    def _trusted(self, names: Iterable[str]) -> dict[str, float]:
        """Inverse errors, sharpened, of those that have been judged often enough."""
        return {
            name: (error.value + _FLOOR) ** -_SHARPNESS
            for name in names
            if (error := self._errors.get(name)) is not None and error.count >= _PROBATION
        }

    def errors(self) -> dict[str, float]:
        """Root mean squared error of each expert."""
        return {name: error.value**0.5 for name, error in list(self._errors.items()) if error.count}


@final
class ConformalLevel:
    """The quantile level to ask for so that one outcome in ten is above it (Gibbs and Candes 2021)."""

    def __init__(self) -> None:
        self._alpha = 1.0 - UPPER
        self.coverage = RunningMean(_MEMORY)

    @property
    def level(self) -> float:
        return 1.0 - self._alpha

    def learn(self, *, missed: bool) -> None:
        self.coverage.add(float(not missed))
        self._alpha += _MISS_STEP * ((1.0 - UPPER) - float(missed))
        self._alpha = min(max(self._alpha, 0.005), 0.5)


@final
class Residuals:
    """What came true less what was expected, the newest of it, in order."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, residual: float) -> None:
        self._newest.append(residual)
        bisect.insort(self._sorted, residual)
        if len(self._newest) > _MOST_RESIDUALS:
            del self._sorted[bisect.bisect_left(self._sorted, self._newest.popleft())]

    def quantile(self, level: float, above: float) -> float | None:
        """Of the residuals greater than ``above``; None if there are too few of them."""
        first = bisect.bisect_right(self._sorted, above)
        count = len(self._sorted) - first
        if count < _FEWEST_RESIDUALS:
            return None
        return self._sorted[first + min(int(level * (count + 1)), count - 1)]


@final
class BiasCorrection:
    """An EWMA of what is left over, added to the next."""

    def __init__(self) -> None:
        self.value = 0.0

    def learn(self, residual: float) -> None:
        """``residual`` is left over after the correction."""
        self.value += _BIAS_WEIGHT * residual
