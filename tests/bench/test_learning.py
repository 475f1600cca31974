from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bench import learning, learning_real
from bench.results import read_results
from jaxserve.errors import ConfigError


@pytest.mark.nightly
def test_it_runs_small_and_says_what_was_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    # A folder without traces: requests are drawn, and the workloads' names say so.
    assert learning.main(["--seconds", "60", "--traces", str(tmp_path), "--output", str(path)]) == 0
    records = read_results([path])
    rewards = {(r["case"], r["workload"]): r for r in records if r["metric"] == "reward"}
    for workload in ("chats-synthetic", "code-synthetic", "code-bursts-synthetic"):
        alone = [r["value"] for (case, w), r in rewards.items() if w == workload and "-" in case]
        assert len(alone) == 12
        assert rewards["prior", workload]["ratio"] == pytest.approx(
            rewards["prior", workload]["value"] / max(alone), rel=1e-3
        )
    assert all("(calibrated on" in record["machine"] for record in records)
    assert {record["case"] for record in records} >= {"cold", "prior", "best-of-each"}
    capsys.readouterr()


def test_an_arm_is_beaten_by_one_that_is_nowhere_worse() -> None:
    own = {
        "goodput": (0.9, ""),
        "ttft_p99_s": (1.0, ""),
        "tpot_p99_ms": (20.0, ""),
        "joules_per_token": (0.1, ""),
    }
    assert not learning.is_beaten(own, own)
    assert learning.is_beaten(own, own | {"goodput": (0.95, "")})
    assert not learning.is_beaten(own, own | {"goodput": (0.95, ""), "ttft_p99_s": (1.1, "")})
    assert not learning.is_beaten(own, own | {"goodput": (0.85, ""), "joules_per_token": (0.05, "")})


def test_prior_and_run_share_no_request() -> None:
    halves = learning.make_traces(None, 30.0, seed=0)
    for name, trace in halves["run"].items():
        assert len(trace) == len(halves["prior"][name])
        assert [r.prompt_tokens for r in trace] != [r.prompt_tokens for r in halves["prior"][name]]
    joined = learning.in_a_row([*halves["run"].values()])
    assert [row.arrival_s for row in joined] == sorted(row.arrival_s for row in joined)
    assert len(joined) == sum(map(len, halves["run"].values()))


def test_a_trace_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "azure2023_conv.csv.gz", "wt") as file:
        file.write("arrival_s,prompt_tokens,output_tokens\n1.0,2,3\n")
    with pytest.raises(ConfigError, match=r"seconds=10.0: chats has 1 requests, that takes 360"):
        learning.make_traces(tmp_path, 10.0, seed=0)


def test_plays_by_hand() -> None:
    epochs = [
        {"decision": {"arm": 0}, "safe": []},
        {"decision": {"arm": 2}, "safe": [1, 2]},
        {"decision": {"arm": 3}, "safe": [1, 2]},
    ]
    assert learning_real.unsafe_plays(epochs) == 1
    assert learning_real.other_share(epochs) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_a_real_engine_learns_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = ["--shape", "tiny", "--dtype", "float32", "--no-compile-cache", "--max-num-seqs", "4"]
    flags += ["--row-buckets", "4", "--token-buckets", "8,16", "--max-num-batched-tokens", "16"]
    flags += ["--prompt-scale", "100", "--output-scale", "50", "--output", str(path)]
    flags += ["--max-model-len", "256", "--requests", "60", "--rate", "20", "--learning-epoch-s", "1"]
    assert learning_real.main(flags) == 0
    values = {(r["case"], r["metric"], r["run"]): r["value"] for r in read_results([path])}
    for case in ("off", "on"):
        assert 0.0 < values[case, "learn_ms_per_step", 1] < values[case, "step_ms", 1]
    assert values["on", "epochs", 1] > values["on", "epochs", 0] >= 2
    assert values["on", "unsafe_plays", 1] == values["on", "differing", 1] == 0
