from __future__ import annotations

from bench.host_overhead import main, measure
from bench.results import read_results


def test_every_part_is_measured(tmp_path) -> None:
    path = tmp_path / "out.jsonl"
    assert main(["--running", "3,9", "--steps", "40", "--repeats", "2", "--output", str(path)]) == 0
    records = read_results([path])
    values = {(record["case"], record["metric"]): record["value"] for record in records}
    metrics = ("core", "schedule", "prepare", "update", "output")
    cases = ("running-3", "running-9")
    assert set(values) == {(case, f"{metric}_ms_per_step") for case in cases for metric in metrics}
    assert all(0 < value < 50 for value in values.values())
    assert {record["unit"] for record in records} == {"ms"}


def test_requests_cross_pages_at_every_depth() -> None:
    for depth in (0, 1, 2):
        assert measure(5, steps=30, page_size=4, pipeline_depth=depth)["core_ms_per_step"] > 0


def test_profile_names_the_scheduler(capsys) -> None:
    assert main(["--running", "2", "--steps", "10", "--profile"]) == 0
    assert "scheduler.py" in capsys.readouterr().err
