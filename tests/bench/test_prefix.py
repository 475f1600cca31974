from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench import prefix
from bench.results import read_results
from jaxserve.simulator.trace import TraceRequest


def _values(path: Path) -> dict[tuple[str, str], float]:
    return {(record["case"], record["metric"]): record["value"] for record in read_results([path])}


@pytest.mark.slow
def test_a_shared_prompt_is_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = ["--parts", "ttft", "--shape", "tiny", "--requests", "3", "--system-tokens", "64"]
    flags += ["--tail-tokens", "20", "--check", "2", "--check-tokens", "6", "--page-size", "16"]
    flags += ["--dtype", "float32", "--no-compile-cache", "--row-buckets", "4", "--token-buckets", "32"]
    flags += ["--num-pages", "60", "--output", str(path)]
    assert prefix.main(flags) == 0
    values = _values(path)
    assert values["cold", "prefill_saved_share"] == 0.0
    assert values["warm", "prefill_saved_share"] == pytest.approx(64 / 84, abs=1e-4)
    assert values["warm", "tokens_equal_share"] == 1.0
    assert values["warm", "ttft_ratio"] > 0
    assert {record["model"] for record in read_results([path])} == {"tiny"}


def test_operations_of_the_tree_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    flags = ["--parts", "tree", "--nodes", "300", "--operations", "50", "--output", str(path)]
    assert prefix.main(flags) == 0
    values = _values(path)
    names = ("match", "enter", "leave", "evict")
    assert set(values) == {(f"tree-{name}", metric) for name in names for metric in ("p50_us", "p99_us")}
    assert all(0 < value < 50_000 for value in values.values())
    assert all(record["nodes"] >= 250 for record in read_results([path]))


def _trace(folder: Path) -> None:
    rows = [
        (0, 1500, [1, 2, 3]),
        (3000, 1600, [1, 2, 3, 4]),
        (3000, 700, [1, 9]),
        (9000, 2100, [1, 2, 3, 4, 5]),
    ]
    lines = [
        json.dumps({"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": ids})
        for t, n, ids in rows
    ]
    path = folder / "mooncake_conversation.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_the_trie_counts_by_hand() -> None:
    first = TraceRequest(0.0, 1500, 1, block_hashes=(1, 2, 3))
    again = TraceRequest(1.0, 1600, 1, block_hashes=(1, 2, 3, 4))
    assert prefix.trie_hit_tokens([first, again], 128) == 1408, "eleven full pages of 1,500 tokens"
    assert prefix.trie_hit_tokens([first, first], 128) == 1408
    exact = TraceRequest(0.0, 512, 1, block_hashes=(7,))
    assert prefix.trie_hit_tokens([exact, exact], 512) == 0, "the last token is always computed"


def test_hits_on_a_trace_are_those_of_the_trie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trace(tmp_path)
    path = tmp_path / "out.jsonl"
    assert prefix.main(["--parts", "trace", "--traces", str(tmp_path), "--output", str(path)]) == 0
    values = _values(path)
    name = "mooncake_conversation"
    assert values[name, "hit_tokens"] == values[name, "trie_hit_tokens"] == 1408 + 512 + 1536
    assert values[f"{name}-1xH100", "hit_share"] <= values[f"{name}-1xH100", "trie_hit_share"]
    assert (f"{name}-1xH100-without", "ttft_mean_s") in values
    assert "mooncake_synthetic: no trace found" in capsys.readouterr().err


def test_a_small_cache_keeps_what_is_used_again(tmp_path: Path) -> None:
    """One prompt comes twice, and then after every two strangers: four blocks hold it and one of them."""
    numbers = iter(range(100, 1000))

    def hashes(index: int) -> tuple[int, ...]:
        return (1, 2) if index == 0 or index % 3 == 1 else (next(numbers), next(numbers))

    trace = [TraceRequest(float(i), 1024, 1, block_hashes=hashes(i)) for i in range(60)]
    once = 512 / (60 * 1024)  # its last block is always computed
    assert prefix.hit_share(trace, 1000, 300.0) == pytest.approx(20 * once)
    assert prefix.hit_share(trace, 4, 300.0) == pytest.approx(20 * once)
    assert prefix.hit_share(trace, 4, 0.01) == pytest.approx(once), "least recently used"
    _trace(tmp_path)
    path = tmp_path / "out.jsonl"
    assert prefix.main(["--parts", "evict", "--traces", str(tmp_path), "--output", str(path)]) == 0
    assert {record["blocks"] for record in read_results([path])} == {1_000, 5_000, 20_000}


def test_tiers_have_the_same_requests(tmp_path: Path) -> None:
    _trace(tmp_path)
    path = tmp_path / "out.jsonl"
    flags = ["--parts", "tiers", "--traces", str(tmp_path), "--share", "1", "--host-gib", "4"]
    assert prefix.main([*flags, "--output", str(path)]) == 0
    values = _values(path)
    name = "mooncake_conversation"
    cases = ("one-tier", "one-tier-keeping", "two-tiers", "two-tiers-preloading")
    shares = [values[f"{name}-{case}", "hit_share"] for case in cases]
    assert shares == [pytest.approx(3456 / 5900, abs=1e-4)] * 4, "they fit on the device"
    assert values[f"{name}-two-tiers", "host_hit_share"] == 0.0
    assert (f"{name}-one-tier", "host_saved_bytes") not in values


def test_conversations_are_taken_whole() -> None:
    def row(time: float, *blocks: int) -> TraceRequest:
        return TraceRequest(time, 512 * len(blocks), 1, block_hashes=blocks)

    first, second, third = row(0.0, 1, 2), row(1.0, 1, 5), row(2.0, 1, 7)
    trace = [first, second, third, row(3.0, 1, 5, 6), row(4.0, 1, 2, 3), row(5.0, 1, 5, 6, 9)]
    assert prefix.some_conversations(trace, 1, 10_000) == trace
    assert [r.arrival_s for r in prefix.some_conversations(trace, 2, 10_000)] == [0.0, 2.0, 4.0]
    assert [r.arrival_s for r in prefix.some_conversations(trace, 1, 1100)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("flags", [["--parts", "ttft,all"], ["--trace-page-size", "48"]])
def test_what_cannot_be_measured_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        prefix.main(flags)
