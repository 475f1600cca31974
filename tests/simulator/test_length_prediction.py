"""What predictions that are learnt on the way do to service: they help where there is something to learn, and
nothing that an expert says can do more harm than knowing nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.fused_predictor import FusedLengthPredictor, default_experts
from jaxserve.core.fusion import BASELINE
from jaxserve.core.predictor import LengthPrediction, LengthPredictor
from jaxserve.request import Request
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.simulation import SimulationOptions, simulate
from jaxserve.simulator.trace import TraceRequest, poisson

BUCKETS = (64, 256, 1024, 2048)


AMPLE = ClusterConfig(token_buckets=BUCKETS)


def stream(count: int, rate: float) -> list[TraceRequest]:
    """Three kinds of prompts, of different sizes, whose answers have their own typical length.

    One client: where there are several, `sjf` lets none of them get far ahead, whatever is predicted.
    """
    rng = random.Random(3)
    rows: list[TraceRequest] = []
    for _ in range(count):
        prompt, mean = rng.choice([((300, 500), 20.0), ((40, 60), 150.0), ((130, 250), 700.0)])
        length = min(2000, round(rng.lognormvariate(math.log(mean), 0.5)) + 1)
        rows.append(TraceRequest(0.0, rng.randint(*prompt), length))
    return poisson(rows, rate, seed=4)


TRACE = stream(1000, 6.0)
LENGTHS = {str(index): row.output_tokens for index, row in enumerate(TRACE)}


def e2e_mean_s(
    predictor: LengthPredictor | str,
    machine: ClusterConfig = AMPLE,
    **scheduler: object,
) -> float:
    cluster = make_cluster(
        machine,
        SchedulerConfig(max_num_seqs=16, **scheduler),  # type: ignore[arg-type]
    )
    if isinstance(predictor, str):
        return simulate(TRACE, cluster, SimulationOptions(predictor=predictor)).metrics()["e2e_mean_s"][0]
    result = simulate(TRACE, cluster, SimulationOptions(), predictor=predictor)
    return result.metrics()["e2e_mean_s"][0]


@pytest.fixture(scope="module")
def fcfs_s() -> float:
    return e2e_mean_s("mean", ordering="fcfs")


class _Told:
    """An expert that knows true lengths, and says something else."""

    def __init__(self, say: Callable[[float], float]) -> None:
        self._say = say

    def estimate(self, request: Request, prior: float) -> float | None:
        return self._say(math.log1p(LENGTHS[request.id]))

    def observe(self, request: Request, z: float) -> None:
        pass


def test_what_prompts_look_like_is_learnt_and_pays(fcfs_s: float) -> None:
    fused, oracle = (e2e_mean_s(name, ordering="sjf", max_wait_s=60.0) for name in ("fused", "oracle"))
    assert fused < 0.95 * fcfs_s
    assert fcfs_s - fused > 0.5 * (fcfs_s - oracle)


def reversed_length(z: float) -> float:
    """Who is long is called short, and nobody ever outgrows what was said."""
    return math.log1p(4500.0 - 2.0 * math.expm1(z))


hostile = pytest.mark.parametrize(
    "say",
    [reversed_length, lambda z: 9.0 - z, lambda z: 5.0, lambda z: 40.0 * (z - 5.0)],
    ids=["reversed", "reversed logarithm", "constant", "exaggerated"],
)


@hostile
def test_a_bad_expert_costs_no_more_than_five_percent(fcfs_s: float, say: Callable[[float], float]) -> None:
    alone = FusedLengthPredictor({BASELINE: default_experts()[BASELINE], "bad": _Told(say)})
    assert e2e_mean_s(alone, ordering="sjf", max_wait_s=60.0) < 1.05 * fcfs_s


# Somebody is preempted now and then; where requests wait for pages most of the time.
SHORT_OF_PAGES, OVERLOADED = (
    ClusterConfig(token_buckets=BUCKETS, page_size=16, num_pages=pages) for pages in (700, 450)
)
LOOPS = {"ordering": "fcfs", "max_decode_steps": 8}


@pytest.fixture(scope="module")
def greedy_s() -> float:
    """First come, first served, whoever fits now, and the latest gives way; the same loops."""
    return e2e_mean_s("mean", SHORT_OF_PAGES, victim="latest", **LOOPS)


@hostile
def test_bad_victims_and_loops_cost_no_more_than_five_percent(
    greedy_s: float, say: Callable[[float], float]
) -> None:
    bad = FusedLengthPredictor({BASELINE: default_experts()[BASELINE], "bad": _Told(say)})
    assert e2e_mean_s(bad, SHORT_OF_PAGES, victim="value", **LOOPS) < 1.05 * greedy_s


def test_admission_by_predictions_that_know_nothing_does_harm() -> None:
    """A limit of ``predicted`` that docs/memory.md tells of: pages are kept free for what does not come."""
    greedy, known, unknown = (
        e2e_mean_s(predictor, OVERLOADED, capacity=capacity, victim="value", **LOOPS)
        for predictor, capacity in (
            ("mean", "watermark"),
            ("oracle", "predicted"),
            (FusedLengthPredictor({BASELINE: default_experts()[BASELINE]}), "predicted"),
        )
    )
    assert known < 1.5 * greedy
    assert unknown > 2.0 * greedy


def test_a_bad_expert_does_not_keep_good_ones_from_being_heard(fcfs_s: float) -> None:
    predictor = FusedLengthPredictor({**default_experts(), "bad": _Told(reversed_length)})
    assert e2e_mean_s(predictor, ordering="sjf", max_wait_s=60.0) < 0.95 * fcfs_s


class _Believed:
    """Says to the scheduler what `_Told` says to the fusion."""

    def predict(self, request: Request) -> LengthPrediction:
        length = math.expm1(reversed_length(math.log1p(LENGTHS[request.id])))
        return LengthPrediction(length, length)

    def observe(self, request: Request) -> None:
        pass


def test_the_same_lies_believed_do_harm(fcfs_s: float) -> None:
    assert e2e_mean_s(_Believed(), ordering="sjf", max_wait_s=60.0) > 1.1 * fcfs_s
