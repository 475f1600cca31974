from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.compare import best_of, ratios
from bench.compare import main as compare
from bench.results import FIELDS, Results, host_device, read_results


def test_records_are_json_lines_on_stdout_and_in_the_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "new" / "out.jsonl"
    results = Results("b", "a device", path)
    results.add("c", "m", 1.23456789, "s", dtype="float32")
    results.add_repeats("c", "r", [3.0, 1.0, 2.0], "ms")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == read_results([path]) == results.records
    first, second = printed
    assert set(FIELDS) <= set(first)
    assert (first["value"], first["dtype"], first["device"]) == (1.2346, "float32", "a device")
    assert (second["value"], second["min"], second["max"], second["repeats"]) == (2.0, 1.0, 3.0, 3)
    assert first["jax"].count(".") == 2


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for value in (1.0, 2.0):
        Results("b", "d", path, prints=False).add("c", "m", value, "s")
    assert [record["value"] for record in read_results([path])] == [1.0, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_number_is_an_error(value: float, capsys) -> None:
    with pytest.raises(ValueError, match=r"b c m=.*not a finite number"):
        Results("b", "d", None).add("c", "m", value, "s")
    assert capsys.readouterr().out == ""


def test_a_malformed_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('\n{"bench": "b", "case": "c"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: no field metric, value"):
        read_results([path])


def test_the_device_says_how_many_cores() -> None:
    assert host_device().startswith("cpu (")
    assert host_device().endswith("cores)")


def _record(case: str, value: float, *, metric: str = "decode_tok_s", unit: str = "tokens/s", **more):
    common = {"bench": "b", "device": "d", "jax": None, "commit": None}
    return {**common, "case": case, "metric": metric, "value": value, "unit": unit, **more}


def test_ratios_take_the_best_of_each_and_skip_what_only_one_has() -> None:
    ours = [_record("b1", 30.0, dtype="float32"), _record("b1", 40.0, dtype="bfloat16"), _record("b9", 1.0)]
    theirs = [_record("b1", 20.0), _record("b1", 10.0), _record("b8", 1.0)]
    [(key, mine, other, ratio)] = ratios(ours, theirs)
    assert (key.case, mine["dtype"], other["value"], ratio) == ("b1", "bfloat16", 20.0, 2.0)


def test_of_times_the_least_is_best_and_workloads_are_kept_apart() -> None:
    records = [
        _record("static", 3.0, metric="ttft_p50_s", unit="s", workload="u"),
        _record("static", 2.0, metric="ttft_p50_s", unit="s", workload="u"),
        _record("static", 1.0, metric="ttft_p50_s", unit="s", workload="a"),
    ]
    assert {key.workload: record["value"] for key, record in best_of(records).items()} == {"u": 2.0, "a": 1.0}


def test_compare_prints_the_ratio(tmp_path: Path, capsys) -> None:
    for name, value in (("ours", 36.0), ("theirs", 20.0), ("others", 5.0)):
        case = "b1" if name != "others" else "elsewhere"
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(_record(case, value)))
    assert compare([str(tmp_path / "ours.jsonl"), str(tmp_path / "theirs.jsonl")]) == 0
    assert "1.800" in capsys.readouterr().out
    assert compare([str(tmp_path / "ours.jsonl"), str(tmp_path / "others.jsonl")]) == 1
    assert "nothing" not in capsys.readouterr().out
