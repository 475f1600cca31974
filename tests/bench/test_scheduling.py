from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import scheduling, seed_tables
from bench.pod_times import OVERLAPPED_SHARE, with_pod
from bench.results import read_results
from jaxserve.config import SchedulerConfig
from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.simulation import FinishedRequest, SimulationResult


def run_parts(parts: str, requests: int, folder: Path) -> list[dict[str, Any]]:
    path = folder / "out.jsonl"
    # A folder without traces: lengths are drawn, and the workload's name says so.
    flags = ["--traces", str(folder), "--output", str(path), "--requests", str(requests)]
    assert scheduling.main(["--parts", parts, *flags]) == 0
    records = read_results([path])
    assert all("(calibrated on" in record["machine"] for record in records)
    return records


def values_of(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    return {(r["case"], r["workload"], r.get("arrivals"), r["metric"]): r["value"] for r in records}


def test_bursts_stall_less_with_smaller_chunks(tmp_path: Path, capsys) -> None:
    values = values_of(run_parts("bursts", 400, tmp_path))
    burst = "chats-and-bursts-of-prompts"
    worst = {
        case: values[case, burst, None, "itl_p99_ms"] for case in ("unchunked", "chunked-2048", "slo-25ms")
    }
    assert worst["unchunked"] > worst["chunked-2048"] > worst["slo-25ms"]
    capsys.readouterr()


def test_the_command_is_timed(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.jsonl"
    argv = ["--parts", "command", "--traces", str(tmp_path), "--output", str(path), "--requests", "20"]
    assert scheduling.main(argv) == 0
    found = [(r["case"], r["requests"], r["policies"], r["processes"]) for r in read_results([path])]
    assert found == [("command-first-try", 20, 3, 1), ("command-whole-trace", 20, 3, 2)]
    capsys.readouterr()


@pytest.mark.nightly
def test_the_ladder_and_starvation_run_small(tmp_path: Path, capsys) -> None:
    records = run_parts("starvation,ladder", 80, tmp_path)
    values = values_of(records)
    rungs = [
        r["case"] for r in records if r["workload"].startswith("seed-burst") and r["metric"] == "ttft_p50_s"
    ]
    assert rungs[:6] == ["static", "dynamic", "iteration-level", "paged", "chunked", "prefix-cache"]
    assert rungs[10] == "fused-attention"
    assert all(("fused" in r["machine"]) == (r["case"] == "fused-attention") for r in records)
    # 256 slots: without pages there is room for 53 requests, however short they are.
    seed = {
        r["case"]: r["value"]
        for r in records
        if r.get("slots") == 256 and r["metric"] == "wait_max_s" and r["workload"].startswith("seed-burst")
        if r["arrivals"] == "at-once"
    }
    assert seed["iteration-level"] > 2 * seed["paged"]
    for case in ("sjf-8s", "sjf-60s", "mlfq", "priority"):
        stream = "short-stream-at-1.5"
        assert values[case, stream, None, "wait_max_s"] <= values[case, stream, None, "wait_bound_s"]
    assert any(name.endswith("-synthetic") for _, name, _, _ in values)
    capsys.readouterr()


def test_fused_attention_saves_a_share_of_the_shorter_part() -> None:
    apart = make_cluster(ClusterConfig(cluster="1xH100m"), SchedulerConfig())
    fused, bucket = with_pod(apart), Bucket(2048, 256)
    decodes = StepFeatures(64, 64 * 4000, 0.0, 64)
    assert fused.times.predict(Bucket(64, 64), decodes) == apart.times.predict(Bucket(64, 64), decodes)
    mixed = decodes.with_prefill(1024, 7168)
    saved = apart.times.predict(bucket, mixed) - fused.times.predict(bucket, mixed)
    # By hand: 256,000 x 128 KiB of the decodes take longer than the products of 1,024 x 7,680 pairs.
    pairs_s = 4 * 32 * 32 * 128 * 1024 * 7680.5 / (989e12 * 0.5840927705548203)
    bytes_s = 131072 * 256_000 / (3.35e12 * 0.6975761977519567)
    assert bytes_s > pairs_s
    assert saved == pytest.approx(OVERLAPPED_SHARE * pairs_s)
    more = apart.times.predict(bucket, decodes.with_prefill(1984, 62_000)) - fused.times.predict(
        bucket, decodes.with_prefill(1984, 62_000)
    )
    assert more == pytest.approx(OVERLAPPED_SHARE * bytes_s)


@pytest.mark.slow
def test_sweep_serves_and_simulates_the_same_requests(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.jsonl"
    flags = (
        f"--parts sweep --shape tiny --dtype float32 --no-compile-cache --traces {tmp_path} --output {path} "
        "--requests 12 --loads 0.5,0.9 --policies fcfs,latency --prompt-scale 50 --output-scale 10 "
        "--max-num-seqs 4 --row-buckets 4 --max-num-batched-tokens 32 --max-model-len 256 --num-pages 128"
    )
    assert scheduling.main(flags.split()) == 0
    records = read_results([path])
    values = {(r["case"], r.get("load"), r["metric"]): r for r in records}
    assert values["fcfs", None, "saturation_rate"]["value"] > 0.0
    for load in (0.5, 0.9):
        assert values["fcfs", load, "e2e_mean_s_real"]["over_fcfs"] == 1.0
        for side in ("real", "sim"):
            own, base = (values[case, load, f"e2e_mean_s_{side}"] for case in ("latency", "fcfs"))
            assert own["over_fcfs"] == pytest.approx(own["value"] / base["value"], rel=1e-3)
        ratio = values["latency", load, "e2e_mean_s_ratio"]["value"]
        sim, real = (values["latency", load, f"e2e_mean_s_{side}"]["value"] for side in ("sim", "real"))
        assert ratio == pytest.approx(sim / real, rel=1e-3)
        assert values["latency", load, "step_mape"]["value"] > 0.0
    assert all("calibrated on" in record["machine"] for record in records)
    capsys.readouterr()


@pytest.mark.parametrize(
    "flags",
    ["--policies latency", "--policies fcfs,magic", "--loads 0", "--loads a"],
)
def test_bad_sweeps_are_refused(flags: str, capsys) -> None:
    with pytest.raises(SystemExit):
        scheduling.main(["--parts", "sweep", *flags.split()])
    assert flags.rsplit(maxsplit=1)[-1].rsplit(",", maxsplit=1)[-1] in capsys.readouterr().err


def test_wait_bound_by_hand() -> None:
    """Starts at 0, 10, 20, 30 s: one in ten seconds. Cap 5 s; two are promoted while others wait."""
    starts, arrivals = [0.0, 10.0, 20.0, 30.0], [0.0, 0.0, 1.0, 28.0]
    requests = [
        FinishedRequest(str(i), 0, "", 1, 1, arrival, start, start + 1, start + 1, 0)
        for i, (arrival, start) in enumerate(zip(arrivals, starts, strict=True))
    ]
    result = SimulationResult(requests, [], [], {})
    # The request of 1.0 is promoted at 6.0, when that of 0.0 still waits: two starts, 20 s.
    assert scheduling.wait_bound_s(result, 5.0) == pytest.approx(5.0 + 20.0)


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(SystemExit):
        scheduling.main(["--parts", "magic"])


def test_seed_tables_label_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(seed_tables, "COUNT", 40)
    path = tmp_path / "out.jsonl"
    assert seed_tables.main(["--output", str(path)]) == 0
    records = read_results([path])
    assert all(record["explanation"] and record["machine"].startswith("simulated (") for record in records)
    for record in records:
        # What an H100 showed says something of the article's machine by extrapolation only.
        is_likened = "memory_efficiency 0.69" in record["machine"]
        assert record["evidence"] == ("extrapolated" if is_likened else "simulated")
        assert ("(calibrated on" in record["machine"]) == record["machine"].endswith("TP1 H100m")
    main_table = [(r["case"], r["metric"], r["seed"]) for r in records if "seed" in r][:3]
    assert main_table == [
        ("static", "output_tok_s", 800), ("continuous", "output_tok_s", 2400), ("smart", "output_tok_s", 7200)
    ]  # fmt: skip
    values = {(r["case"], r["metric"]): r["value"] for r in records}
    assert values["typical-static", "output_tok_s"] < values["static-32", "output_tok_s"]
    assert values["static-32", "output_tok_s"] < values["continuous-32", "output_tok_s"]
    assert 1.0 < values["continuous-32-4-shapes", "over_static"] <= values["continuous-32", "over_static"]
    assert "article" in capsys.readouterr().out
