from __future__ import annotations

from pathlib import Path

import pytest

from bench import cpu_decode, grpc_overhead, startup
from bench.results import read_results

SMALL = ["--no-compile-cache", "--row-buckets", "4", "--token-buckets", "16"]


def _values(path: Path) -> dict[tuple[str, str], float]:
    return {(record["case"], record["metric"]): record["value"] for record in read_results([path])}


@pytest.mark.slow
def test_cpu_decode(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = [
        "--batch",
        "1,3",
        "--prompt-tokens",
        "5",
        "--new-tokens",
        "20",
        "--repeats",
        "2",
        "--name",
        "tiny",
    ]
    flags += ["--model", str(tiny_model), "--output", str(path), *SMALL]
    assert cpu_decode.main(flags) == 0
    values = _values(path)
    cases = ("tiny-b1", "tiny-b3")
    assert set(values) == {(case, metric) for case in cases for metric in ("output_tok_s", "decode_tok_s")}
    assert all(value > 0 for value in values.values())
    assert {record["dtype"] for record in read_results([path])} == {"float32"}


def test_cpu_decode_refuses_to_measure_one_token(tiny_model: Path) -> None:
    with pytest.raises(SystemExit):
        cpu_decode.main(["--new-tokens", "1", "--model", str(tiny_model)])


def test_prompts_differ_from_each_other() -> None:
    prompts = cpu_decode.random_prompts(1000, 4, 9)
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert all(256 <= token < 1000 for prompt in prompts for token in prompt)
    assert all(0 <= token < 300 for token in cpu_decode.random_prompts(300, 1, 500)[0])


def test_grpc_overhead(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = ["--streams", "4", "--prompt-tokens", "3", "--new-tokens", "12", "--repeats", "2"]
    flags += ["--model", str(tiny_model), "--output", str(path), *SMALL]
    assert grpc_overhead.main(flags) == 0
    values = _values(path)
    assert values["grpc", "output_tok_s"] > 0
    assert 0 < values["grpc", "grpc_share_of_inproc"] < 3
    assert 0 < values["grpc", "itl_p50_ms"] <= values["grpc", "itl_p99_ms"]


@pytest.mark.nightly
def test_startup(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = ["--model", str(tiny_model), "--cache-dir", str(tmp_path / "none"), "--repeats", "1"]
    flags += ["--output", str(path), "--max-num-seqs", "1", "--token-buckets", "16"]
    assert startup.main(flags) == 0
    values = _values(path)
    assert set(values) == {("cold", "first_token_s"), ("warm", "first_token_s")}
    assert all(value > 0 for value in values.values())


def test_startup_reports_why_there_was_no_answer(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 2: .*max_num_seqs=0"):
        startup.seconds_to_first_byte(tmp_path, "hello", ["--max-num-seqs", "0"])


def test_a_cold_cache_has_the_models_but_nothing_compiled(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("xla", "models"):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_text(name)
    target.mkdir()
    startup.link_models(source, target)
    assert [entry.name for entry in target.iterdir()] == ["models"]
    assert (target / "models" / "file").read_text() == "models"
