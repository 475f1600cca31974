from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.core.roofline import DeviceProfile, Roofline, device_profile, model_shape
from jaxserve.errors import ConfigError
from jaxserve.simulator.calibration import Sample, fit_device, observed_device
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.profiles import MeasuredModel, Profile, load_profile, profile_to_json

MODEL = model_shape("llama-3-8b")


def _steps(device: DeviceProfile, count: int = 400) -> list[Sample]:
    """Steps of a device that is exactly a roofline: decodes of several contexts, and prompts."""
    roofline, rng = Roofline(device, MODEL), random.Random(0)
    samples: list[Sample] = []
    for _ in range(count):
        rows, context = rng.choice((1, 8, 64, 256)), rng.randint(64, 4000)
        bucket, features = Bucket(rows, rows), StepFeatures(rows, rows * context, 0.0, rows)
        if rng.random() < 0.4:
            tokens = rng.choice((1024, 2048))
            bucket = Bucket(tokens, 256)
            features = StepFeatures(0, 0, 0.0, 0).with_prefill(tokens, rng.randint(0, 4000))
        samples.append((bucket, features, roofline.seconds(bucket, features)))
    return samples


def test_fit_finds_the_device_that_made_the_steps() -> None:
    truth = dataclasses.replace(
        device_profile("H100"), memory_efficiency=0.83, flops_efficiency=0.47, step_overhead_s=2.5e-3
    )
    fitted = fit_device(device_profile("H100"), MODEL, 1, _steps(truth))
    assert fitted.calibrated
    assert fitted.memory_efficiency == pytest.approx(0.83, rel=1e-3)
    assert fitted.flops_efficiency == pytest.approx(0.47, rel=1e-3)
    assert fitted.step_overhead_s == pytest.approx(2.5e-3, rel=1e-2)


def test_no_share_of_a_peak_is_above_one() -> None:
    faster = dataclasses.replace(
        device_profile("H100"), memory_bytes_s=5e12, memory_efficiency=1.0, step_overhead_s=1e-3
    )
    fitted = fit_device(device_profile("H100"), MODEL, 1, _steps(faster))
    assert fitted.memory_efficiency <= 1.0 and fitted.flops_efficiency <= 1.0


def test_too_few_steps_make_no_profile() -> None:
    with pytest.raises(ConfigError, match="samples: 15 steps, a profile needs 16"):
        fit_device(device_profile("H100"), MODEL, 1, _steps(device_profile("H100"), 15))


def test_peaks_of_an_unknown_device_are_the_best_that_was_seen() -> None:
    samples = _steps(device_profile("H100"))
    seen = observed_device("box", 1e9, MODEL, 1, samples)
    assert 0.5 < seen.memory_bytes_s / (0.75 * 3.35e12) < 1.0  # below the truth by the overhead of a step
    assert 0.5 < seen.peak_flops / (0.60 * 989e12) < 1.0
    slowest = min(
        seconds / max(Roofline(seen, MODEL).least_seconds(f.tokens, f)) for _, f, seconds in samples
    )
    assert slowest == pytest.approx(1.0)


def test_a_measured_model_takes_its_own_coefficients_and_another_is_extrapolated(tmp_path: Path) -> None:
    device = dataclasses.replace(device_profile("H100"), name="box", calibrated=True)
    roofline = Roofline(device, MODEL)
    costs = CostModel(roofline, forgetting=1.0)
    bucket = Bucket(256, 256)
    features = StepFeatures(256, 256 * 700, 0.0, 256)
    costs.fit([(bucket, features, 0.123)] * 20)
    named = dataclasses.replace(MODEL, name="the-same-shape", num_params=7.5e9)
    entry = MeasuredModel(model=named, num_devices=1, costs=costs.to_json(), evidence={"step_mape": 0.05})
    (tmp_path / "box.json").write_text(json.dumps(profile_to_json(Profile(device, [entry]))))
    config = ClusterConfig(cluster="2xbox", profiles=tmp_path)
    measured = make_cluster(config, SchedulerConfig())
    assert measured.label == "simulated (calibrated on 20 steps of the-same-shape): llama-3-8b on 2 x TP1 box"
    assert measured.times.predict(bucket, features) == pytest.approx(0.123)
    other = make_cluster(dataclasses.replace(config, model="llama-3.2-1b"), SchedulerConfig())
    assert "calibrated on the-same-shape, extrapolated" in other.label
    assert "uncalibrated" in make_cluster(ClusterConfig(cluster="1xH100"), SchedulerConfig()).label


def test_profiles_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"device": {"name": "bad"}, "measured": []}')
    with pytest.raises(ConfigError, match="profile bad: TypeError"):
        load_profile("bad", tmp_path)
    with pytest.raises(ConfigError, match="device profile 'none': must be one of H100"):
        load_profile("none", tmp_path)


def test_buckets_that_were_hardly_measured_take_the_fitted_roofline() -> None:
    profile = load_profile("H100m")
    roofline = Roofline(profile.device, model_shape("llama-3-8b"))
    times, _ = profile.step_times(roofline)
    counts = {bucket["tokens"]: bucket["samples"] for bucket in profile.measured[0].costs["buckets"]}
    assert (counts[64], counts[128]) == (391, 24)
    ratio = profile.measured[0].costs["ratio"]
    for rows, is_prior in ((64, False), (128, True)):
        features = StepFeatures(rows, rows * 500, 0.0, rows)
        prior = ratio * roofline.seconds(Bucket(rows, rows), features)
        assert (times.predict(Bucket(rows, rows), features) == pytest.approx(prior, rel=1e-6)) == is_prior
