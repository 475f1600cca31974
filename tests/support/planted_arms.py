"""A planted world for the tuner: how many requests an arm serves well is a table, by load."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

from jaxserve.core.buckets import BucketLadder, default_decode_rows
from jaxserve.core.cost_model import CostModel
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.energy import EnergyMeter
from jaxserve.core.learning.guard import Guard
from jaxserve.core.learning.linucb import ArmPrior
from jaxserve.core.learning.reward import Objectives
from jaxserve.core.learning.tuner import LearningOptions, QueueState, Tuner
from jaxserve.core.roofline import Roofline, device_profile, model_shape
from jaxserve.request import FinishReason, Request, RequestStatus, SamplingParams
from jaxserve.simulator.tokens import BlockTokens

EPOCH_S = 20.0
NUM_SLOTS = 64
LADDER = BucketLadder(default_decode_rows(NUM_SLOTS, 1), (128, 256, 512, 1024, 2048), NUM_SLOTS)
# Nothing is unsafe: a full step takes 0.06 s.
EASY = Objectives(ttft_slo_s=5.0, tpot_slo_s=0.2)
FOUR_ARMS = (
    Arm(2048, "fcfs", "watermark"),
    Arm(2048, "sjf", "watermark"),
    Arm(512, "fcfs", "watermark"),
    Arm(512, "sjf", "watermark"),
)


class PlantedLoad(NamedTuple):
    """Lengths of all requests, how many come in an epoch, and the share that each arm serves well."""

    prompt_tokens: int
    output_tokens: int
    good_shares: tuple[float, ...]
    num_requests: int = 40


def make_planted_tuner(
    arms: Sequence[Arm] = FOUR_ARMS,
    *,
    objectives: Objectives = EASY,
    is_frozen: bool = False,
    seed: int = 0,
    priors: Sequence[ArmPrior | None] = (),
    meter: EnergyMeter | None = None,
    write: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Tuner:
    """A tuner of an 8B model on an H100; the cost model knows it, nothing runs."""
    costs = CostModel(Roofline(device_profile("H100"), model_shape("llama-3-8b")))
    return Tuner(
        arms=arms,
        objectives=objectives,
        guard=Guard(costs, LADDER, objectives, num_slots=NUM_SLOTS, num_cache_tokens=400_000),
        num_slots=NUM_SLOTS,
        options=LearningOptions(is_frozen, EPOCH_S, seed),
        priors=priors,
        meter=meter,
        write=write,
    )


@final
class PlantedWorld:
    """Feeds a tuner with requests that arrive evenly, and end as the arm in force deserves."""

    def __init__(self, tuner: Tuner, arms: Sequence[Arm] = FOUR_ARMS, seed: int = 1) -> None:
        self.tuner = tuner
        self.now = 0.0
        self.played: list[int] = []
        self._arms = list(arms)
        self._chance = random.Random(seed)
        self._count = 0

    def run_epoch(self, load: PlantedLoad) -> None:
        """Lets one epoch pass, and the tuner choose."""
        arm = self._arms.index(self.tuner.arm)
        self.played.append(arm)
        start, gap_s = self.now, EPOCH_S / load.num_requests
        for number in range(load.num_requests):
            self.now = start + number * gap_s
            request = self._request(load)
            self.tuner.arrived(request, self.now)
            is_good = self._chance.random() < load.good_shares[arm]
            request.first_scheduled_time = self.now
            request.first_token_time = self.now + (0.1 if is_good else 7.5)
            request.finish_time = request.first_token_time + 0.01 * (load.output_tokens - 1)
            self.tuner.finished(request, self.now)
        self.now = start + EPOCH_S
        assert self.tuner.is_due(self.now)
        self.tuner.choose(self.now, QueueState(num_waiting=0, kv_occupancy=0.5))

    def _request(self, load: PlantedLoad) -> Request:
        self._count += 1
        request = Request(
            id=str(self._count),
            prompt_token_ids=BlockTokens((), 512, load.prompt_tokens, -self._count),
            params=SamplingParams(max_tokens=None),
            arrival_time=self.now,
            max_tokens=load.output_tokens,
            seed=0,
        )
        request.output_token_ids = [0] * load.output_tokens
        request.status, request.finish_reason = RequestStatus.FINISHED, FinishReason.STOP
        return request


def mean_reward(records: Sequence[Mapping[str, Any]]) -> float:
    """Of the epochs of a log."""
    rewards = [record["reward"] for record in records if "reward" in record]
    return sum(rewards) / len(rewards)
