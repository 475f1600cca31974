"""What predictors do on collected answers: heads on states that they have not seen, and all in service.

*Heads* are judged by five-fold cross-validation over prompts: each request is predicted by a head that has
seen neither it nor its prompt. The *survival baseline* of the same fold is the median of what remained to
requests that came as far.

*In service* the requests come in the order in which they were asked, one at a time, to the predictor that the
engine uses; what a head says of a request is what the head of its fold says.

Lengths are as they were served: an answer that was cut had what it had, and predictions are clipped to what
the limit left, as the engine does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.results import Results
from jaxserve.core.fused_predictor import FusedLengthPredictor, default_experts
from jaxserve.core.fusion import BASELINE
from jaxserve.core.predictor import LengthPredictor, MeanLengthPredictor, ProbeReader
from jaxserve.request import FinishReason, Request, SamplingParams
from jaxserve.runner.length_training import (
    Dataset,
    TrainingOptions,
    divided,
    predict,
    survival_medians,
    train,
)

FOLDS = 5
STAGES = ((0, 8), (8, 32), (32, 64), (64, 128), (128, 10**6))
_SHARES = (0.65, 0.15)  # of a fold: the rest, a fifth, is judged
_REPROBE = 20  # tokens between two probes in service, the engine's default


class Judged(NamedTuple):
    """Rows of the test parts of all folds, in the order of the data.

    Attributes:
        log_quantiles: float32 [rows, 3], of log(1 + remaining).
        survival: float64 [rows], the baseline's median of remaining tokens.
    """

    log_quantiles: npt.NDArray[Any]
    survival: npt.NDArray[Any]


def cross_validated(data: Dataset, options: TrainingOptions) -> Judged:
    """Predictions for every row by a head that has not seen its prompt."""
    quantiles = np.full((len(data), 3), np.nan, np.float32)
    survival = np.full(len(data), np.nan)
    numbered = dataclasses.replace(data, room=np.arange(len(data)))  # to know a part's rows again
    for fold in range(FOLDS):
        divide = functools.partial(divided, shares=_SHARES, rotation=fold / FOLDS)
        head, _ = train(data, options, divide=divide)
        rows = divide(numbered).test.room
        test = data.rows(rows)
        if head.layers != data.layers:
            test = test.with_layers(head.layers)
        quantiles[rows] = np.log1p(np.maximum(predict(head.params, test), 0.0))
        survival[rows] = survival_medians(divide(data).train, test.generated)
    assert not np.isnan(quantiles).any(), "every row is judged once"
    return Judged(quantiles, survival)


def report_head(results: Results, case: str, data: Dataset, judged: Judged) -> None:
    """Errors and coverage, over all rows, by progress, and of those that ended by themselves."""
    median, upper = (np.minimum(np.expm1(judged.log_quantiles[:, i]), data.room) for i in (1, 2))
    error = np.abs(median - data.remaining)
    baseline = np.abs(np.minimum(judged.survival, data.room) - data.remaining)
    covered = data.remaining <= upper
    stages = {"": np.ones(len(data), bool), " stopped": data.stopped}
    for low, high in STAGES:
        name = f" from {low}" if high == STAGES[-1][1] else f" {low}-{high - 1}"
        stages[f"{name} generated"] = (data.generated >= low) & (data.generated < high)
    for name, rows in stages.items():
        if not rows.any():
            continue
        where = f"{case}{name}"
        count = {"rows": int(rows.sum())}
        results.add(where, "survival_mae", float(baseline[rows].mean()), "tokens", **count)
        results.add(where, "mae", float(error[rows].mean()), "tokens", **count)
        results.add(
            where, "mae_of_survival", float(error[rows].mean() / baseline[rows].mean()), "ratio", **count
        )
        results.add(where, "upper_coverage", float(covered[rows].mean()), "share", **count)


class Asked(NamedTuple):
    """One collected request: as the engine had it, and what became of it.

    Attributes:
        probes: (generated, log-quantiles of remaining), in order.
    """

    prompt_token_ids: Sequence[int]
    client: str
    max_tokens: int
    output_tokens: int
    stopped: bool
    probes: Sequence[tuple[int, Sequence[float]]]


class Served(NamedTuple):
    """Absolute errors of the whole length in tokens, and coverage, by when the prediction was made."""

    generated: npt.NDArray[Any]
    error: npt.NDArray[Any]
    covered: npt.NDArray[Any]
    stopped: npt.NDArray[Any]


def serve(asked: Sequence[Asked], predictor: LengthPredictor, *, uses_probes: bool) -> Served:
    """Gives a predictor what the engine would give it, one request after the other."""
    rows: list[tuple[int, float, bool, bool]] = []
    for index, one in enumerate(asked):
        request = Request(
            id=str(index), prompt_token_ids=one.prompt_token_ids, params=SamplingParams(max_tokens=None),
            arrival_time=float(index), max_tokens=one.max_tokens, seed=0, client=one.client,
        )  # fmt: skip

        def note(generated: int, request: Request = request, one: Asked = one) -> None:
            median, upper = predictor.predict(request)
            rows.append((generated, abs(median - one.output_tokens), one.output_tokens <= upper, one.stopped))

        note(0)
        last = -_REPROBE
        for generated, log_quantiles in one.probes:
            if generated - last < _REPROBE or generated == 0:
                continue
            last = generated
            request.output_token_ids = [0] * generated
            if uses_probes and isinstance(predictor, ProbeReader):
                predictor.landed(request, generated, log_quantiles)
            note(generated)
        request.output_token_ids = [0] * one.output_tokens
        request.finish_reason = FinishReason.STOP if one.stopped else FinishReason.LENGTH
        predictor.observe(request)
    columns = zip(*rows, strict=True)
    return Served(*(np.array(column) for column in columns))


def report_service(results: Results, asked: Sequence[Asked]) -> None:
    """Each expert alone, all of them, and all with the head, on the same requests."""
    everyone = default_experts()
    makers: dict[str, tuple[Callable[[], LengthPredictor], bool]] = {
        "mean": (MeanLengthPredictor, False),
        "fused": (FusedLengthPredictor, False),
        "fused and head": (FusedLengthPredictor, True),
    }
    for name in everyone:
        only = functools.partial(_with_experts, (BASELINE, name))
        makers[f"only {name}"] = (only, False)
    warm_up = len(asked) // 5  # learnt from, not judged
    for case, (make, uses_probes) in makers.items():
        predictor = make()
        serve(asked[:warm_up], predictor, uses_probes=uses_probes)
        served = serve(asked[warm_up:], predictor, uses_probes=uses_probes)
        for when, rows in (
            ("at arrival", served.generated == 0),
            ("while growing", served.generated > 0),
        ):
            count = {"rows": int(rows.sum())}
            where = f"service {when}, {case}"
            results.add(where, "mae", float(served.error[rows].mean()), "tokens", **count)
            results.add(where, "upper_coverage", float(served.covered[rows].mean()), "share", **count)
            stopped = rows & served.stopped
            results.add(f"{where}, stopped", "mae", float(served.error[stopped].mean()), "tokens")
            results.add(f"{where}, stopped", "upper_coverage", float(served.covered[stopped].mean()), "share")
        if isinstance(predictor, FusedLengthPredictor) and not case.startswith("only"):
            _report_weights(results, case, predictor.stats())


def _with_experts(names: Sequence[str]) -> FusedLengthPredictor:
    return FusedLengthPredictor({name: default_experts()[name] for name in names})


def _report_weights(results: Results, case: str, stats: Mapping[str, Any]) -> None:
    for name, weight in stats["weights"].items():
        results.add(f"service at the end, {case}", f"weight_{name}", weight, "share")
    for stage, found in stats["while_growing"].items():
        for name, weight in found["weights"].items():
            results.add(f"service at the end, {case}, {stage}", f"weight_{name}", weight, "share")
