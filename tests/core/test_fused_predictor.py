"""Fusion learns who is right, quantiles hold, and no predictor can do more harm than knowing nothing."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pytest

from jaxserve.core.fused_predictor import HEAD, FusedLengthPredictor, default_experts
from jaxserve.core.fusion import BASELINE, ConformalLevel, Residuals, Weights
from jaxserve.core.predictor import LengthPredictor, MeanLengthPredictor
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import make_request

LIMIT = 100_000
TRUTH: dict[str, int] = {}


class Served(NamedTuple):
    request: Request
    median: float
    upper: float
    length: int

    @property
    def pinball(self) -> float:
        """Of both quantiles, on the logarithm."""
        total = 0.0
        for level, value in ((0.5, self.median), (0.9, self.upper)):
            error = math.log1p(self.length) - math.log1p(value)
            total += max(level * error, (level - 1) * error)
        return total


def end(request: Request, length: int, reason: FinishReason = FinishReason.STOP) -> None:
    request.output_token_ids = [1] * length
    request.finish_reason = reason


def serve(predictor: LengthPredictor, stream: Iterable[tuple[Request, int]]) -> list[Served]:
    served: list[Served] = []
    for request, length in stream:
        median, upper = predictor.predict(request)
        end(request, length)
        predictor.observe(request)
        served.append(Served(request, median, upper, length))
    return served


def users(
    rng: random.Random, count: int, means: dict[str, float], sigma: float = 0.4, factor: float = 1.0
) -> list[tuple[Request, int]]:
    """Requests of clients whose answers have their own typical length; prompts have nothing in common."""
    stream: list[tuple[Request, int]] = []
    for index in range(count):
        client = rng.choice(list(means))
        prompt = [rng.randrange(50_000) for _ in range(rng.randint(20, 300))]
        length = max(1, round(rng.lognormvariate(math.log(means[client] * factor), sigma)))
        stream.append((make_request(f"{index}-{rng.random()}", prompt, LIMIT, client=client), length))
    return stream


def mean_of(values: Iterable[float]) -> float:
    return statistics.mean(values)


def test_users_are_learnt_within_thirty_requests() -> None:
    stream = users(random.Random(0), 400, {"short": 50, "long": 500})
    fused = serve(FusedLengthPredictor(), stream)
    for request, _ in stream:
        request.output_token_ids, request.finish_reason = [], None
    baseline = serve(MeanLengthPredictor(), stream)
    late = slice(60, None)  # thirty of each
    assert mean_of(s.pinball for s in fused[late]) < 0.7 * mean_of(s.pinball for s in baseline[late])
    for s in fused[late][:20]:
        expected = {"short": 50, "long": 500}[s.request.client]
        assert expected / 2 < s.median < expected * 2


def test_an_unseen_user_gets_what_everybody_gets() -> None:
    predictor = FusedLengthPredictor()
    serve(predictor, users(random.Random(1), 300, {"short": 50, "long": 500}))
    unseen, nobody = (
        make_request("u", [5] * 3000, LIMIT, client="unseen"),
        make_request("n", [5] * 3000, LIMIT),
    )
    assert predictor.predict(unseen) == predictor.predict(nobody)
    assert 50 < predictor.predict(unseen).median < 500


def test_quantiles_hold_and_recover_from_a_shift() -> None:
    rng, predictor = random.Random(2), FusedLengthPredictor()
    before = serve(predictor, users(rng, 600, {"a": 60, "b": 300}))
    assert 0.85 <= mean_of(s.length <= s.upper for s in before[200:]) <= 0.95
    shifted = serve(predictor, users(rng, 700, {"a": 60, "b": 300}, factor=3.0))
    assert mean_of(s.length <= s.upper for s in shifted[:20]) < 0.7, (
        "the shift must hurt, or this tests nothing"
    )
    assert 0.85 <= mean_of(s.length <= s.upper for s in shifted[300:]) <= 0.95


class Told:
    """An expert that says what a function says of the true length."""

    def __init__(self, say: Callable[[float], float]) -> None:
        self._say = say

    def estimate(self, request: Request, prior: float) -> float | None:
        return self._say(math.log1p(TRUTH[request.id]))

    def observe(self, request: Request, z: float) -> None:
        pass


def told(stream: Sequence[tuple[Request, int]]) -> list[tuple[Request, int]]:
    TRUTH.update({request.id: length for request, length in stream})
    return list(stream)


def test_a_random_expert_loses_its_say_and_a_knowing_one_gets_it() -> None:
    rng = random.Random(3)
    noise, knowing = Told(lambda z: rng.uniform(1, 9)), Told(lambda z: z + rng.gauss(0, 0.1))
    for experts, lowest, highest in (
        ({"random": noise}, 0.0, 0.05),
        ({"random": knowing}, 0.9, 1.0),
        ({"random": Told(lambda z: 9.0 - z)}, 0.0, 0.05),  # hostile: long is called short
        ({"random": Told(lambda z: 5.0)}, 0.0, 0.5),  # says nothing
    ):
        predictor = FusedLengthPredictor({**default_experts(), **experts})
        serve(predictor, told(users(rng, 200, {"a": 50, "b": 500})))
        assert lowest <= predictor.stats()["weights"]["random"] <= highest


def test_an_expert_that_turns_hostile_is_found_out() -> None:
    rng, honest = random.Random(4), [True]
    turncoat = Told(lambda z: z if honest[0] else 9.0 - z)
    predictor = FusedLengthPredictor({BASELINE: default_experts()[BASELINE], "turncoat": turncoat})
    serve(predictor, told(users(rng, 300, {"a": 50, "b": 500})))
    assert predictor.stats()["weights"]["turncoat"] > 0.9
    honest[0] = False
    served = serve(predictor, told(users(rng, 300, {"a": 50, "b": 500})))
    assert predictor.stats()["weights"]["turncoat"] < 0.05
    assert mean_of(s.pinball for s in served[:10]) > 2 * mean_of(s.pinball for s in served[200:])


def mixed(rng: random.Random, count: int) -> list[tuple[Request, int]]:
    """Lengths that follow the client, the prefix, the conversation or the prompt's size, a quarter each."""
    tasks = {mean: [rng.randrange(50_000) for _ in range(64)] for mean in (20, 150, 900)}
    talks = {mean: [rng.randrange(50_000) for _ in range(70)] for mean in (30, 200, 1200)}
    stream: list[tuple[Request, int]] = []
    for index in range(count):
        fresh = [rng.randrange(50_000) for _ in range(rng.randint(20, 60))]
        kind, client = index % 4, ""
        if kind == 0:
            client, mean = rng.choice([("short", 40), ("long", 700)])
        elif kind == 1:
            mean = rng.choice(list(tasks))
            fresh = tasks[mean] + fresh
        elif kind == 2:
            mean = rng.choice(list(talks))
            fresh = talks[mean]
        else:
            mean = rng.choice([10, 100, 1000])
            fresh = [rng.randrange(50_000) for _ in range(mean * 3)]
        length = max(1, round(rng.lognormvariate(math.log(mean), 0.3)))
        request = make_request(f"{index}-{rng.random()}", fresh, LIMIT, client=client)
        stream.append((request, length))
        if kind == 2:
            talks[mean] = (talks[mean] + [1] * length + [rng.randrange(50_000) for _ in range(20)])[:2000]
            if len(talks[mean]) == 2000:
                talks[mean] = [rng.randrange(50_000) for _ in range(70)]
    return stream


def log_errors(experts: Iterable[str]) -> float:
    """Mean absolute error on the logarithm with some of the experts."""
    predictor = FusedLengthPredictor({name: default_experts()[name] for name in experts})
    return mean_of(
        abs(math.log1p(s.median) - math.log1p(s.length))
        for s in serve(predictor, mixed(random.Random(5), 1600))[400:]
    )


def test_on_mixed_traffic_fusion_beats_the_best_single_expert() -> None:
    everyone = set(default_experts())
    fused = log_errors(everyone)
    alone = {name: log_errors({BASELINE, name}) for name in everyone - {BASELINE}}
    assert fused <= 0.9 * min(alone.values()), (fused, alone)
    predictor = FusedLengthPredictor()
    serve(predictor, mixed(random.Random(5), 1600))
    weights = predictor.stats()["weights"]
    for name in everyone - {BASELINE}:
        assert log_errors(everyone - {name}) > fused or weights[name] < 0.05, name


def test_what_is_left_is_the_survivors_median() -> None:
    rng, predictor = random.Random(6), FusedLengthPredictor({BASELINE: default_experts()[BASELINE]})
    lengths = [max(1, round(rng.lognormvariate(5, 1))) for _ in range(1000)]
    serve(predictor, [(make_request(str(i), [1], LIMIT), length) for i, length in enumerate(lengths)])
    for generated in (50, 150, 400):
        request = make_request(f"r{generated}", [1], LIMIT)
        predictor.predict(request)
        request.output_token_ids = [1] * generated
        survivors = [length for length in lengths if length > generated]
        median, upper = predictor.predict(request)
        assert median == pytest.approx(statistics.median(survivors), rel=0.25)
        assert upper > median > generated


def run_with_head(
    predictor: FusedLengthPredictor, lengths: Sequence[int], say: Callable[[int], float]
) -> list[float]:
    """Absolute errors of predictions made while requests grow; the head says ``say(remaining)``."""
    errors: list[float] = []
    for index, length in enumerate(lengths):
        request = make_request(f"h{index}", [1], LIMIT)
        predictor.predict(request)
        for generated in range(20, length, 20):
            z = math.log1p(max(0.0, say(length - generated)))
            predictor.landed(request, generated, (z - 0.3, z, z + 0.3))
            request.output_token_ids = [1] * generated
            errors.append(abs(predictor.predict(request).median - length))
        end(request, length)
        predictor.observe(request)
    return errors


def test_a_right_head_is_heard_and_a_wrong_one_is_not() -> None:
    rng = random.Random(7)
    lengths = [max(1, round(rng.lognormvariate(4.5, 0.8))) for _ in range(400)]
    right, hostile = FusedLengthPredictor(), FusedLengthPredictor()
    good = run_with_head(right, lengths, lambda left: left * rng.uniform(0.8, 1.25))
    bad = run_with_head(hostile, lengths, lambda left: 4000.0 / left)
    silent = run_with_head(FusedLengthPredictor(), lengths, lambda left: 50.0)
    half = len(bad) // 2
    assert mean_of(good[half:]) < 0.5 * mean_of(bad[half:])
    assert mean_of(bad[half:]) < 1.05 * mean_of(silent[half:])
    assert right.stats()["while_growing"]["from_32"]["weights"][HEAD] > 0.9
    assert hostile.stats()["while_growing"]["from_32"]["weights"][HEAD] < 0.05
    assert 0.8 <= right.stats()["while_growing"]["from_32"]["upper_coverage"] <= 1.0


def test_a_cut_request_teaches_only_what_it_proves() -> None:
    predictor = FusedLengthPredictor()
    serve(predictor, [(make_request(str(i), [1], LIMIT), 100) for i in range(50)])
    before = predictor.predict(make_request("before", [1], LIMIT)).median
    for index in range(50):  # cut at 20 tokens: they might have had 100
        request = make_request(f"cut{index}", [1], 20)
        predictor.predict(request)
        end(request, 20, FinishReason.LENGTH)
        predictor.observe(request)
    assert predictor.predict(make_request("after", [1], LIMIT)).median == before
    for index in range(50):  # cut at 5,000: they had more than that
        request = make_request(f"long{index}", [1], 5000)
        predictor.predict(request)
        end(request, 5000, FinishReason.LENGTH)
        predictor.observe(request)
    assert predictor.predict(make_request("late", [1], LIMIT)).median > 5 * before


def test_limits_are_limits_and_nothing_else() -> None:
    predictor = FusedLengthPredictor()
    assert predictor.predict(make_request("first", [1], 77)) == (77.0, 77.0)
    serve(predictor, users(random.Random(8), 100, {"a": 100}))
    free = predictor.predict(make_request("free", [1], LIMIT, client="a"))
    assert predictor.predict(make_request("other", [1], 2 * LIMIT, client="a")) == free
    assert predictor.predict(make_request("tight", [1], 10, client="a")) == (10.0, 10.0)


def test_ends_of_all_kinds_leave_nothing_behind() -> None:
    predictor = FusedLengthPredictor()
    serve(predictor, users(random.Random(9), 50, {"a": 100}))
    for reason in FinishReason:
        for length in (0, 5):
            request = make_request(f"{reason}{length}", [1], LIMIT)
            predictor.predict(request)
            end(request, length, reason)
            predictor.observe(request)
    assert not predictor._live


def test_conformal_levels_find_the_share_that_is_covered() -> None:
    rng, level = random.Random(10), ConformalLevel()
    covered: list[bool] = []
    for _ in range(3000):  # scores that are wider than the quantiles promise: 0.9 has to become 0.95
        missed = rng.random() > level.level - 0.05
        covered.append(not missed)
        level.learn(missed=missed)
    assert mean_of(covered[500:]) == pytest.approx(0.9, abs=0.02)


def test_residuals_are_those_that_reach_beyond() -> None:
    residuals = Residuals()
    for value in range(300):  # the first 44 are forgotten
        residuals.add(float(value))
    assert residuals.quantile(0.5, -math.inf) == pytest.approx(172, abs=2)
    assert residuals.quantile(0.5, 199.0) == pytest.approx(250, abs=2)
    assert residuals.quantile(0.5, 295.0) is None


def test_nobody_has_a_say_on_probation() -> None:
    weights = Weights()
    for _ in range(10):
        weights.learn({BASELINE: 1.0, "new": 5.0}, 5.0)
    assert weights.of([BASELINE, "new"]) == {BASELINE: 1.0, "new": 0.0}
    for _ in range(30):
        weights.learn({BASELINE: 1.0, "new": 5.0}, 5.0)
    assert weights.of([BASELINE, "new"])["new"] > 0.99
