"""The simulator's arithmetic by hand, its metrics against an independent count, its files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli.simulate import main
from jaxserve.config import SchedulerConfig
from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.core.roofline import device_profile, model_shape
from jaxserve.errors import ConfigError
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.measures import percentile, weighted_percentile
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.timeline import write_timeline
from jaxserve.simulator.tokens import BlockTokens
from jaxserve.simulator.trace import (
    TraceRequest,
    at_once,
    at_rate,
    poisson,
    read_trace,
    repeated,
    uniform,
)
from tests.support.prefix_trie import PrefixTrie

ORACLE = SimulationOptions(predictor="oracle", keep_steps=True)


def cluster(machine: dict[str, Any] | None = None, **scheduler: Any) -> Cluster:
    return make_cluster(ClusterConfig(**(machine or {})), SchedulerConfig(**scheduler))


def run(trace: list[TraceRequest], options: SimulationOptions = ORACLE, **scheduler: Any) -> SimulationResult:
    return simulate(trace, cluster(**scheduler), options)


def step_s(machine: Cluster, tokens: int, rows: int, context: int, *prefills: tuple[int, int]) -> float:
    features = StepFeatures(rows, context, 0.0, rows)
    for length, start in prefills:
        features = features.with_prefill(length, start)
    return machine.prior.seconds(Bucket(tokens, machine.assembly.num_slots if prefills else rows), features)


def test_times_of_two_requests_by_hand() -> None:
    """The second arrives while the first's second step runs, and joins the step after the one in flight."""
    machine = cluster(max_num_seqs=4, max_num_batched_tokens=256, pipeline_depth=0)
    prefill = step_s(machine, 256, 0, 0, (100, 0))
    second = step_s(machine, 1, 1, 101)
    arrival = prefill + second / 2
    trace = [TraceRequest(0.0, 100, 4), TraceRequest(arrival, 50, 2)]
    result = simulate(trace, machine, dataclasses.replace(ORACLE, pipeline_depth=0))
    mixed = step_s(machine, 64, 1, 102, (50, 0))
    both = step_s(machine, 2, 2, 103 + 51)
    first, other = result.requests
    assert first.first_token == pytest.approx(prefill)
    assert other.first_scheduled == pytest.approx(prefill + second)
    assert other.first_token == pytest.approx(prefill + second + mixed)
    assert first.finished == other.finished == pytest.approx(prefill + second + mixed + both)
    assert [len(step.plan.rows) for step in result.steps[0]] == [1, 1, 2, 2]


def test_a_pipelined_device_never_waits_for_the_host() -> None:
    trace = [TraceRequest(0.0, 64, 50) for _ in range(8)]
    slow_host = {"host_s": 0.002}
    synchronous = run(trace, dataclasses.replace(ORACLE, pipeline_depth=0, **slow_host))
    pipelined = run(trace, dataclasses.replace(ORACLE, pipeline_depth=1, **slow_host))
    steps = pipelined.steps[0]
    assert all(b.start == a.end for a, b in itertools.pairwise(steps))
    assert pipelined.metrics()["makespan_s"][0] < 0.85 * synchronous.metrics()["makespan_s"][0]


def test_every_request_gets_exactly_its_length_and_metrics_agree_with_a_count_of_rows() -> None:
    rng = random.Random(3)
    trace = [TraceRequest(0.02 * i, rng.randint(1, 900), rng.randint(1, 60), f"c{i % 2}") for i in range(200)]
    result = run(trace, max_num_seqs=16)
    assert [r.output_tokens for r in result.requests] == [row.output_tokens for row in trace]
    assert [r.client for r in result.requests] == [row.client for row in trace]
    token_times: dict[str, list[float]] = {}
    for step in result.steps[0]:
        for row in step.plan.rows:
            if row.samples:
                token_times.setdefault(row.request_id, []).append(step.end)
    gaps: list[float] = []
    for request in result.requests:
        times = token_times[request.id][: request.output_tokens]  # a row after the last token is discarded
        assert request.first_token == times[0]
        assert request.finished == times[-1]
        gaps += [b - a for a, b in itertools.pairwise(times)]
    metrics = result.metrics()
    assert metrics["itl_p99_ms"][0] == pytest.approx(1e3 * percentile(gaps, 99), rel=0.03)
    assert metrics["itl_p50_ms"][0] == pytest.approx(1e3 * percentile(gaps, 50), rel=0.03)
    prefilled = sum(row.num_tokens for s in result.steps[0] for row in s.plan.rows if row.num_tokens > 1)
    ones = sum(row.prompt_tokens == 1 for row in trace)
    chunks_of_one = sum(
        row.num_tokens == 1 and row.start < trace[int(row.request_id)].prompt_tokens
        for s in result.steps[0]
        for row in s.plan.rows
    )
    assert prefilled + chunks_of_one == sum(row.prompt_tokens for row in trace), "each prompt token once"
    assert chunks_of_one >= ones


def test_lengths_stay_hidden_from_the_scheduler() -> None:
    """The same plans until the first request that is shorter in one trace ends there."""
    long = [TraceRequest(0.0, 50, 40), TraceRequest(0.0, 60, 40)]
    short = [TraceRequest(0.0, 50, 40), TraceRequest(0.0, 60, 7)]
    mean = SimulationOptions(keep_steps=True)
    plans = [[step.plan for step in run(trace, mean).steps[0]] for trace in (long, short)]
    assert plans[0][:8] == plans[1][:8]
    assert plans[0][9] != plans[1][9]


def test_static_batching_costs_what_the_article_says() -> None:
    """Outputs U(50,1000), 32 slots, all at once: continuous is far ahead of static."""
    trace = uniform((50, 1000), (50, 1000), 512, seed=0)
    buckets = {"token_buckets": (64, 128, 256, 512, 1024, 2048)}
    static, continuous = (
        simulate(trace, cluster(buckets, batching=mode, max_num_seqs=32), SimulationOptions())
        for mode in ("static", "continuous")
    )
    ratio = continuous.metrics()["output_tok_s"][0] / static.metrics()["output_tok_s"][0]
    assert ratio >= 1.5, "with 512 requests; the bench has the 1000 of the article"


def test_preemption_under_little_memory_shows_in_counts_and_gaps() -> None:
    trace = at_once([TraceRequest(0.0, 40, 200) for _ in range(8)])
    machine = cluster({"num_pages": 60}, max_num_seqs=8)
    result = simulate(trace, machine, ORACLE)
    assert result.metrics()["preemptions"][0] > 0
    assert all(r.output_tokens == 200 for r in result.requests)
    roomy = simulate(trace, cluster(max_num_seqs=8), ORACLE)
    assert max(gap for gap, _ in result.gaps) > 5 * max(gap for gap, _ in roomy.gaps)


def test_engines_of_a_cluster_share_the_work_and_processes_change_nothing() -> None:
    machine = cluster({"cluster": "4xH100", "tensor_parallel_size": 1}, max_num_seqs=16, ordering="sjf")
    assert machine.num_engines == 4
    trace = at_rate(uniform((10, 300), (5, 60), 300, seed=1), 200.0)
    trace = poisson(trace, 100.0, seed=2)
    for predictor in ("oracle", "mean"):  # the mean learns, in each engine for itself
        blind = SimulationOptions(router="round_robin", predictor=predictor)
        one, two = (simulate(trace, machine, blind, jobs=jobs) for jobs in (1, 2))
        assert one.requests == two.requests
        assert one.counters == two.counters
        assert sorted(one.gaps) == sorted(two.gaps)
    assert [r.engine for r in one.requests[:5]] == [0, 1, 2, 3, 0]
    with pytest.raises(ConfigError, match="jobs=2"):
        simulate(trace, machine, ORACLE, jobs=2)
    # Every fourth request is long: in turn, all of those meet on one engine.
    skewed = [TraceRequest(0.02 * i, 20, 600 if i % 4 == 0 else 4) for i in range(200)]
    loads = {
        router: simulate(skewed, machine, SimulationOptions(router=router, predictor="oracle")).metrics()
        for router in ("round_robin", "least_load")
    }
    assert loads["least_load"]["e2e_p99_s"][0] < 0.8 * loads["round_robin"]["e2e_p99_s"][0]


def test_cluster_sizes_by_hand() -> None:
    machine = cluster({"cluster": "4xH200", "model": "llama-3-70b"})
    assert machine.num_engines == 1
    assert "TP4" in machine.label
    assert "uncalibrated" in machine.label
    shape, profile = model_shape("llama-3-70b"), device_profile("H200")
    assert shape.kv_bytes_per_token == 320 * 1024
    assert shape.weight_bytes == pytest.approx(141.1e9, rel=1e-3)
    usable = 4 * (0.9 * profile.memory_bytes - 2e9) - shape.weight_bytes
    assert machine.assembly.num_pages == int(usable // (16 * shape.kv_bytes_per_token))
    assert cluster({"cluster": "8xH100"}).num_engines == 8
    # A decode step of one row reads the weights once: 141.1 GB at 75 % of 19.2 TB/s, and 160 all-reduces.
    one = machine.prior.seconds(Bucket(1, 1), StepFeatures(1, 0, 0.0, 1))
    assert one == pytest.approx(1e-3 + 141.1e9 / (4 * 4.8e12 * 0.75) + 160 * 10e-6, rel=1e-2)
    for flag, value, match in (
        ("cluster", "4xA1", "device profile"),
        ("cluster", "x", "device profile"),
        ("cluster", "4*H100", "must look like"),
        ("model", "gpt", "model shape"),
        ("tensor_parallel_size", 3, "are not engines"),
    ):
        machine_flags: dict[str, Any] = {"cluster": "4xH200", flag: value}
        with pytest.raises(ConfigError, match=match):
            cluster(machine_flags)
    with pytest.raises(ConfigError, match="does not fit"):
        cluster({"cluster": "1xTPU-v5e", "model": "llama-3-70b", "tensor_parallel_size": 1})
    with pytest.raises(ConfigError, match="a request has"):
        simulate([TraceRequest(0.0, 4000, 10)], cluster({"num_pages": 60}), ORACLE)


def test_block_hashes_say_what_is_cached() -> None:
    """Conversations of growing prompts, a number for each block of 512 tokens: hits as a trie counts them."""
    rng, trie, blocks = random.Random(2), PrefixTrie(1), itertools.count(1)
    trace: list[TraceRequest] = []
    talks: list[tuple[int, ...]] = []
    expected = 0
    for index in range(60):
        before = rng.choice(talks) if talks and rng.random() < 0.6 else ()
        hashes = (*before, *(next(blocks) for _ in range(rng.randint(1, 3))))
        talks.append(hashes)
        length = 512 * len(hashes) - rng.randint(1, 500)
        trace.append(TraceRequest(5.0 * index, length, 4, block_hashes=hashes))
        # A block that is not full is shared up to its last full page: pages are counted, not blocks.
        tokens = [block for block in hashes for _ in range(512)][:length]
        pages = [tuple(tokens[i : i + 16]) for i in range(0, length - 15, 16)]
        names = [hash(tuple(pages[: i + 1])) for i in range(len(pages))]
        expected += 16 * trie.hit_tokens([*names[: (length - 1) // 16], 0])
        trie.add(names)
    result = run(trace, max_num_seqs=4)
    assert result.counters["prefix_hit_tokens"][0] == expected > 10_000
    assert result.counters["prefix_lookup_tokens"][0] == sum(row.prompt_tokens for row in trace)
    computed = sum(plan.num_tokens for plan in (step.plan for step in result.steps[0]))
    assert computed < sum(row.prompt_tokens for row in trace) - expected + 60 * 5
    without = simulate(trace, cluster({"enable_prefix_caching": False}, max_num_seqs=4), ORACLE)
    assert without.counters["prefix_hit_tokens"][0] == 0
    assert result.metrics()["ttft_mean_s"][0] < without.metrics()["ttft_mean_s"][0]


def test_prompts_without_hashes_have_nothing_in_common() -> None:
    result = run([TraceRequest(float(i), 700, 3) for i in range(10)], max_num_seqs=2)
    assert result.counters["prefix_hit_tokens"][0] == 0


@pytest.mark.parametrize("bounds", [(0, 10), (3, 9), (9, 40), (38, 40), (5, 5), (-4, None), (None, None)])
def test_block_tokens_are_a_sequence(bounds: tuple[int | None, int | None]) -> None:
    tokens = BlockTokens([5, 6, 7], 8, 40, -1)
    listed = [5] * 8 + [6] * 8 + [7] * 8 + [-1] * 16
    assert list(tokens) == listed
    assert len(tokens) == 40
    assert list(tokens[slice(*bounds)]) == listed[slice(*bounds)]
    assert [tokens[i] for i in range(-40, 40)] == listed * 2
    assert list(tokens[3:30:5]) == listed[3:30:5]
    with pytest.raises(IndexError):
        tokens[40]


def test_traces_are_read_repeated_and_stretched(tmp_path: Path) -> None:
    csv = tmp_path / "t.csv"
    csv.write_text("arrival_s,prompt_tokens,output_tokens,client\n2.0,7,0,b\n0.5,5,3,a\n")
    rows = read_trace(csv)
    assert rows == [TraceRequest(0.5, 5, 3, "a"), TraceRequest(2.0, 7, 1, "b")]
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 1500, "input_length": 9, "output_length": 4, "hash_ids": [1]}\n')
    assert read_trace(mooncake) == [TraceRequest(1.5, 9, 4, block_hashes=(1,))]
    assert [row.arrival_s for row in repeated(rows, 5)] == [0.5, 2.0, 3.5, 5.0, 6.5]
    assert [row.arrival_s for row in at_rate(rows, 4.0)] == [0.0, 0.25]
    for name in ("missing.csv", "t.txt"):
        with pytest.raises(ConfigError, match="trace"):
            read_trace(tmp_path / name)
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="has no column 'prompt_tokens'"):
        read_trace(csv)
    csv.write_text("arrival_s,prompt_tokens,output_tokens\n1.0,5\n")
    with pytest.raises(ConfigError, match="TypeError"):
        read_trace(csv)


def test_weighted_percentiles_agree_with_the_values_written_out() -> None:
    rng = random.Random(0)
    gaps = [(rng.random(), rng.randint(1, 5)) for _ in range(200)]
    values = sorted(value for value, count in gaps for _ in range(count))
    for percent in (1, 50, 99, 100):
        got = weighted_percentile(gaps, percent)
        assert abs(values.index(got) - percent / 100 * len(values)) <= 5
    assert weighted_percentile([], 50) == 0.0


def test_timeline_has_every_step_and_every_stay(tmp_path: Path) -> None:
    trace = at_once([TraceRequest(0.0, 40, 200) for _ in range(8)])
    result = simulate(trace, cluster({"num_pages": 60}, max_num_seqs=8), ORACLE)
    path = tmp_path / "t.json"
    write_timeline(path, result)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    stays = [e for e in events if e["ph"] == "X" and e["tid"] > 0]
    assert len(steps) == len(result.steps[0])
    assert all(e["dur"] > 0 and e["pid"] == 0 for e in steps + stays)
    assert len(stays) == 8 + int(result.metrics()["preemptions"][0])
    for slot in {e["tid"] for e in stays}:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in stays if e["tid"] == slot)
        assert all(after[0] >= before[1] - 1e-3 for before, after in itertools.pairwise(mine))


def test_command_prints_a_table_and_writes_its_files(tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{0.1 * i},{20 + i},{5 + i % 7}\n" for i in range(40))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    files = {name: tmp_path / f"{name}.json" for name in ("output", "timeline", "decisions")}
    flags = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    policy = "fcfs,balanced"
    argv = [
        "--trace",
        str(trace),
        "--policy",
        policy,
        "--predictor",
        "noisy",
        "--max-num-seqs",
        "2",
        "--rate",
        "50",
    ]
    assert main([*argv, *flags, "--plots", str(tmp_path / "plots")]) == 0
    shown = capsys.readouterr().out
    assert "balanced" in shown
    assert "simulated" in shown
    lines = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert sum("metric" in line for line in lines) > 20
    assert sum("arrival" in line for line in lines) == 80
    assert (tmp_path / "timeline-fcfs.json").is_file()
    assert (tmp_path / "timeline-balanced.json").is_file()
    assert (tmp_path / "plots" / "percentiles.png").is_file()
    for name in ("fcfs", "balanced"):
        decisions = (tmp_path / f"decisions-{name}.json").read_text().splitlines()
        assert sum(json.loads(line)["decision"] == "admit" for line in decisions) >= 40
    for bad, match in (
        (["--policy", "best"], "policy="),
        (["--router", "magic"], "router="),
        (["--predictor", "magic"], "predictor="),
        (["--rate", "0"], "rate="),
        (["--max-wait-s", "0"], "max_wait_s"),
        (["--cluster", "1xH1"], "TPU-v6e, or fitted to measured steps: H100m"),
    ):
        with pytest.raises(ConfigError, match=match):
            main(["--trace", str(trace), *bad])
    with pytest.raises(ConfigError, match="needs --trace"):
        main([])


def test_policies_of_ones_own_are_compared_side_by_side(tmp_path: Path, capsys) -> None:
    """By file and class, of any kind; the table has ratios; processes change nothing."""
    trace, own = tmp_path / "trace.csv", tmp_path / "own.py"
    rows = "".join(f"{0.01 * i},{20 + 7 * i % 90},{5 + i % 17}\n" for i in range(40))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    own.write_text(
        "class Last:\n    def key(self, request, now):\n        return (-request.arrival_time,)\n"
        "class Trickle:\n    def prefill_tokens(self, view):\n        return min(16, view.budget_left)\n"
    )
    shown: list[str] = []
    for jobs in ("1", "2"):
        output = tmp_path / f"{jobs}.jsonl"
        argv = ["--trace", str(trace), "--max-num-seqs", "2", "--jobs", jobs, "--output", str(output)]
        argv += ["--decisions", str(tmp_path / "why.jsonl")]
        assert main([*argv, "--policy", f"fcfs,{own}:Last,{own}:Trickle"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    steps = {line["case"]: line["value"] for line in lines if line.get("metric") == "steps"}
    waits = {line["case"]: line["value"] for line in lines if line.get("metric") == "wait_max_s"}
    assert steps[f"{own}:Trickle"] > 1.2 * steps["fcfs"]
    assert waits[f"{own}:Last"] > 1.2 * waits["fcfs"]
    assert f"({waits[f'{own}:Last'] / waits['fcfs']:.2f}x)" in shown[0]
    assert len(list(tmp_path.glob("why-*.jsonl"))) == 3
    with pytest.raises(ConfigError, match="learning_log"):
        main([*argv, "--policy", "fcfs,sjf", "--learning", "on", "--learning-log", str(tmp_path / "l")])


def test_the_simulator_needs_no_jax() -> None:
    program = (
        "import sys\nimport jaxserve.simulator.simulation, jaxserve.simulator.replay\n"
        "import jaxserve.simulator.timeline\n"
        "assert not {'jax', 'flax', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_simulated_token_costs_microseconds() -> None:
    """100,000 requests of 250 tokens in a minute on two cores need 4.8 us; a loaded machine has thrice."""
    trace = at_once([TraceRequest(0.0, 100, 250) for _ in range(256)])
    best = 1e9
    for _ in range(2):
        start = time.process_time()
        simulate(trace, cluster(), SimulationOptions())
        best = min(best, (time.process_time() - start) / (256 * 250))
    assert best < 15e-6
