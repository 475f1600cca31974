from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import calibrate, seed_measured, seed_tables
from bench.results import read_results
from jaxserve.config import SchedulerConfig
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.profiles import load_profile

_ENGINE = "--shape tiny --dtype float32 --no-compile-cache --num-pages 256"


def test_grid_leaves_out_what_does_not_fit() -> None:
    cells = calibrate.grid((1, 8), (100, 900), steps=10, most_tokens=1000, most_length=913)
    assert cells == [(1, 100), (1, 900), (8, 100)]
    assert calibrate.grid((1,), (100, 900), steps=10, most_tokens=1000, most_length=912) == [(1, 100)]


@pytest.mark.slow
def test_a_profile_is_measured_written_and_simulated_by_name(tmp_path: Path, capsys) -> None:
    output, profile = tmp_path / "out.jsonl", tmp_path / "here.json"
    small = "--rows 1,4 --contexts 16 --steps 12 --requests 12 --rate 50 --prompt-scale 50 --output-scale 10"
    sizes = "--max-num-seqs 4 --row-buckets 4 --max-num-batched-tokens 32 --max-model-len 128"
    flags = f"{_ENGINE} {small} {sizes} --profile {profile} --output {output}"
    assert calibrate.main(flags.split()) == 0
    values = {record["metric"]: record["value"] for record in read_results([output])}
    assert values["plans_identical"] == 1.0
    assert 0.0 < values["memory_efficiency"] <= 1.0 and 0.0 < values["flops_efficiency"] <= 1.0
    known = load_profile("here", tmp_path)
    assert known.device.calibrated and known.device.name == "here"
    (entry,) = known.measured
    assert entry.evidence["step_mape"] == values["step_mape"]
    fitted = {
        (bucket["tokens"], bucket["rows"])
        for bucket in json.loads(profile.read_text())["measured"][0]["costs"]["buckets"]
    }
    assert (4, 4) in fitted  # the decode bucket had enough steps for a fit of its own
    # A model that was not measured there takes the fitted device, and says that it is extrapolated.
    config = ClusterConfig(cluster="1xhere", model="smollm2-135m", profiles=tmp_path, num_pages=100)
    cluster = make_cluster(config, SchedulerConfig())
    assert "calibrated on tiny, extrapolated" in cluster.label
    capsys.readouterr()


@pytest.mark.nightly
def test_the_burst_is_measured_on_any_device(tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    flags = (
        f"--measure burst,ttft {_ENGINE} --output {output} --requests 24 --lengths 4,24 --batch 4 "
        "--static-batches 2 --slots 8 --rates 50 --rate-requests 8 --max-num-batched-tokens 64"
    )
    assert seed_tables.main(flags.split()) == 0
    records = read_results([output])
    assert {record["evidence"] for record in records} == {"measured"}
    values = {(record["case"], record["metric"]): record for record in records}
    rate = {case: values[case, "output_tok_s"]["value"] for case in ("typical-static-4", "continuous-8")}
    over = values["continuous-8", "over_typical_static"]
    assert over["value"] == pytest.approx(rate["continuous-8"] / rate["typical-static-4"], rel=1e-3)
    assert over["seed"] == 9.0 and "static-4" in {case for case, _ in values}
    assert values["continuous-8", "ttft_p99_cut"]["value"] < 1.0
    capsys.readouterr()


def test_unknown_parts_of_the_measured_half_are_refused() -> None:
    with pytest.raises(Exception, match="no part 'magic'; there are burst, ttft"):
        seed_measured.parts_of("burst,magic")
