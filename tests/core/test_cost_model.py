"""The cost model against times it was not shown, its solver against exhaustive search, its bounds by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest

from jaxserve.core.cost_model import (
    CostModel,
    StepFeatures,
    UnknownDevice,
    features_of,
    mean_absolute_percentage_error,
)
from jaxserve.core.nnls import nnls
from jaxserve.core.plan import Bucket, ScheduledRow, StepPlan, StepRows
from jaxserve.core.roofline import (
    MODEL_SHAPES,
    Roofline,
    device_profile,
    known_device,
    model_shape,
    prior_from_json,
    prior_to_json,
)
from jaxserve.errors import ConfigError

TRUE = {
    Bucket(8, 8): (3e-3, 0.0, 2e-7, 0.0, 5e-5),
    Bucket(256, 8): (9e-3, 1e-5, 2e-7, 2e-8, 5e-5),
}

type Sample = tuple[Bucket, StepFeatures, float]


def seconds(bucket: Bucket, features: StepFeatures, scale: float = 1.0) -> float:
    return scale * float(np.dot(TRUE[bucket], (1.0, *features)))


def random_step(rng: random.Random) -> tuple[Bucket, StepFeatures]:
    decodes = rng.randint(1, 8)
    features = StepFeatures(decodes, sum(rng.randint(1, 2000) for _ in range(decodes)), 0.0, decodes)
    if rng.random() < 0.5:
        return Bucket(8, 8), features
    chunk = rng.randint(9, 240)
    return Bucket(256, 8), features._replace(sequences=decodes - 1).with_prefill(chunk, rng.randint(0, 900))


def samples(count: int, seed: int, noise: float = 0.05, scale: float = 1.0) -> list[Sample]:
    rng, made = random.Random(seed), list[Sample]()
    for _ in range(count):
        bucket, features = random_step(rng)
        made.append((bucket, features, seconds(bucket, features, scale) * rng.lognormvariate(0.0, noise)))
    return made


def test_features_of_a_plan_by_hand() -> None:
    rows = (
        ScheduledRow("a", 0, 10, 1, True),
        ScheduledRow("b", 1, 20, 1, True),
        ScheduledRow("c", 2, 5, 3, False),  # positions 5, 6, 7 see 6, 7, 8 tokens
        ScheduledRow("d", 3, 0, 2, True),  # 1 and 2
    )
    features = features_of(StepPlan(0, StepRows.of(rows), Bucket(64, 4)))
    assert features == StepFeatures(7, 11 + 21, 6 + 7 + 8 + 1 + 2, 4)
    decodes = features_of(StepPlan(0, StepRows.of(rows[:2]), Bucket(2, 2)))
    assert decodes == StepFeatures(2, 32, 0.0, 2)
    assert decodes.with_prefill(3, 5).with_prefill(2, 0) == features
    assert decodes.with_prefill(0, 5) == decodes


@pytest.mark.parametrize("seed", range(30))
def test_nnls_is_the_best_of_all_active_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(30, 5)) * 10.0 ** rng.integers(-4, 5, 5)
    b = rng.normal(size=30)
    x = nnls(a.T @ a, a.T @ b)
    assert (x >= 0).all()
    best = float(b @ b)
    for size in range(1, 6):
        for columns in itertools.combinations(range(5), size):
            solution, *_ = np.linalg.lstsq(a[:, columns], b, rcond=None)
            if (solution >= 0).all():
                best = min(best, float(np.sum((a[:, columns] @ solution - b) ** 2)))
    assert float(np.sum((a @ x - b) ** 2)) == pytest.approx(best, rel=1e-6)


def test_nnls_of_dependent_and_empty_columns() -> None:
    a = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 0.0]])
    x = nnls(a.T @ a, a.T @ np.array([5.0, 10.0, 15.0]))
    assert a @ x == pytest.approx([5.0, 10.0, 15.0], rel=1e-6)
    assert x[2] == 0.0


def test_held_out_error_is_within_eight_percent_and_the_prior_alone_is_not() -> None:
    model = CostModel(UnknownDevice())
    held_out = samples(400, seed=2)
    before = mean_absolute_percentage_error(model, held_out)
    model.fit(samples(400, seed=1))
    after = mean_absolute_percentage_error(model, held_out)
    assert after <= 0.05 < 0.3 < before, "noise of 5 % leaves 4 %"
    predicted = sum(model.predict(bucket, features) for bucket, features, _ in held_out)
    assert predicted == pytest.approx(sum(s for _, _, s in held_out), rel=0.02)


def test_every_term_is_needed() -> None:
    """Poison: without one feature the fit cannot reach the error that it reaches with all of them."""
    train, held_out = samples(600, seed=1, noise=0.01), samples(300, seed=2, noise=0.01)

    def error(drop: str | None) -> float:
        def blind(log: list[Sample]) -> list[Sample]:
            return log if drop is None else [(b, f._replace(**{drop: 0}), s) for b, f, s in log]

        model = CostModel(UnknownDevice())
        model.fit(blind(train))
        return mean_absolute_percentage_error(model, blind(held_out))

    whole = error(None)
    assert whole < 0.012
    for feature in ("tokens", "decode_context", "prefill_pairs"):
        assert error(feature) > 1.3 * whole, feature


def test_the_model_follows_a_device_that_changes() -> None:
    model = CostModel(UnknownDevice(), forgetting=0.99)
    model.fit(samples(600, seed=1, noise=0.01))
    model.fit(samples(1200, seed=2, noise=0.01, scale=1.5))
    late = samples(200, seed=3, noise=0.01, scale=1.5)
    assert mean_absolute_percentage_error(model, late) < 0.02
    for bucket in TRUE:
        fit = model._buckets[bucket].coefficients
        assert fit is not None
        assert min(fit) >= 0.0


def test_a_bucket_without_samples_takes_the_prior_times_the_ratio_seen() -> None:
    model = CostModel(UnknownDevice())
    bucket, other = Bucket(8, 8), Bucket(512, 8)
    features = StepFeatures(8, 800, 0.0, 8)
    before = model.predict(other, features)
    for _ in range(200):
        model.observe(bucket, features, 3.0 * UnknownDevice().seconds(bucket, features))
    assert model.predict(other, features) == pytest.approx(3.0 * before)


@pytest.mark.parametrize("seed", range(4))
def test_a_bucket_with_few_samples_takes_its_own_ratio(seed: int) -> None:
    """What others take says little of it, and five coefficients nothing beyond what they were fitted to."""
    rng, prior = random.Random(seed), UnknownDevice()
    other, bucket = Bucket(8, 8), Bucket(256, 8)
    seen = StepFeatures(8, 800, 0.0, 8)
    others: list[Sample] = [(other, seen, 10 * prior.seconds(other, seen))] * 100
    own_s = 8 * prior.seconds(bucket, StepFeatures(100, 0, 4000.0, 5))
    own: list[Sample] = [
        (bucket, StepFeatures(100, rng.randint(0, 30), 4000.0, 5), own_s * rng.uniform(0.95, 1.05))
        for _ in range(15)
    ]
    held_out: list[Sample] = [(bucket, StepFeatures(100, 1000, 4000.0, 5), own_s)]
    for count in range(16):
        model = CostModel(prior, forgetting=1.0)
        model.fit([*own[:count], *others])
        error = mean_absolute_percentage_error(model, held_out)
        assert error == pytest.approx(0.25 / (1 + count), abs=0.05), count


def test_a_step_that_was_held_up_is_rejected() -> None:
    model = CostModel(UnknownDevice())
    model.fit(samples(200, seed=1, noise=0.01))
    bucket, features = Bucket(8, 8), StepFeatures(4, 2000, 0.0, 4)
    before = model.predict(bucket, features)
    model.observe(bucket, features, 30.0)  # a compile
    model.observe(bucket, features, 0.0)
    assert model.num_rejected == 2
    assert model.predict(bucket, features) == before


def test_what_was_learnt_survives_being_written_down() -> None:
    model = CostModel(UnknownDevice())
    model.fit(samples(300, seed=1))
    again = CostModel(UnknownDevice())
    again.load_json(json.loads(json.dumps(model.to_json())))
    for bucket, features, _ in samples(50, seed=9):
        assert again.predict(bucket, features) == model.predict(bucket, features)
    unseen = Bucket(4096, 64)
    assert again.predict(unseen, StepFeatures(1, 1, 0.0, 1)) == model.predict(
        unseen, StepFeatures(1, 1, 0.0, 1)
    )


def test_predictions_never_beat_the_peaks() -> None:
    roofline = Roofline(device_profile("H100"), model_shape("llama-3-8b"))
    model = CostModel(roofline)
    bucket, features = Bucket(64, 64), StepFeatures(64, 64 * 768, 0.0, 64)
    # 16.06 GB of weights and 64 x 768 x 128 KiB of KV at 3.35 TB/s.
    floor = (16.06e9 + 64 * 768 * 131072) / 3.35e12
    assert roofline.floor(bucket, features) == pytest.approx(floor, rel=1e-3)
    expected = model.predict(bucket, features)
    for _ in range(64):
        model.observe(bucket, features, 1e-4)  # a clock that is wrong teaches nothing
    assert model.num_rejected == 64 and model.predict(bucket, features) == expected
    for _ in range(64):
        model.observe(bucket, features, 1.001 * floor)
    # One context was seen, so the fit knows no price of more; the bytes of four times as much have one.
    more = features._replace(decode_context=4 * features.decode_context)
    least = (16.06e9 + 4 * 64 * 768 * 131072) / 3.35e12
    assert model.predict(bucket, more) >= least * (1 - 1e-3)


@pytest.mark.parametrize(
    ("rows", "peer_ms"), [(1, 6.62), (8, 7.19), (32, 7.88), (64, 9.00), (128, 11.48), (256, 16.55)]
)
def test_the_h100_profile_resembles_what_engines_reach_there(rows: int, peer_ms: float) -> None:
    """vLLM 0.26 on an H100 80GB, Llama-3.1-8B shapes, bf16, context 512 to 768."""
    roofline = Roofline(device_profile("H100"), model_shape("llama-3-8b"))
    predicted = roofline.seconds(Bucket(rows, rows), StepFeatures(rows, rows * 640, 0.0, rows))
    assert 1e3 * predicted == pytest.approx(peer_ms, rel=0.13)
    prefill = roofline.seconds(Bucket(2048, 256), StepFeatures(0, 0, 0.0, 0).with_prefill(2048, 0))
    assert 1e3 * prefill == pytest.approx(55.1, rel=0.08)


def test_more_of_anything_takes_no_less_time() -> None:
    roofline = Roofline(device_profile("H200"), model_shape("llama-3-70b"), 4)
    base = roofline.seconds(Bucket(64, 64), StepFeatures(64, 6400, 0.0, 64))
    assert roofline.seconds(Bucket(64, 64), StepFeatures(64, 640000, 0.0, 64)) > base
    assert roofline.seconds(Bucket(2048, 64), StepFeatures(64, 6400, 0.0, 64)) > base
    assert roofline.seconds(Bucket(64, 64), StepFeatures(64, 6400, 1e8, 65)) > base
    two = Roofline(device_profile("H200"), model_shape("llama-3-70b"), 2)
    assert two.seconds(Bucket(64, 64), StepFeatures(64, 6400, 0.0, 64)) > base


def test_an_8_bit_cache_has_bytes_of_its_own() -> None:
    shape = model_shape("llama-3-8b")
    assert shape.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    eight_bit = dataclasses.replace(shape, kv_bytes_per_value=1 + 4 / 128)  # a float32 scale for 128 codes
    assert eight_bit.kv_bytes_per_token == 2 * 32 * 8 * (128 + 4)
    assert eight_bit.weight_bytes == shape.weight_bytes


def test_profiles_and_shapes_are_found_by_name_and_written_down() -> None:
    for name in ("H100", "H200", "TPU-v5e", "TPU-v6e"):
        profile = device_profile(name)
        assert not profile.calibrated
        assert profile.source
        for shape in MODEL_SHAPES.values():
            prior = Roofline(profile, shape, 2)
            assert prior_from_json(json.loads(json.dumps(prior_to_json(prior)))) == prior
    assert prior_from_json(prior_to_json(UnknownDevice())) == UnknownDevice()
    assert known_device("NVIDIA H100 80GB HBM3") == device_profile("H100")
    assert known_device("TPU v6 lite") == device_profile("TPU-v6e")
    assert known_device("cpu") is None
    with pytest.raises(ConfigError, match="must be one of H100"):
        device_profile("B900")
    with pytest.raises(ConfigError, match="must be one of llama"):
        model_shape("gpt")
    with pytest.raises(TypeError):
        prior_to_json(object())  # type: ignore[arg-type]
