from __future__ import annotations

from pathlib import Path

import pytest

from bench.results import read_results
from bench.sim_vs_real import COMPARED, main, speed_ratio, twin_spread
from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.simulator.calibration import Sample


def test_noise_is_told_from_drift() -> None:
    """The same steps, all 20 % slower, or each second one; those with prompts do not count."""

    def steps(*seconds: float) -> list[Sample]:
        return [(Bucket(4, 4), StepFeatures(3, 100 + 3 * i, 0.0, 3), s) for i, s in enumerate(seconds)]

    prompt: Sample = (Bucket(4, 4), StepFeatures(3, 0, 9.0, 3), 7.0)
    quiet, slow, noisy = steps(1.0, 1.0, 1.0), steps(1.2, 1.2, 1.2), steps(1.0, 1.2, 1.0, 1.2)
    assert twin_spread(quiet) == twin_spread([*slow, prompt]) == 0.0
    assert twin_spread(noisy) == pytest.approx(0.1 / 1.1)
    assert speed_ratio(quiet, [*slow, prompt]) == pytest.approx(1.2)
    assert speed_ratio(quiet, noisy) == pytest.approx(1.1)
    assert twin_spread([prompt, prompt]) is None
    assert speed_ratio(quiet, [prompt]) is None


@pytest.mark.slow
def test_a_tiny_model_is_served_recorded_and_simulated(
    tiny_model: Path, traces: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    flags = f"--model {tiny_model} --traces {tmp_path} --output {path} --no-compile-cache --max-num-seqs 4"
    small = "--row-buckets 4 --token-buckets 32 --max-num-batched-tokens 32 --max-model-len 128"
    more = "--requests 12 --rate 100 --prompt-scale 50 --output-scale 10 --policies fcfs,latency"
    assert main([*flags.split(), *small.split(), *more.split()]) == 0
    records = read_results([path])
    values = {(r["case"], r["metric"]): r["value"] for r in records}
    for case in ("fcfs", "latency"):
        assert values[case, "plans_identical"] == 1.0
        for metric in ("step_mape", "own_step_mape", "own_wall_error", "speed_ratio"):
            assert values[case, metric] > 0.0
        for metric in COMPARED:
            ratio = values[case, f"{metric}_sim"] / values[case, f"{metric}_real"]
            assert abs(values[case, f"{metric}_ratio"] / ratio - 1) < 1e-3
    assert all("calibrated on" in record["machine"] for record in records)
