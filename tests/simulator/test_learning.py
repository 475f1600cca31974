"""Online learning in the simulator: the scheduler that serves, with arms that change under a real load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.cli.simulate import main
from jaxserve.config import LearningConfig, SchedulerConfig
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.prior import MOST_EPOCHS, read_prior
from jaxserve.errors import ConfigError
from jaxserve.simulator.arm_runs import cluster_arms, prior_of, run_arm, tuner_maker
from jaxserve.simulator.cluster import Cluster, ClusterConfig, make_cluster
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import poisson, uniform

OPTIONS = SimulationOptions(learns=True)
LEARNING = LearningConfig(learning="on", learning_epoch_s=5.0)
TRACE = poisson(uniform((200, 1500), (20, 120), 500, seed=0), rate=8.0, seed=0)


def machine(cluster: str = "1xH100", **scheduler: Any) -> Cluster:
    scheduler = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, **scheduler}
    return make_cluster(
        ClusterConfig(cluster=cluster, token_buckets=(128, 256, 512, 1024, 2048)),
        SchedulerConfig(**scheduler),
    )


def lengths(result: SimulationResult) -> list[tuple[str, int]]:
    return [(request.id, request.output_tokens) for request in result.requests]


def test_all_requests_end_as_they_should_while_arms_change() -> None:
    records: list[dict[str, Any]] = []
    cluster = machine()
    maker = tuner_maker(cluster, LEARNING, write=records.append)
    learnt = simulate(TRACE, cluster, OPTIONS, make_tuner=maker)
    assert lengths(learnt) == [(str(i), row.output_tokens) for i, row in enumerate(TRACE)]
    assert len({record["decision"]["arm"] for record in records[1:]}) > 3
    for record in records[1:]:
        assert record["measures"]["joules"] > 70.0 * record["measures"]["seconds"]
    again: list[dict[str, Any]] = []
    simulate(TRACE, cluster, OPTIONS, make_tuner=tuner_maker(cluster, LEARNING, write=again.append))
    assert records == again
    other = json.loads(json.dumps(records))
    restarted: list[dict[str, Any]] = []
    maker = tuner_maker(cluster, LEARNING, records=other, write=restarted.append)
    simulate(TRACE[:100], cluster, OPTIONS, make_tuner=maker)
    assert restarted[0]["epoch"] == len(records) - 1


def test_the_guard_foresees_what_the_simulator_shows() -> None:
    """A larger budget makes a longer tail between tokens; and no forecast is off by more than half."""
    cluster = machine(ttft_slo_s=5.0, tpot_slo_s=0.2)
    tails: list[float] = []
    for budget in (256, 2048):
        run = run_arm(TRACE, cluster, OPTIONS, LEARNING, Arm(budget, "fcfs", "watermark"))
        shown = run.result.metrics()["tpot_p99_ms"][0]
        foreseen = [1e3 * epoch["forecasts"][0][1] for epoch in run.epochs if epoch["forecasts"]]
        assert 0.5 <= np.mean(foreseen) / shown <= 1.5
        tails.append(float(np.mean(foreseen)))
    assert tails[1] > 1.2 * tails[0]


def test_an_arm_that_the_guard_forbids_is_not_played() -> None:
    """The default's steps are too long for the objective, and the cost model knows it."""
    records: list[dict[str, Any]] = []
    cluster = machine(tpot_slo_s=0.0115)
    simulate(TRACE, cluster, OPTIONS, make_tuner=tuner_maker(cluster, LEARNING, write=records.append))
    arms = records[0]["arms"]
    played = [
        record["decision"] for record in records[1:] if record["decision"]["reason"] in ("best", "explored")
    ]
    assert len(played) > 3
    assert not any(arms[decision["arm"]]["max_num_batched_tokens"] == 2048 for decision in played)


def test_the_prior_of_runs_is_what_was_seen(tmp_path: Path) -> None:
    cluster = machine()
    arms = cluster_arms(cluster)
    runs = [run_arm(TRACE, cluster, OPTIONS, LEARNING, arm) for arm in arms[:2]]
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(prior_of([*runs, runs[0]], "test")))
    known = read_prior(path, arms)
    assert [prior is not None for prior in known[:3]] == [True, True, False]
    first, second = known[0], known[1]
    assert first is not None
    assert second is not None
    assert second.gram[0, 0] == pytest.approx(min(MOST_EPOCHS, len(runs[1].rewards)))
    assert second.moment[0] / second.gram[0, 0] == pytest.approx(np.mean(runs[1].rewards))
    assert first.gram[0, 0] == pytest.approx(min(MOST_EPOCHS, 2 * len(runs[0].rewards)))


def test_several_engines_learn_each_for_itself() -> None:
    cluster = machine("2xH100")
    logs: list[list[dict[str, Any]]] = []

    def maker(costs: Any) -> Any:
        logs.append([])
        return tuner_maker(cluster, LEARNING, write=logs[-1].append)(costs)

    result = simulate(TRACE, cluster, OPTIONS, make_tuner=maker)
    assert len(result.requests) == len(TRACE)
    assert len(logs) == 2
    assert all(len(log) > 5 for log in logs)
    with pytest.raises(ConfigError, match="arms are measured on one"):
        run_arm(TRACE, cluster, OPTIONS, LEARNING, cluster_arms(cluster)[0])
    with pytest.raises(ConfigError, match="jobs=2: a predictor of its own, or learning, needs jobs=1"):
        simulate(TRACE, cluster, SimulationOptions(router="round_robin"), make_tuner=maker, jobs=2)


@pytest.mark.slow
def test_the_command_writes_a_prior_and_learns_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, prior, log = tmp_path / "trace.csv", tmp_path / "prior.json", tmp_path / "log.jsonl"
    rows = [f"{row.arrival_s},{row.prompt_tokens},{row.output_tokens}" for row in TRACE[:240]]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    flags = ["--trace", str(trace), "--max-num-seqs", "64", "--max-num-batched-tokens", "512"]
    flags += ["--token-buckets", "128,512", "--learning-epoch-s", "5"]
    assert main([*flags, "--write-prior", str(prior)]) == 0
    assert "512-fcfs-watermark" in capsys.readouterr().out
    entries = json.loads(prior.read_text())["arms"]
    assert len(entries) == 2 * 3 * 2
    assert all(entry["epochs"] > 0 for entry in entries)
    learns = ["--learning", "on", "--learning-prior", str(prior), "--learning-log", str(log)]
    assert main([*flags, *learns]) == 0
    first = log.read_text().splitlines()
    assert main([*flags, *learns]) == 0
    second = log.read_text().splitlines()
    assert second[: len(first)] == first
    assert len(second) > len(first) > 3
    assert main([*flags, "--learning", "frozen", "--learning-log", str(log)]) == 0
    reasons = {json.loads(line)["decision"]["reason"] for line in log.read_text().splitlines()[len(second) :]}
    assert reasons <= {"frozen", "unsafe"}
    assert "frozen" in reasons
    with pytest.raises(ConfigError, match="learning_log: its arms"):
        main(["--trace", str(trace), "--learning", "on", "--learning-log", str(log)])
    capsys.readouterr()
