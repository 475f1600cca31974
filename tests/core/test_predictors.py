"""What each predictor knows, and that none reads what it must not."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from jaxserve.core.known_lengths import KNOWN_LENGTH_PREDICTORS, make_known_length_predictor, shuffled
from jaxserve.core.predictor import MeanLengthPredictor
from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason
from tests.support.engine_parts import make_request

LENGTHS = {f"r{i}": max(1, round(random.Random(i).lognormvariate(5, 1))) for i in range(4000)}


def test_oracle_knows_and_constant_does_not() -> None:
    oracle = make_known_length_predictor("oracle", LENGTHS)
    constant = make_known_length_predictor("constant", LENGTHS)
    mean = sum(LENGTHS.values()) / len(LENGTHS)
    for name in ("r1", "r2", "r3"):
        request = make_request(name, [1], 9999)
        assert oracle.predict(request) == (LENGTHS[name], LENGTHS[name])
        assert constant.predict(request) == (mean, mean)


def test_noise_has_the_sigma_that_it_says_and_its_quantiles_hold() -> None:
    noisy = make_known_length_predictor("noisy", LENGTHS, sigma=0.7, seed=3)
    errors, covered = list[float](), 0
    for name, length in LENGTHS.items():
        median, upper = noisy.predict(make_request(name, [1], 9999))
        errors.append(math.log(median / length))
        covered += length <= upper
    assert statistics.stdev(errors) == pytest.approx(0.7, rel=0.1)
    assert statistics.median(errors) == pytest.approx(0.0, abs=0.05)
    assert 0.87 <= covered / len(LENGTHS) <= 0.93
    again = make_known_length_predictor("noisy", LENGTHS, sigma=0.7, seed=3)
    request = make_request("r7", [1], 9999)
    assert again.predict(request) == noisy.predict(request)


def test_a_guess_that_was_outlived_is_guessed_again_from_the_tail() -> None:
    noisy = make_known_length_predictor("noisy", LENGTHS, sigma=0.7)
    request = make_request("r7", [1], 99_999)
    before = noisy.predict(request)
    last = before
    for generated in (int(before.upper) + 1, 2 * int(before.upper), 20 * int(before.upper)):
        request.output_token_ids = [1] * generated
        again = noisy.predict(request)
        assert generated < again.median < again.upper
        assert again.median > last.median
        last = again


@pytest.mark.parametrize("name", ["noisy", "shuffled", "constant"])
def test_forced_lengths_do_not_leak(name: str) -> None:
    """Where lengths are forced, max_tokens is the truth: predictions must not depend on it."""
    predictor = make_known_length_predictor(name, LENGTHS)
    for index in range(50):
        short, long = (make_request(f"r{index}", [1], most) for most in (LENGTHS[f"r{index}"], 50_000))
        assert predictor.predict(short) == predictor.predict(long)


def test_shuffling_keeps_the_lengths_and_loses_whose_they_are() -> None:
    dealt = shuffled(LENGTHS, seed=1)
    assert sorted(dealt.values()) == sorted(LENGTHS.values())
    logs = [(math.log(LENGTHS[n]), math.log(dealt[n])) for n in LENGTHS]
    assert abs(statistics.correlation(*zip(*logs, strict=True))) < 0.05


def test_mean_learns_and_stays_within_the_limit() -> None:
    predictor = MeanLengthPredictor()
    request = make_request("r", [1], 100)
    assert predictor.predict(request) == (100.0, 100.0)
    for _ in range(300):
        finished = make_request("f", [1], 100)
        finished.finish_reason = FinishReason.STOP
        finished.output_token_ids = [1] * 20
        predictor.observe(finished)
    assert predictor.predict(request) == pytest.approx((20.0, 20.0 * math.log(10)))
    request.output_token_ids = [1] * 60
    assert predictor.predict(request) == pytest.approx((80.0, 100.0))
    assert predictor.predict(make_request("s", [1], 5)) == (5.0, 5.0)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(KNOWN_LENGTH_PREDICTORS)):
        make_known_length_predictor("magic", LENGTHS)
