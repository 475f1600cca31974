from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.batching_modes import main, make_parser
from bench.batching_runs import IDLE, MODES, TimedStep, slot_table, slot_waste_share, step_metrics
from bench.results import read_results
from jaxserve.core.plan import Bucket, StepPlan
from tests.support.engine_parts import make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor

OUTPUTS = [2, 8, 2, 2, 8, 2, 2, 8]  # four slots, two batches: the longest of each holds up three


def _table(mode: str) -> np.ndarray:
    executor = FakeExecutor(4, 4)
    core, _ = make_core(num_slots=4, batching=mode, batch_window_s=0.0, pipeline_depth=0, executor=executor)
    for index, length in enumerate(OUTPUTS):
        core.add(make_request(str(index), [index + 1, 7], length))
    run_to_end(core)
    plans: list[StepPlan] = [batch.plan for batch in executor.batches]
    return slot_table(plans, 4)


def test_slot_timeline_and_waste_by_hand() -> None:
    static = _table("static")
    # Two batches of eight steps each; of their 32 slot-steps 14 and 20 are of use.
    assert static.shape == (16, 4)
    assert slot_waste_share(static) == 30 / 64
    counts = [int((static == index).sum()) for index in range(len(OUTPUTS))]
    assert counts == OUTPUTS
    assert static[0].tolist() == [0, 1, 2, 3]
    assert static[2].tolist() == [IDLE, 1, IDLE, IDLE]


def test_continuous_wastes_less_than_static_and_dynamic() -> None:
    waste = {mode: slot_waste_share(_table(mode)) for mode in MODES}
    assert waste["static"] == waste["dynamic"]  # all is there from the start: their batches are the same
    assert waste["continuous"] == 14 / 48 < waste["static"]  # 12 steps, not 16: only the end is idle


def test_no_steps_waste_nothing() -> None:
    assert slot_waste_share(slot_table([], 4)) == 0.0


def test_steps_are_told_apart() -> None:
    decode, mixed = Bucket(32, 32), Bucket(64, 32)
    steps = [TimedStep(decode, 0.06), TimedStep(decode, 0.08), TimedStep(mixed, 0.06)]
    values = {name: value for name, (value, _) in step_metrics(steps).items()}
    assert values == pytest.approx(
        {"decode_step_ms": 70.0, "mixed_step_ms": 60.0, "mixed_steps_share": 1 / 3, "mixed_time_share": 0.3}
    )
    assert set(step_metrics([])) == set(values)


def test_modes_always_include_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_parser().parse_args(["--modes", "continuous"]).modes == ("static", "continuous")
    assert make_parser().parse_args([]).modes == MODES
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--modes", "continuous,eager"])
    assert "'eager' is not one of static, dynamic, continuous" in capsys.readouterr().err


def test_end_to_end_on_a_tiny_model(tiny_model: Path, traces: Path, tmp_path: Path, capsys) -> None:
    path, plots = tmp_path / "out.jsonl", tmp_path / "plots"
    flags = f"--model {tiny_model} --traces {traces} --output {path} --plots {plots} --no-compile-cache"
    small = "--batch-sizes 4 --row-buckets 4 --token-buckets 32 --requests 8 --repeats 2 --outputs 1,12"
    more = "--scale 50 --longest-prompt 6 --rate 200 --workload uniform"
    assert main([*flags.split(), *small.split(), *more.split()]) == 0
    records = read_results([path])
    values = {(r["case"], r["arrivals"], r["metric"]): r["value"] for r in records}
    assert {record["workload"] for record in records} == {"uniform-1-12"}
    metrics = {metric for _, _, metric in values}
    assert metrics == {
        "output_tok_s",
        "speedup_over_static",
        "steady_tok_s",
        "steady_speedup_over_static",
        "ttft_mean_s",
        "ttft_p50_s",
        "ttft_p99_s",
        "tpot_p50_ms",
        "tpot_p99_ms",
        "e2e_p50_s",
        "e2e_p99_s",
        "slot_waste_share",
        "decode_step_ms",
        "mixed_step_ms",
        "mixed_steps_share",
        "mixed_time_share",
        "best_batch",
    }
    for mode in MODES:
        for arrivals in ("offline", "200-per-s"):
            assert values[mode, arrivals, "output_tok_s"] > 0
            assert values[mode, arrivals, "best_batch"] == 4
            assert 0 < values[mode, arrivals, "ttft_p50_s"] <= values[mode, arrivals, "ttft_p99_s"]
            assert values[mode, arrivals, "ttft_p50_s"] < values[mode, arrivals, "e2e_p50_s"]
    assert values["static", "offline", "speedup_over_static"] == 1.0
    assert (
        values["continuous", "offline", "slot_waste_share"] < values["static", "offline", "slot_waste_share"]
    )
    assert len(list(plots.glob("*.png"))) == 6
    printed = capsys.readouterr()
    assert "slot_waste_share" in printed.err
    assert printed.out == ""  # the lines went to the file
