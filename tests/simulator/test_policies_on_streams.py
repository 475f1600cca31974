"""What orderings promise on long streams: predictions are worth something only if they are right."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import StepPlan, StepResult
from jaxserve.core.policies.registry import ORDERINGS
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.simulation import SimulationOptions, simulate
from jaxserve.simulator.trace import TraceRequest, poisson
from tests.support.engine_parts import ManualClock, make_core, make_request
from tests.support.policy_parts import serve

BUCKETS = (64, 256, 1024, 2048)


def _stream(count: int, rate: float) -> list[TraceRequest]:
    """Outputs that are log-normal with sigma 1, as in chats."""
    rng = random.Random(3)
    lengths = [
        TraceRequest(0.0, rng.randint(50, 500), min(2000, round(rng.lognormvariate(5.0, 1.0)) + 1))
        for _ in range(count)
    ]
    return poisson(lengths, rate, seed=4)


def _e2e(predictor: str, **scheduler: Any) -> tuple[float, float]:
    """Mean and P99, seconds."""
    cluster = make_cluster(
        ClusterConfig(token_buckets=BUCKETS), SchedulerConfig(max_num_seqs=16, **scheduler)
    )
    metrics = simulate(_stream(1500, 8.0), cluster, SimulationOptions(predictor=predictor)).metrics()
    return metrics["e2e_mean_s"][0], metrics["e2e_p99_s"][0]


@pytest.mark.slow
def test_a_shuffled_predictor_destroys_what_a_right_one_gains() -> None:
    found = {"fcfs": _e2e("mean")}
    for predictor in ("oracle", "noisy", "shuffled", "constant"):
        found[predictor] = _e2e(predictor, ordering="sjf", max_wait_s=60.0)
    gain = {name: 1 - mean / found["fcfs"][0] for name, (mean, _) in found.items()}
    assert gain["oracle"] > 0.15
    assert gain["oracle"] >= gain["noisy"] > 0.6 * gain["oracle"]
    assert gain["shuffled"] < 0.1
    assert found["shuffled"][1] > max(found["noisy"][1], 1.5 * found["fcfs"][1]), (
        "who is long by mistake pays"
    )
    assert gain["constant"] > -0.05, "a predictor that says nothing costs next to nothing"


class _WatchedExecutor:
    """Answers at once; when a step is launched, nobody may wait beside a free slot and an unspent budget."""

    def __init__(self, num_slots: int, budget: int) -> None:
        self.core: Any = None
        self.num_checked = 0
        self._num_slots = num_slots
        self._budget = budget

    def dispatch(self, batch: StepBatch) -> StepPlan:
        stats = self.core.scheduler.stats()
        if stats.num_waiting:
            self.num_checked += 1
            assert stats.num_running == self._num_slots or batch.plan.num_tokens >= self._budget
        return batch.plan

    def collect(self, handle: StepPlan) -> StepResult:
        return StepResult([[1] * len(handle.rows)], device_s=1e-3)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_no_slot_is_idle_while_somebody_waits(ordering: str) -> None:
    clock, rng = ManualClock(), random.Random(5)
    executor = _WatchedExecutor(4, 128)
    core, _ = make_core(
        clock=clock, executor=executor, num_slots=4, num_pages=4000, page_size=16, token_budget=128,
        ordering=ordering, max_wait_s=0.5, pipeline_depth=0,
    )  # fmt: skip
    executor.core = core
    requests = [
        make_request(
            str(i), [i] * rng.randint(1, 200), rng.randint(1, 60), arrival=0.02 * i,
            client=f"c{i % 3}", priority=i % 2,
        )
        for i in range(120)
    ]  # fmt: skip
    serve(core, clock, requests)
    assert executor.num_checked > 100
