"""A recorded run, played again in the simulator, makes the same plans step by step."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams
from jaxserve.cli.simulate import main
from jaxserve.config import SchedulerConfig
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import UnknownDevice
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.learning.arms import Arm, make_arms
from jaxserve.core.policies.registry import ADMISSIONS, CAPACITIES, COMPOSITIONS, ORDERINGS, VICTIMS
from jaxserve.core.resume_costs import NO_HOST, HostTier
from jaxserve.engine.recording import Recorder, read_recording
from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, Request
from jaxserve.simulator.replay import replay
from tests.support.engine_parts import ManualClock, make_core, make_request, random_prompt
from tests.support.fake_executor import FakeExecutor
from tests.support.lossy_executor import LossyExecutor
from tests.support.tiny_checkpoint import write_tiny_checkpoint


def live_run(
    seed: int, depth: int = 1, *, count: int = 30, arms: Sequence[Arm] = (), **policies: Any
) -> tuple[list[dict[str, Any]], FakeExecutor]:
    """Random traffic with stops, siblings, aborts, deadlines and too little memory, recorded."""
    rng, clock, records = random.Random(seed), ManualClock(), list[dict[str, Any]]()
    core, fake = make_core(
        num_slots=4, num_pages=26, pipeline_depth=depth, clock=clock, max_wait_s=0.2, batch_window_s=0.05,
        recorder=lambda assembly: Recorder(records.append, assembly, UnknownDevice(), depth), **policies,
    )  # fmt: skip
    requests: list[Request] = []
    for index in range(count):
        before = rng.choice(requests[-5:]) if requests and rng.random() < 0.4 else None
        prompt = random_prompt(rng, 40)
        if before is not None:  # another turn, or the same again
            prompt = [*before.prompt_token_ids, *before.output_token_ids][:50]
        request = make_request(
            f"r{index}", prompt, rng.randint(5, 24), seed=index, arrival=clock.now,
            stop_token_ids=frozenset({rng.randrange(101)}), cache_salt=rng.choice(["", "", "salt"]),
            priority=rng.randint(-1, 1), client=f"c{index % 3}", min_tokens=rng.choice([0, 0, 5]),
            deadline=clock.now + 0.5 if rng.random() < 0.1 else None,
        )  # fmt: skip
        requests.append(request)
        core.add(request)
        for _ in range(rng.randint(0, 4)):
            core.step()
            clock.now += rng.uniform(0.001, 0.03)
        if arms and rng.random() < 0.3:
            core.retune(rng.choice(arms))
        if rng.random() < 0.1:
            core.end(rng.choice(requests).id, FinishReason.ABORT)
    for _ in range(20_000):
        if not core.has_work:
            return records, fake
        core.step()
        clock.now += rng.uniform(0.001, 0.03)
    raise AssertionError("the live run does not end")


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(0, 2),
    share=st.sampled_from([0.05, 0.3]),
    host=st.sampled_from([NO_HOST, HostTier(8, 2, 1000, 1e12)]),
    batching=st.sampled_from(sorted(ADMISSIONS)),
)
def test_steps_that_could_not_be_run_are_replayed(
    seed: int, depth: int, share: float, host: HostTier, batching: str
) -> None:
    executor = LossyExecutor(4, 4)
    executor.rng, executor.share = random.Random(seed + 1), share
    records, _ = live_run(seed, depth, executor=executor, host=host, batching=batching)
    assert sum(record["e"] == "lost" for record in records) == executor.num_failures
    found = replay(json.loads(json.dumps(records)))
    assert found.first_difference is None
    assert found.num_steps == sum(record["e"] == "plan" and record["plan"] is not None for record in records)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(0, 2),
    ordering=st.sampled_from(sorted(ORDERINGS)),
    batching=st.sampled_from(sorted(ADMISSIONS)),
    composition=st.sampled_from(sorted(COMPOSITIONS)),
    max_decode_steps=st.integers(1, 4),
    capacity=st.sampled_from(sorted(CAPACITIES)),
    host=st.sampled_from([NO_HOST, HostTier(8, 2, 1000, 1e12)]),
)
def test_any_recorded_run_replays_to_identical_plans(
    seed: int, depth: int, ordering: str, batching: str, composition: str, max_decode_steps: int,
    capacity: str, host: HostTier,
) -> None:  # fmt: skip
    records, fake = live_run(
        seed, depth, ordering=ordering, batching=batching, composition=composition,
        max_decode_steps=max_decode_steps, capacity=capacity, host=host, victim="value",
    )  # fmt: skip
    found = replay(json.loads(json.dumps(records)))
    assert found.first_difference is None
    assert found.num_steps == fake.num_dispatched > 20
    live = [batch.plan for batch in fake.batches]
    assert [plan.rows for plan in found.plans] == [plan.rows for plan in live]
    assert [plan.page_updates for plan in found.plans] == [plan.page_updates for plan in live]
    assert [(p.saves, p.loads, p.landings) for p in found.plans] == [
        (p.saves, p.loads, p.landings) for p in live
    ]


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_combination_runs_is_logged_and_replays(ordering: str) -> None:
    """All compositions, capacities, victims and admissions: none fails, and a plan is a pure function."""
    preempted = 0
    for seed, (composition, capacity, victim, batching) in enumerate(
        itertools.product(COMPOSITIONS, CAPACITIES, VICTIMS, ADMISSIONS)
    ):
        log: list[dict[str, Any]] = []
        records, fake = live_run(
            seed, seed % 3, count=8, ordering=ordering, composition=composition, capacity=capacity,
            victim=victim, batching=batching, decision_log=DecisionLog(log.append),
        )  # fmt: skip
        plans = [batch.plan for batch in fake.batches]
        logged = [[r["request"] for r in log if r["decision"] == kind] for kind in ("admit", "preempt")]
        assert logged[0] == [admission.request_id for plan in plans for admission in plan.admissions]
        assert logged[1] == [request_id for plan in plans for request_id in plan.preempted_ids]
        preempted += len(logged[1])
        assert replay(records).first_difference is None, (composition, capacity, victim, batching)
    assert preempted > 20, "too much memory: no victim was chosen"


ARMS = make_arms(SchedulerConfig(), BucketLadder((4,), (5, 8, 16, 32), 4), 4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), depth=st.integers(0, 2), max_decode_steps=st.integers(1, 4))
def test_a_run_whose_arm_changes_replays_to_identical_plans(
    seed: int, depth: int, max_decode_steps: int
) -> None:
    records, fake = live_run(seed, depth, arms=ARMS, max_decode_steps=max_decode_steps)
    found = replay(json.loads(json.dumps(records)))
    assert found.first_difference is None
    assert found.num_steps == fake.num_dispatched > 20


def test_a_run_under_a_policy_of_ones_own_replays_to_identical_plans(tmp_path: Path) -> None:
    """The recording names the file; a file that says something else is noticed."""
    path = tmp_path / "longest.py"
    rule = "class Longest:\n    def key(self, request, now):\n        return ({}request.num_prompt_tokens,)\n"
    path.write_text(rule.format("-"))
    records, fake = live_run(4, ordering=f"{path}:Longest")
    found = replay(json.loads(json.dumps(records)))
    assert found.first_difference is None
    assert found.num_steps == fake.num_dispatched > 20
    other = tmp_path / "shortest.py"
    other.write_text(rule.format(""))
    records[0]["assembly"]["scheduler"]["ordering"] = f"{other}:Longest"
    assert replay(records).first_difference is not None


def test_a_replay_needs_the_arms_that_were_recorded() -> None:
    records, _ = live_run(2, arms=ARMS)
    assert any(record["e"] == "arm" for record in records)
    without = [record for record in records if record["e"] != "arm"]
    assert replay(without).first_difference is not None


def test_replayed_requests_find_what_the_recorded_ones_found() -> None:
    records, fake = live_run(1)
    assert any(row.start and row.num_tokens > 1 for batch in fake.batches for row in batch.plan.rows)
    shared = sum(len(a.page_ids) for batch in fake.batches for a in batch.plan.admissions)
    found = replay(records)
    assert found.first_difference is None
    assert sum(len(a.page_ids) for plan in found.plans for a in plan.admissions) == shared
    pages = [record["pages"] for record in records if record["e"] == "pages"]
    assert len(pages) == 30, "every request says which pages it filled"
    for record in records:
        if record["e"] in ("add", "pages"):
            record["pages"] = []
    assert replay(records).first_difference is not None, "without the page numbers nothing is found again"


@pytest.mark.parametrize("change", ["missing", "slow", "longer", "order"])
def test_a_replay_notices_what_was_changed(change: str) -> None:
    """Each change alters what a scheduler was given; a comparison that looks at nothing would pass."""
    records, _ = live_run(3, ordering="sjf", composition="slo")
    changed = json.loads(json.dumps(records))
    adds = [i for i, record in enumerate(changed) if record["e"] == "add"]
    if change == "missing":
        del changed[adds[10]]
    elif change == "slow":  # deadlines pass earlier
        for record in changed[1:]:
            record["t"] = record.get("t", 0.0) * 20
    elif change == "longer":
        for record in changed:
            if record["e"] == "done":
                record["stopped"] = {}
    else:
        changed[0]["assembly"]["scheduler"]["ordering"] = "spf"
    assert replay(changed).first_difference is not None


def test_a_real_engine_replays_to_identical_plans(tmp_path: Path, capsys) -> None:
    """A tiny model on real devices, a thread, a wall clock, siblings, stop strings, preemption."""
    path, decisions = tmp_path / "run.jsonl", tmp_path / "why.jsonl"
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "row_buckets": (4,),
        "token_buckets": (12, 32),
        "max_model_len": 128,
        "page_size": 8,
        "num_pages": 24,
        "compile_cache": False,
        "use_tqdm": False,
        "ordering": "sjf",
        "composition": "phase",
        "record": str(path),
        "decision_log": str(decisions),
    }
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(24)]
    params = [SamplingParams(n=1 + i % 2, max_tokens=3 + 2 * i, seed=i, stop="a") for i in range(24)]
    with LLM(str(write_tiny_checkpoint(tmp_path / "tiny")), **options) as llm:
        llm.generate(prompts, params, use_tqdm=False)
        for output in llm.stream(prompts[0], SamplingParams(max_tokens=60, seed=1)):
            if len(output.outputs[0].token_ids) > 5:
                break  # aborts it
        steps = llm.stats()["num_steps"]
    records = read_recording(path)
    found = replay(records)
    assert found.first_difference is None
    assert found.num_steps >= steps > 50
    assert any(record["e"] == "end" for record in records)
    assert main(["--replay", str(path)]) == 0
    assert capsys.readouterr().out == f"{found.num_steps} plans, all identical\n"
    admitted = [json.loads(line) for line in decisions.read_text().splitlines()]
    assert sum(record["decision"] == "admit" for record in admitted) >= 36
    assert not any("prompt" in record for record in records), "no token leaves the engine"


@pytest.mark.parametrize("place", ["header", "arm"])
def test_a_recording_does_not_choose_what_code_runs(place: str, tmp_path: Path, capsys) -> None:
    """Who names the policy's file, wherever it lies now, gets the replay."""
    mine, theirs, path = tmp_path / "mine.py", tmp_path / "theirs.py", tmp_path / "recording.jsonl"
    mine.write_text("class Longest:\n    def key(self, r, now):\n        return (-r.num_prompt_tokens,)\n")
    theirs.write_text("raise AssertionError('was run')")
    if place == "header":
        records, _ = live_run(4, ordering=f"{mine}:Longest")
        options = [records[0]["assembly"]["scheduler"]]
    else:
        records, _ = live_run(4, arms=[Arm(32, f"{mine}:Longest", "watermark")])
        options = [record["arm"] for record in records if record["e"] == "arm"]
    assert options
    for values in options:
        values["ordering"] = f"{theirs}:Longest"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,5\n")
    for argv in (
        ["--replay", str(path)],
        ["--trace", str(trace), "--like", str(path), "--policy", "sjf,spf"],
    ):
        with pytest.raises(ConfigError, match=r"made with ordering=.*: --policy .*theirs.py:Longest"):
            main(argv)
        for option in ("--policy", "--ordering"):
            assert main([*argv, option, f"{mine}:Longest"]) == 0
    assert "plans, all identical" in capsys.readouterr().out


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}\n", "hello", '{"e": "header", "version": 99}\n'):
        path = tmp_path / "file.jsonl"
        path.write_text(text)
        with pytest.raises(ConfigError, match="recording"):
            read_recording(path)
    with pytest.raises(ConfigError, match="recording"):
        read_recording(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="record="):
        LLM("tiny", record=str(tmp_path / "no" / "folder.jsonl"))
