"""What a step costs: a prior from physics, refined by the steps that were measured.

    seconds = c0 + c1 tokens + c2 decode_context + c3 prefill_pairs + c4 sequences

One set of non-negative coefficients for each compiled bucket, fitted by recursive least squares with
forgetting on relative errors. A bucket with too few samples takes the prior, times the ratio of measured to
prior seconds: its own samples' mean, with what the whole engine showed last as one more sample. A decode loop
is priced and measured by its mean decode step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, final

import numpy as np

from jaxserve.core.nnls import Float64Array, nnls
from jaxserve.core.plan import Bucket, StepPlan

_MIN_SAMPLES = 16  # with fewer, five coefficients go wrong beyond what they were fitted to
_REFIT_EVERY = 16
_RATIO_WEIGHT = 0.05
# A step this much longer than expected was held up by something that is no part of its work.
_OUTLIER = 8.0
_NUM_FEATURES = 5


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        tokens: computed, padding not counted.
        decode_context: tokens that the rows of one token attend to, summed.
        prefill_pairs: (query, key) pairs of the longer rows, summed.
        sequences: rows.
    """

    tokens: int
    decode_context: int
    prefill_pairs: float
    sequences: int

    def with_prefill(self, tokens: int, context: int) -> StepFeatures:
        """The same step with one more row: ``tokens`` of a prompt of which ``context`` are computed."""
        if tokens == 0:
            return self
        return StepFeatures(
            self.tokens + tokens,
            self.decode_context,
            self.prefill_pairs + tokens * (context + (tokens + 1) / 2),
            self.sequences + 1,
        )


def features_of(plan: StepPlan) -> StepFeatures:
    """The features of a plan, whose rows are decodes first; of a loop those of its mean decode step."""
    rows = plan.rows
    if plan.is_loop:
        return _loop_features(plan)
    pairs, context, count = 0.0, sum(rows.starts), len(rows)
    tokens = count
    for start, length in zip(reversed(rows.starts), reversed(rows.num_tokens), strict=True):
        if length == 1:
            break
        pairs += length * (start + (length + 1) / 2)
        context -= start
        tokens += length - 1
        count -= 1
    return StepFeatures(tokens, context + count, pairs, len(rows))


def _loop_features(plan: StepPlan) -> StepFeatures:
    rows, decode_steps = plan.rows, plan.num_decode_steps
    lengths = rows.num_tokens
    context = sum([length * start for start, length in zip(rows.starts, lengths, strict=True)])
    context += sum([length * (length + 1) // 2 for length in lengths])
    tokens = round(sum(lengths) / decode_steps)
    return StepFeatures(tokens, round(context / decode_steps), 0.0, len(rows))


class StepCost(Protocol):
    """Seconds of a step from physics, without having seen one."""

    def seconds(self, bucket: Bucket, features: StepFeatures) -> float:
        """What the step should take."""
        ...

    def floor(self, bucket: Bucket, features: StepFeatures) -> float:
        """What no implementation could beat on this device."""
        ...


@final
@dataclasses.dataclass(frozen=True, slots=True)
class UnknownDevice:
    """A prior for a device of which nothing is known: only the proportions mean something."""

    step_s: float = 5e-3
    token_s: float = 1e-4
    context_s: float = 1e-7

    def seconds(self, bucket: Bucket, features: StepFeatures) -> float:
        attended = features.decode_context + features.prefill_pairs
        return self.step_s + self.token_s * bucket.tokens + self.context_s * attended

    def floor(self, bucket: Bucket, features: StepFeatures) -> float:
        return 0.0


@dataclasses.dataclass(slots=True)
class _BucketFit:
    """Sufficient statistics of one bucket's samples, the older the lighter."""

    gram: Float64Array = dataclasses.field(default_factory=lambda: np.zeros((_NUM_FEATURES, _NUM_FEATURES)))
    moment: Float64Array = dataclasses.field(default_factory=lambda: np.zeros(_NUM_FEATURES))
    samples: int = 0
    ratios: float = 0.0  # sum over samples of measured to prior seconds
    unfitted: int = 0
    coefficients: tuple[float, ...] | None = None

    def add(self, features: StepFeatures, seconds: float, prior_s: float, forgetting: float) -> None:
        # Divided by the measured time: a millisecond matters more in a step of five than in one of fifty.
        row = np.array((1.0, *features)) / seconds
        self.gram *= forgetting
        self.gram += np.outer(row, row)
        self.moment *= forgetting
        self.moment += row
        self.samples += 1
        self.ratios += seconds / prior_s
        self.unfitted += 1

    def refit(self) -> None:
        self.coefficients = tuple(nnls(self.gram, self.moment).tolist())
        self.unfitted = 0


@final
class CostModel:
    """Predicts step times and learns from measured ones. No clock of its own: replays are exact."""

    def __init__(self, prior: StepCost, *, forgetting: float = 0.999) -> None:
        self._prior = prior
        self._forgetting = forgetting
        self._buckets: dict[Bucket, _BucketFit] = {}
        self._ratio = 1.0
        self.num_samples = 0
        self.num_rejected = 0

    def predict(self, bucket: Bucket, features: StepFeatures) -> float:
        """Seconds of a step; never below what the device's peaks allow."""
        fit = self._buckets.get(bucket)
        if fit is None or fit.coefficients is None:
            ratio = self._ratio if fit is None else (self._ratio + fit.ratios) / (1 + fit.samples)
            return max(ratio * self._prior.seconds(bucket, features), self._prior.floor(bucket, features))
        c = fit.coefficients
        seconds = c[0] + c[1] * features[0] + c[2] * features[1] + c[3] * features[2] + c[4] * features[3]
        return max(seconds, self._prior.floor(bucket, features))

    def observe(self, bucket: Bucket, features: StepFeatures, seconds: float) -> None:
        """Learns from one measured step, unless something else held it up (a compile, a pause), or the host
        was late to look and the device had done this one already: then it seems faster than can be."""
        too_short = seconds <= self._prior.floor(bucket, features)
        if too_short or (self.num_samples and seconds > _OUTLIER * self.predict(bucket, features)):
            self.num_rejected += 1
            return
        self.num_samples += 1
        weight = max(_RATIO_WEIGHT, 1.0 / self.num_samples)
        prior_s = self._prior.seconds(bucket, features)
        self._ratio += weight * (seconds / prior_s - self._ratio)
        fit = self._buckets.setdefault(bucket, _BucketFit())
        fit.add(features, seconds, prior_s, self._forgetting)
        if fit.samples >= _MIN_SAMPLES and (fit.unfitted >= _REFIT_EVERY or fit.coefficients is None):
            fit.refit()

    def fit(self, samples: Iterable[tuple[Bucket, StepFeatures, float]]) -> None:
        """Learns from a log of measured steps."""
        for bucket, features, seconds in samples:
            self.observe(bucket, features, seconds)
        for fit in self._buckets.values():
            if fit.samples >= _MIN_SAMPLES and fit.unfitted:
                fit.refit()

    def to_json(self) -> dict[str, Any]:
        """What was learnt, as plain values; the prior is not included."""
        return {
            "ratio": self._ratio,
            "samples": self.num_samples,
            "buckets": [
                {
                    "tokens": bucket.tokens,
                    "rows": bucket.rows,
                    "decode_steps": bucket.decode_steps,
                    "samples": fit.samples,
                    "coefficients": list(fit.coefficients),
                }
                for bucket, fit in sorted(self._buckets.items())
                if fit.coefficients is not None
            ],
        }

    def load_json(self, learnt: Mapping[str, Any]) -> None:
        """Takes over what another model has learnt; later samples of a bucket replace its coefficients."""
        self._ratio = float(learnt["ratio"])
        self.num_samples = int(learnt["samples"])
        for entry in learnt["buckets"]:
            bucket = Bucket(entry["tokens"], entry["rows"], entry.get("decode_steps", 1))
            fit = self._buckets.setdefault(bucket, _BucketFit())
            fit.coefficients = tuple(map(float, entry["coefficients"]))


def mean_absolute_percentage_error(
    model: CostModel, samples: Iterable[tuple[Bucket, StepFeatures, float]]
) -> float:
    """Mean of |predicted - measured| / measured over steps, as a share."""
    errors = [abs(model.predict(bucket, features) / seconds - 1.0) for bucket, features, seconds in samples]
    return sum(errors) / len(errors)
