from __future__ import annotations

from pathlib import Path

import pytest

from bench.results import read_results
from bench.sim_vs_real import COMPARED, main


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
        assert values[case, "step_mape"] > 0.0
        for metric in COMPARED:
            ratio = values[case, f"{metric}_sim"] / values[case, f"{metric}_real"]
            assert abs(values[case, f"{metric}_ratio"] / ratio - 1) < 1e-3
    assert all("calibrated on" in record["machine"] for record in records)
