"""Online learning on planted arms: what is best is known, so what is missed can be counted."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import numpy as np
import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.learning.arms import Arm, default_arm, make_arms
from jaxserve.core.learning.context import FEATURES, Context, ContextTracker, Load, quantile
from jaxserve.core.learning.decider import BAD_EPOCHS, DEFAULT, REST_EPOCHS, Decider
from jaxserve.core.learning.energy import modelled_energy
from jaxserve.core.learning.guard import Guard
from jaxserve.core.learning.linucb import ALPHA, WINDOW, ArmPrior, LinUCB
from jaxserve.core.learning.prior import prior_entry, prior_to_json, read_prior
from jaxserve.core.learning.reward import EpochMeasures, Objectives
from jaxserve.core.learning.tuner import QueueState
from jaxserve.core.roofline import Roofline, device_profile, model_shape
from jaxserve.errors import ConfigError
from tests.support.planted_arms import (
    EASY,
    FOUR_ARMS,
    LADDER,
    NUM_SLOTS,
    PlantedLoad,
    PlantedWorld,
    make_planted_tuner,
    mean_reward,
)

CHAT = PlantedLoad(300, 300, (0.95, 0.75, 0.65, 0.5))
CODE = PlantedLoad(2000, 30, (0.6, 0.95, 0.7, 0.5))
DOCUMENTS = PlantedLoad(6000, 100, (0.5, 0.65, 0.75, 0.95))


def worth(load: PlantedLoad, arms: list[int]) -> float:
    return float(np.mean([load.good_shares[arm] for arm in arms]))


# ---------------------------------------------------------------------- planted arms


@pytest.mark.parametrize("load", [CHAT, CODE, DOCUMENTS])
@pytest.mark.parametrize("seed", range(3))
def test_regret_is_small_on_a_stationary_load(load: PlantedLoad, seed: int) -> None:
    world = PlantedWorld(make_planted_tuner(seed=seed), seed=seed)
    for _ in range(200):
        world.run_epoch(load)
    best = max(load.good_shares)
    assert worth(load, world.played[50:]) >= 0.95 * best
    assert len(set(world.played)) == len(FOUR_ARMS), "each is tried"


@pytest.mark.parametrize("seed", range(3))
def test_alternating_load_beats_any_single_arm(seed: int) -> None:
    chat, code = (
        CHAT._replace(good_shares=(0.95, 0.6, 0.7, 0.5)),
        CODE._replace(good_shares=(0.6, 0.95, 0.7, 0.5)),
    )
    world = PlantedWorld(make_planted_tuner(seed=seed), seed=seed)
    loads = [chat if (epoch // 50) % 2 == 0 else code for epoch in range(600)]
    for load in loads:
        world.run_epoch(load)
    achieved = np.mean([load.good_shares[arm] for load, arm in zip(loads, world.played, strict=True)])
    single = max(np.mean([load.good_shares[arm] for load in loads]) for arm in range(4))
    assert achieved >= 1.08 * single


def test_without_its_context_it_could_not() -> None:
    """Poison: the same load features for both loads, and the gain is gone."""
    chat = CHAT._replace(good_shares=(0.95, 0.6, 0.7, 0.5))
    code = chat._replace(good_shares=(0.6, 0.95, 0.7, 0.5))
    world = PlantedWorld(make_planted_tuner())
    loads = [chat if (epoch // 5) % 2 == 0 else code for epoch in range(600)]
    for load in loads:
        world.run_epoch(load)
    achieved = np.mean([load.good_shares[arm] for load, arm in zip(loads, world.played, strict=True)])
    assert achieved < 1.08 * 0.775


@pytest.mark.parametrize("seed", range(3))
def test_where_all_are_alike_nothing_is_lost(seed: int) -> None:
    load = CHAT._replace(good_shares=(0.9,) * 4)
    learner: list[dict[str, Any]] = []
    default: list[dict[str, Any]] = []
    world = PlantedWorld(make_planted_tuner(seed=seed, write=learner.append), seed=seed)
    alone = PlantedWorld(make_planted_tuner(FOUR_ARMS[:1], write=default.append), seed=seed + 100)
    for _ in range(400):
        world.run_epoch(load)
        alone.run_epoch(load)
    assert len(set(world.played)) > 1
    assert mean_reward(learner) == pytest.approx(mean_reward(default), rel=0.02)


def test_an_unsafe_arm_is_never_played() -> None:
    """A full step of 2048 tokens takes 50 ms: with an objective of 12 ms for a token it is unsafe.

    It would pay best, and it is tempting again and again: loads change all the time.
    """
    strict = Objectives(ttft_slo_s=5.0, tpot_slo_s=0.012)
    arms = (Arm(256, "fcfs", "watermark"), Arm(256, "sjf", "watermark"), Arm(2048, "fcfs", "watermark"))
    records: list[dict[str, Any]] = []
    world = PlantedWorld(make_planted_tuner(arms, objectives=strict, write=records.append), arms)
    chance = random.Random(0)
    for _ in range(10_000):
        lengths = chance.randint(6000, 9000), chance.randint(20, 60)
        world.run_epoch(PlantedLoad(*lengths, (0.5, 0.4, 1.0), num_requests=25))
    assert world.played.count(2) == 0
    assert world.played.count(1) > 10, "others are explored"
    assert all(2 not in record["safe"] for record in records[1:])
    assert sum(0 in record["safe"] for record in records[1:]) > 9_000


def test_the_objective_decides_what_is_unsafe() -> None:
    """Metamorphic: the same load and arms; only the objective moves."""
    load = Load(2.5, 10_000.0, 4000.0, 4100.0**2, 5000.0, 40.0, 30.0)
    costs = CostModel(Roofline(device_profile("H100"), model_shape("llama-3-8b")))

    def safe(**slo: float) -> list[int]:
        objectives = Objectives(**slo)  # type: ignore[arg-type]
        guard = Guard(costs, LADDER, objectives, num_slots=NUM_SLOTS, num_cache_tokens=400_000)
        return [b for b in (128, 256, 512, 1024, 2048) if guard.is_safe(guard.forecast(b, load))]

    assert safe(ttft_slo_s=5.0, tpot_slo_s=1.0) == [128, 256, 512, 1024, 2048]
    assert safe(ttft_slo_s=5.0, tpot_slo_s=0.012) == [128, 256, 512]
    assert safe(ttft_slo_s=0.01, tpot_slo_s=1.0) == []


def test_forecasts_move_with_the_load() -> None:
    costs = CostModel(Roofline(device_profile("H100"), model_shape("llama-3-8b")))
    guard = Guard(costs, LADDER, EASY, num_slots=NUM_SLOTS, num_cache_tokens=400_000)

    def forecast(rate: float, prompt: float = 1000.0, output: float = 200.0, budget: int = 512):
        load = Load(rate, rate * prompt, prompt, prompt**2, 2 * prompt, output, output / 3)
        return guard.forecast(budget, load)

    rising = [forecast(rate) for rate in (0.5, 2.0, 4.0, 8.0)]
    assert all(a.ttft_s < b.ttft_s and a.tpot_s < b.tpot_s for a, b in itertools.pairwise(rising))
    assert forecast(2.0, prompt=4000.0).ttft_s > forecast(2.0).ttft_s
    assert forecast(2.0, budget=2048).tpot_s > forecast(2.0, budget=128).tpot_s
    assert forecast(100.0).ttft_s == forecast(100.0).tpot_s == np.inf  # 100,000 prompt tokens a second
    assert forecast(8.0, prompt=100.0, output=5000.0).tpot_s == np.inf  # more decodes than slots
    small = Guard(costs, LADDER, EASY, num_slots=NUM_SLOTS, num_cache_tokens=3000)
    load = Load(4.0, 4000.0, 1000.0, 1e6, 2000.0, 200.0, 70.0)
    assert small.forecast(512, load).ttft_s == np.inf  # more decodes than pages


# ---------------------------------------------------------------------- the same again


def logged(seed: int = 3, epochs: int = 300, **options: Any) -> tuple[PlantedWorld, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    world = PlantedWorld(make_planted_tuner(seed=seed, write=records.append, **options), seed=seed)
    for epoch in range(epochs):
        world.run_epoch((CHAT, CODE, DOCUMENTS)[epoch // 40 % 3])
    return world, json.loads(json.dumps(records))


def test_the_same_seed_makes_the_same_choices() -> None:
    (world, records), (again, records_again) = logged(), logged()
    assert world.played == again.played
    assert records == records_again
    assert logged(seed=4)[0].played != world.played


def test_a_restart_makes_the_decisions_of_its_log_again() -> None:
    world, records = logged()
    fresh = make_planted_tuner(seed=3)
    fresh.restore(records)
    assert fresh.stats()["differing"] == 0
    assert fresh.arm == world.tuner.arm
    assert fresh.stats() == world.tuner.stats()
    # ... and those after it: what both are told from here on is the same.
    deciders = [tuner._decider for tuner in (fresh, world.tuner)]  # pyright: ignore[reportPrivateUsage]
    for number in range(100):
        features = np.array([1.0, number / 100, 0.5, -0.5, 0.2, 0.0, 1.0])
        decisions = [decider.decide(features, range(4)) for decider in deciders]
        assert decisions[0] == decisions[1]
        for decider in deciders:
            decider.learn(decisions[0].arm, features, number % 7 / 7, missed=number % 3 == 0)


def test_a_log_that_was_changed_decides_otherwise() -> None:
    _, records = logged()
    for record in records[1:]:
        record["reward"] = -record["reward"]
    other = make_planted_tuner(seed=3)
    other.restore(records)
    assert other.stats()["differing"] > 10


def test_a_log_of_other_arms_is_refused() -> None:
    _, records = logged(epochs=2)
    with pytest.raises(ConfigError, match=r"learning_log: its arms .* name another file"):
        make_planted_tuner(FOUR_ARMS[:3]).restore(records)
    with pytest.raises(ConfigError, match="learning_log: its seed is 3, this engine's is 5"):
        make_planted_tuner(seed=5).restore(records)


def test_every_choice_has_its_propensity() -> None:
    _, records = logged(epochs=600)
    explored = 0
    for record in records[1:]:
        decision, safe = record["decision"], record["safe"]
        scores = [mean + bonus for mean, bonus in zip(decision["means"], decision["bonuses"], strict=True)]
        if not safe:
            assert (decision["arm"], decision["propensity"]) == (DEFAULT, 1.0)
        elif decision["reason"] in ("best", "explored"):
            is_best = decision["arm"] == max(safe, key=lambda arm: scores[arm])
            assert decision["propensity"] == pytest.approx(0.02 / len(safe) + 0.98 * is_best)
            explored += decision["reason"] == "explored"
    assert 3 <= explored <= 30, "one in fifty"


def test_frozen_plays_the_best_mean_and_learns_nothing() -> None:
    _, records = logged()
    written: list[dict[str, Any]] = []
    tuner = make_planted_tuner(seed=3, is_frozen=True, write=written.append)
    tuner.restore(records)
    assert tuner.stats()["differing"] == 0
    learnt = tuner.stats()["learnt"]
    world = PlantedWorld(tuner)
    misleading = CHAT._replace(good_shares=(0.0, 1.0, 1.0, 1.0))
    for _ in range(60):
        world.run_epoch(misleading)
    assert tuner.stats()["learnt"] == learnt
    assert set(world.played[5:]) == {0}, "what was best for chats"
    assert {record["decision"]["reason"] for record in written[5:]} == {"frozen"}
    assert not any(record["learns"] for record in written)


# ---------------------------------------------------------------------- the parts


def test_two_bad_epochs_and_the_default_rests_the_engine() -> None:
    decider = Decider(2, 1, seed=0)
    one = np.ones(1)
    for _ in range(5):
        decider.learn(DEFAULT, one, 0.5, missed=False)
    assert not decider.learn(1, one, 0.9, missed=True), "missed, but worth more than the default"
    assert not decider.learn(1, one, 0.1, missed=False), "worth little, but nothing was missed"
    assert decider.learn(1, one, 0.1, missed=True)
    assert not decider.learn(DEFAULT, one, 0.1, missed=True), "the default is no refuge from itself"
    for _ in range(BAD_EPOCHS):
        assert decider.learn(1, one, 0.1, missed=True)
    reasons = [decider.decide(one, [0, 1]).reason for _ in range(REST_EPOCHS + 1)]
    assert reasons == ["rest"] * REST_EPOCHS + ["best"]


def test_no_safe_arm_means_the_default() -> None:
    decision = Decider(3, 1).decide(np.ones(1), [])
    assert (decision.arm, decision.propensity, decision.reason) == (DEFAULT, 1.0, "unsafe")


def test_estimates_are_those_of_ridge_regression() -> None:
    """Against the textbook's loop, for epochs in the window and a prior."""
    chance = np.random.default_rng(0)
    prior_rows, prior_rewards = np.c_[np.ones(9), chance.normal(size=(9, 2))], chance.normal(size=9)
    prior = ArmPrior(prior_rows.T @ prior_rows, prior_rows.T @ prior_rewards)
    bandit = LinUCB(2, 3, [None, prior])
    epochs = [
        (int(chance.integers(2)), np.array([1.0, *chance.normal(size=2)]), float(chance.normal()))
        for _ in range(WINDOW + 50)
    ]
    for epoch in epochs:
        bandit.learn(*epoch)
    x = np.array([1.0, 0.3, -0.7])
    found = bandit.estimates(x)
    kept = epochs[-WINDOW:]
    mean = (sum(r for *_, r in kept) + prior_rewards.sum()) / (WINDOW + 9)
    for arm in range(2):
        rows = [row for played, row, _ in kept if played == arm] + (list(prior_rows) if arm else [])
        rewards = [r for played, _, r in kept if played == arm] + (list(prior_rewards) if arm else [])
        a, b = np.eye(3), np.zeros(3)
        for row, reward in zip(rows, rewards, strict=True):
            a += np.outer(row, row)
            b += (reward - mean) * row
        assert found.means[arm] == pytest.approx(mean + np.linalg.solve(a, b) @ x)
        assert found.bonuses[arm] == pytest.approx(ALPHA * np.sqrt(x @ np.linalg.solve(a, x)))
        assert found.plays[arm] == len(rows)


def test_arms_stay_within_the_compiled_shapes() -> None:
    ladder = BucketLadder((8, 64), (128, 512, 640, 2048), 64)
    arms = make_arms(SchedulerConfig(ordering="sjf"), ladder, 64)
    assert len(arms) == len(set(arms)) == 4 * 3 * 2
    assert arms[0] == default_arm(SchedulerConfig(ordering="sjf"), ladder) == Arm(2048, "sjf", "watermark")
    assert {arm.max_num_batched_tokens for arm in arms} == {2048, 640, 512, 128}
    fair = make_arms(SchedulerConfig(ordering="fair"), ladder, 64)
    assert {arm.ordering for arm in fair} == {"fair"}, "fairness is a promise"
    everything = make_arms(SchedulerConfig(), LADDER, NUM_SLOTS)
    assert len(everything) == 24


def measures(**changed: Any) -> EpochMeasures:
    usual: dict[str, Any] = {
        "seconds": 20.0, "num_arrived": 100, "num_finished": 100, "num_unserved": 0, "num_counted": 100,
        "num_good": 90, "ttft_p99_s": 0.5, "tpot_p99_s": 0.02, "output_tokens": 1000, "joules": 500.0,
    }  # fmt: skip
    return EpochMeasures(**(usual | changed))


def test_a_reward_is_what_the_formula_says() -> None:
    objectives = Objectives(
        ttft_slo_s=1.0, tpot_slo_s=0.05, ttft_weight=0.4, tpot_weight=0.8, energy_weight=0.1
    )
    assert objectives.reward(measures(), None) == pytest.approx(0.9)
    assert objectives.reward(measures(num_unserved=100), None) == pytest.approx(0.45)
    assert objectives.reward(measures(ttft_p99_s=1.5), None) == pytest.approx(0.9 - 0.4 * 0.5)
    assert objectives.reward(measures(ttft_p99_s=50.0), None) == pytest.approx(0.9 - 0.4)
    assert objectives.reward(measures(tpot_p99_s=0.06), None) == pytest.approx(0.9 - 0.8 * 0.2)
    assert objectives.reward(measures(), 0.25) == pytest.approx(0.9 - 0.1 * 2.0)
    assert objectives.reward(measures(joules=None), 0.25) == pytest.approx(0.9)


def test_contexts_follow_the_load() -> None:
    tracker = ContextTracker()
    for number in range(600):
        tracker.arrived(1000 if number < 300 else 4000, priority=number % 2, now=number * 0.25)
        tracker.finished(50, now=number * 0.25)
    context = tracker.context(150.0, kv_occupancy=0.5, num_waiting=64)
    assert context.arrivals_s == pytest.approx(4.0, rel=0.05)
    assert context.prompt_tokens == pytest.approx(4000, rel=0.1)
    assert context.output_tokens == pytest.approx(50)
    assert context.interactive_share == pytest.approx(0.5, abs=0.02)
    features = dict(zip(FEATURES, context.features(64).tolist(), strict=True))
    assert features["one"] == 1.0
    assert features["queue"] == features["kv_occupancy"] == 0.5
    assert features["prompt_tokens"] == pytest.approx(0.5 * np.log2(context.prompt_tokens / 1024))
    load = tracker.load(150.0)
    assert load is not None
    assert load.requests_s == pytest.approx(4.0)
    assert load.prompt_tokens_s == pytest.approx(16_000.0)
    assert load.long_prompt == 4000
    assert ContextTracker().load(100.0) is None


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_quantiles_are_numpys(share: float, count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))


def test_one_arm_in_force_is_not_blamed_for_another() -> None:
    records: list[dict[str, Any]] = []
    tuner = make_planted_tuner(seed=1, write=records.append)
    world = PlantedWorld(tuner, seed=1)
    while world.tuner.arm == FOUR_ARMS[DEFAULT]:
        world.run_epoch(CHAT)
    late = world._request(CHAT)  # pyright: ignore[reportPrivateUsage]
    late.first_scheduled_time, late.first_token_time = world.now - 10.0, world.now + 100.0
    late.finish_time = world.now + 101.0
    tuner.finished(late, world.now + 1.0)
    world.now += 2.0
    world.run_epoch(CHAT)
    assert records[-1]["measures"]["num_finished"] == records[-1]["measures"]["num_counted"] + 1
    assert records[-1]["measures"]["ttft_p99_s"] < 10.0


def test_modelled_energy_is_power_times_time() -> None:
    roofline = Roofline(device_profile("H100"), model_shape("llama-3-8b"))
    meter = modelled_energy(roofline, start=10.0)
    assert meter is not None
    assert meter.source == "modelled"
    assert meter.joules(20.0) == pytest.approx(700.0), "idle: 70 W"
    memory_s, compute_s = roofline.least_seconds(64, StepFeatures(64, 64_000, 0.0, 64))
    meter.stepped(StepFeatures(64, 64_000, 0.0, 64), decode_steps=4)
    assert meter.joules(20.0) == pytest.approx(700.0 + 4 * 315.0 * (memory_s + compute_s))
    full = memory_s / max(memory_s, compute_s) + compute_s / max(memory_s, compute_s)
    assert 70.0 + 315.0 * full <= 700.0, "never more than the board may draw"
    assert modelled_energy(Roofline(device_profile("TPU-v5e"), model_shape("llama-3-8b")), 0.0) is None


def test_a_prior_is_a_head_start(tmp_path) -> None:
    """Arms known from elsewhere: the best is played from the first choice on; poisoned, it is not."""
    chance = np.random.default_rng(0)
    usual = Context(2.0, 300.0, 300.0, 0.5, 0, 1.0).features(NUM_SLOTS)
    contexts = usual + np.c_[np.zeros(30), 0.1 * chance.normal(size=(30, 6))]
    path = tmp_path / "prior.json"
    shares = (0.3, 0.4, 0.95, 0.5)
    entries = [
        prior_entry(arm, contexts, np.full(30, share)) for arm, share in zip(FOUR_ARMS, shares, strict=True)
    ]
    path.write_text(json.dumps(prior_to_json(entries, "planted")))
    priors = read_prior(path, FOUR_ARMS)
    load = CHAT._replace(good_shares=shares)
    chosen: list[list[int]] = []
    for known in (priors, [None] * 4, priors[::-1]):
        world = PlantedWorld(make_planted_tuner(priors=known))
        for _ in range(6):
            world.run_epoch(load)
        chosen.append(world.played[2:])  # before, no load is known and nothing is safe
    informed, ignorant, misled = chosen
    assert informed == [2, 2, 2, 2]
    assert ignorant[0] != 2
    assert misled[0] == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "JSONDecodeError"),
        ('{"version": 9, "features": [], "arms": []}', "version=9 .* must be version 1"),
        (json.dumps({"version": 1, "features": list(FEATURES), "arms": []}), "this engine's are 2048-fcfs"),
        (
            json.dumps(
                {
                    "version": 1,
                    "features": list(FEATURES),
                    "arms": [{"arm": FOUR_ARMS[0].to_json(), "A": [[1.0]], "b": [1.0]}],
                }
            ),
            "an array of shape",
        ),
    ],
)
def test_a_bad_prior_says_what_is_wrong(tmp_path, text: str, problem: str) -> None:
    path = tmp_path / "prior.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"learning_prior .*{problem}"):
        read_prior(path, FOUR_ARMS)


def test_a_choice_takes_less_than_a_millisecond() -> None:
    """24 arms, a full window, 512 lengths; the fastest, in its thread's CPU time: others share the cores."""
    arms = make_arms(SchedulerConfig(), LADDER, NUM_SLOTS)
    world = PlantedWorld(make_planted_tuner(arms), arms)
    load = PlantedLoad(1000, 100, tuple(0.5 for _ in arms))
    for _ in range(WINDOW + 10):
        world.run_epoch(load)
    spent: list[float] = []
    choose = world.tuner.choose

    def timed(now: float, queue: QueueState) -> Arm:
        start = time.thread_time()
        arm = choose(now, queue)
        spent.append(time.thread_time() - start)
        return arm

    world.tuner.choose = timed  # type: ignore[method-assign]
    for _ in range(100):
        world.run_epoch(load)
    assert min(spent) < 1e-3
