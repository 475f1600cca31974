"""Arms that change while requests run and wait: tokens stay, and so does every invariant."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import EngineConfig, LearningConfig, SchedulerConfig
from jaxserve.core.assembly import Assembly
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import CostModel, UnknownDevice
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.learning.arms import Arm, make_arms
from jaxserve.core.learning.setup import make_tuner
from jaxserve.core.learning.tuner import Tuner
from jaxserve.core.policies.registry import ORDERINGS
from jaxserve.core.policy import RequestObserver
from jaxserve.core.roofline import Roofline, device_profile, model_shape
from jaxserve.core.waiting_queue import WaitingQueue
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.learning import LearningLog, NvmlEnergy, make_meter
from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_core, make_request, random_prompt, run_to_end
from tests.support.fake_executor import expected_tokens
from tests.support.policy_parts import make_context

ARMS = make_arms(SchedulerConfig(), BucketLadder((8,), (9, 12, 16, 32), 8), 8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    depth=st.integers(0, 2),
    num_pages=st.sampled_from([24, 64]),
    max_decode_steps=st.integers(1, 4),
    ordering=st.sampled_from(sorted(ORDERINGS)),
)
def test_arms_that_change_at_any_step_keep_all_tokens(
    seed: int, depth: int, num_pages: int, max_decode_steps: int, ordering: str
) -> None:
    rng, clock = random.Random(seed), ManualClock()
    core, fake = make_core(
        num_pages=num_pages, pipeline_depth=depth, clock=clock, max_wait_s=0.2,
        max_decode_steps=max_decode_steps, ordering=ordering,
    )  # fmt: skip
    requests: list[Request] = []
    aborted: set[Request] = set()
    for index in range(30):
        request = make_request(
            f"r{index}", random_prompt(rng, 40), rng.randint(1, 24), seed=index, arrival=clock.now,
            priority=rng.randint(-1, 1), client=f"c{index % 3}",
        )  # fmt: skip
        requests.append(request)
        core.add(request)
        for _ in range(rng.randint(0, 3)):
            core.step()
            core.scheduler.check_integrity()
            clock.now += rng.uniform(0.001, 0.05)
        if rng.random() < 0.5:
            core.retune(rng.choice(ARMS))
            core.scheduler.check_integrity()
        if rng.random() < 0.05:
            core.end(request.id, FinishReason.ABORT)
            aborted.add(request)
    run_to_end(core)
    for index, request in enumerate(requests):
        if request not in aborted:
            length = request.max_tokens
            assert request.output_token_ids == expected_tokens(request.prompt_token_ids, index, length)  # type: ignore[arg-type]
    assert fake.num_dispatched > 10


def test_a_budget_is_a_cap_within_the_compiled_shapes() -> None:
    core, fake = make_core(token_budget=32)
    core.add(make_request("long", list(range(60)), 2))
    core.retune(Arm(12, "fcfs", "watermark"))
    core.step()
    core.step()
    core.retune(Arm(32, "fcfs", "watermark"))
    run_to_end(core)
    assert [sum(row.num_tokens for row in batch.plan.rows) for batch in fake.batches][:3] == [12, 12, 32]


def test_a_new_ordering_puts_those_who_wait_in_order() -> None:
    log: list[dict[str, Any]] = []
    core, _ = make_core(num_slots=1, token_budget=64, decision_log=DecisionLog(log.append))
    for name, length in (("running", 4), ("long", 40), ("middle", 20), ("short", 5)):
        core.add(make_request(name, [1] * length, 3))
    core.step()
    core.retune(Arm(64, "sjf", "watermark"))
    run_to_end(core)
    admitted = [record["request"] for record in log if record["decision"] == "admit"]
    assert admitted == ["running", "short", "middle", "long"]


def test_who_waited_long_is_not_made_to_start_again() -> None:
    """`mlfq` counts waiting from the time it was told: a change of ordering must not hide what was before."""
    clock = ManualClock()
    core, _ = make_core(num_slots=1, clock=clock, max_wait_s=10.0)
    core.add(make_request("running", [1], 60))
    core.step()
    core.add(make_request("old", [1] * 31, 3))
    clock.now = 9.0
    core.add(make_request("fresh", [1], 3, arrival=9.0))
    core.retune(Arm(32, "mlfq", "watermark"))
    clock.now = 11.0
    core.scheduler._waiting.refresh(11.0)  # pyright: ignore[reportPrivateUsage]
    head = core.scheduler._waiting.peek()  # pyright: ignore[reportPrivateUsage]
    assert head is not None
    assert head.id == "old"
    run_to_end(core)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), after=st.sampled_from(["fcfs", "sjf", "mlfq", "fair", "lpm"]))
def test_a_reordered_queue_is_a_queue_made_anew(seed: int, after: str) -> None:
    rng = random.Random(seed)
    context = make_context()
    queue = WaitingQueue(ORDERINGS["fcfs"](context))
    members = [
        make_request(f"r{i}", [1] * rng.randint(1, 50), 5, arrival=float(i))
        for i in range(rng.randint(0, 30))
    ]
    for request in members:
        queue.push(request, request.arrival_time)
    for request in rng.sample(members, len(members) // 3):
        queue.remove(request)
        members.remove(request)
    queue.reorder(ORDERINGS[after](context), 100.0)
    ordering = ORDERINGS[after](context)
    fresh = WaitingQueue(ordering)
    for request in members:
        if isinstance(ordering, RequestObserver):
            ordering.queued(request, request.arrival_time)
        fresh.push(request, 100.0)
    assert len(queue) == len(fresh) == len(members)
    while (head := queue.peek()) is not None:
        assert head is fresh.peek()
        assert queue.oldest_arrival == fresh.oldest_arrival
        queue.remove(head)
        fresh.remove(head)
    assert len(fresh) == queue.num_tokens == 0


def learning_run(
    log: LearningLog | None, config: LearningConfig, *, seconds: float = 90.0
) -> tuple[EngineCore[object], list[Request]]:
    """A core that learns (without a log: one that does not), under requests that never stop coming."""

    def tuner(assembly: Assembly, costs: CostModel) -> Tuner:
        assert log is not None
        return make_tuner(config, assembly, costs, records=log.records, write=log.write)

    rng, clock = random.Random(7), ManualClock()
    core, _ = make_core(
        clock=clock, token_budget=32, tuner=None if log is None else tuner, ttft_slo_s=5.0, tpot_slo_s=1.0
    )
    requests: list[Request] = []
    while clock.now < seconds:
        index = len(requests)
        request = make_request(
            f"r{index}", random_prompt(rng, 20), rng.randint(1, 8), seed=index, arrival=clock.now
        )
        requests.append(request)
        core.add(request)
        for _ in range(4):
            core.step()
            core.scheduler.check_integrity()
            clock.now += 0.02
    run_to_end(core)
    return core, requests


def test_an_engine_that_learns_makes_the_same_tokens(tmp_path: Path) -> None:
    config = LearningConfig(learning="on", learning_log=str(tmp_path / "log.jsonl"), learning_epoch_s=2.0)
    log = LearningLog(config)
    core, requests = learning_run(log, config)
    stats = core.learning_stats()
    assert stats is not None
    assert stats["epochs"] > 30
    assert len(stats["plays"]) > 3, "arms do change"
    _, plain = learning_run(None, config)
    assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in plain]
    log.close()

    # A restart goes on where the log ends, even if the engine died while it wrote a line.
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == stats["epochs"] + 1
    with path.open("a") as file:
        file.write('{"epoch": 9')
    again = LearningLog(config)
    assert again.records == [json.loads(line) for line in lines]
    core, _ = learning_run(again, config, seconds=10.0)
    restarted = core.learning_stats()
    assert restarted is not None
    assert restarted["epochs"] > stats["epochs"]
    assert restarted["learnt"] > stats["learnt"]
    again.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["epoch"] for record in records[1:]] == list(range(restarted["epochs"]))


def test_the_first_arm_after_a_restart_is_that_of_the_log(tmp_path: Path) -> None:
    config = LearningConfig(learning="on", learning_log=str(tmp_path / "log.jsonl"), learning_epoch_s=2.0)
    log = LearningLog(config)
    core, _ = learning_run(log, config)
    log.close()
    last = core.learning_stats()
    log = LearningLog(config)
    again, _ = learning_run(log, config, seconds=1.0)
    log.close()
    first = again.learning_stats()
    assert last is not None
    assert first is not None
    assert first["arm"] == last["arm"]


@pytest.mark.parametrize("text", ["hello\n", '{"version": 1}\n{"epoch"\n'])
def test_what_is_no_learning_log_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="learning_log="):
        LearningLog(LearningConfig(learning="on", learning_log=str(path)))
    assert path.read_text() == text, "nobody's file is damaged"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"learning": "maybe"}, "learning='maybe': must be one of off, on, frozen"),
        ({"learning": "frozen"}, "learning='frozen': needs a learning_log or a learning_prior"),
        ({"learning_epoch_s": 0.1}, r"learning_epoch_s=0.1: must be in \[1, 3600\]"),
        ({"reward_ttft_weight": -1.0}, r"reward_ttft_weight=-1.0: must be in \[0, 100\]"),
        ({"learning_log": ""}, "learning_log='': must be a path"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EngineConfig.from_flat(options)


class FakeNvml:
    """Two devices that count millijoules, the second from 500."""

    NVMLError = ValueError

    def __init__(self) -> None:
        self.used_mj = 0

    def nvmlInit(self) -> None:
        if self.used_mj < 0:
            raise self.NVMLError("no driver")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.used_mj + 500 * handle


def test_a_meter_counts_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = make_meter("gpu", [0, 1], UnknownDevice(), 0.0)
    assert isinstance(meter, NvmlEnergy)
    assert meter.joules(1.0) == 0.0
    nvml.used_mj = 3000
    assert meter.joules(2.0) == 6.0
    nvml.used_mj = -1
    assert make_meter("gpu", [0, 1], UnknownDevice(), 0.0) is None


def test_without_a_meter_energy_is_modelled_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    roofline = Roofline(device_profile("H100"), model_shape("llama-3-8b"))
    meter = make_meter("gpu", [0], roofline, 0.0)
    assert meter is not None
    assert meter.source == "modelled"
    assert make_meter("gpu", [0], UnknownDevice(), 0.0) is None
    assert make_meter("cpu", [0], UnknownDevice(), 0.0) is None
