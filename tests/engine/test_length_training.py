"""From recorded states to predictions in service: what is in the states is found, what is not is not."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve import LLM, SamplingParams
from jaxserve.cli.main import main
from jaxserve.core.fused_predictor import HEAD
from jaxserve.errors import ConfigError
from jaxserve.runner.length_training import (
    Dataset,
    Parts,
    TrainingOptions,
    divided,
    judge,
    loss,
    predict,
    read_recordings,
    survival_medians,
    train,
    train_best,
)
from tests.support.countdown_model import MOST, SILENT, write_countdown_checkpoint

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 16,
    "row_buckets": (16,),
    "token_buckets": (64,),
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "compile_cache": False,
    "use_tqdm": False,
    "probe_interval": 4,
}
QUICK = TrainingOptions(
    widths=(64, 32), epochs=60, patience=60, learning_rate=3e-3, dropout=0.0, batch_size=128
)
PARAMS = SamplingParams(temperature=1.0, max_tokens=200)


def prompts(count: int, kind: str, seed: int) -> list[list[int]]:
    """``given``: the length is the prompt's last token; ``silent``: nobody knows it yet."""
    rng = random.Random(seed)
    last = {"given": lambda: rng.randrange(5, 99), "silent": lambda: SILENT}[kind]
    return [[*(rng.randrange(100, 199) for _ in range(rng.randint(3, 12))), last()] for _ in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_countdown_checkpoint(tmp_path_factory.mktemp("countdown"))


@pytest.fixture(scope="module")
def recordings(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for kind in ("given", "silent"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        with LLM(str(checkpoint), **OPTIONS, record_hidden=str(folders[kind])) as llm:
            outputs = llm.generate(prompts(300, kind, 1), PARAMS, use_tqdm=False)
        if kind == "given":
            wanted = [prompt[-1] + 1 for prompt in prompts(300, kind, 1)]
            assert [len(output.outputs[0].token_ids) for output in outputs] == wanted, "no countdown"
    return folders


@pytest.mark.slow
def test_a_length_that_the_state_knows_is_found(recordings: dict[str, Path]) -> None:
    data = read_recordings([recordings["given"]])
    head, parts = train(data, QUICK)
    assert head.training["test_mae_tokens"] <= 0.1 * 94
    assert head.training["test_mae_tokens"] < 0.3 * head.training["survival_mae_tokens"]
    assert head.training == {**head.training, **judge(head.params, parts)}


def test_shuffled_lengths_leave_what_the_survivors_know(recordings: dict[str, Path]) -> None:
    data = read_recordings([recordings["given"]])
    head, _ = train(data, dataclasses.replace(QUICK, shuffles_labels=True))
    assert head.training["test_mae_tokens"] > 0.9 * head.training["survival_mae_tokens"]


def test_what_nobody_can_know_yet_is_not_known(recordings: dict[str, Path]) -> None:
    """Before the silence ends a head does what the survivors' median does; after it, it is right."""
    data = read_recordings([recordings["silent"]])
    head, parts = train(data, QUICK)
    test = parts.test
    error = np.abs(predict(head.params, test)[:, 1] - test.remaining)
    baseline = np.abs(survival_medians(parts.train, test.generated) - test.remaining)
    is_silent = test.states[:, 0, SILENT] > 1.0
    assert min(is_silent.sum(), (~is_silent).sum()) > 30
    assert error[is_silent].mean() > 0.8 * baseline[is_silent].mean()
    assert error[~is_silent].mean() <= 0.1 * MOST


def test_the_better_of_two_is_kept(recordings: dict[str, Path]) -> None:
    data = read_recordings([recordings["given"]])
    candidates = [(64, 32), ()]
    said: list[str] = []
    best = train_best(data, QUICK, said.append, candidates=candidates)
    alone = [train(data, dataclasses.replace(QUICK, widths=widths))[0].training for widths in candidates]
    losses = [training["validation_loss"] for training in alone]
    assert losses[0] < losses[1], "here a line does not do: the answer is a place in the state"
    assert best.training == alone[0]
    assert best.training == train_best(data, QUICK, candidates=candidates[::-1]).training
    assert [line for line in said if "hidden" in line] == ["hidden layers: 64, 32", "hidden layers: none"]


def test_the_command_trains_and_the_engine_finds_it_and_it_is_heard(
    checkpoint: Path, recordings: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train-predictor", str(recordings["given"]), "--cache-dir", str(tmp_path), "--widths", "64,32",
        "--epochs", "40",
    ]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    (path,) = (tmp_path / "length_heads").iterdir()
    assert said.splitlines()[-1] == str(path)
    before = load_file(path)
    path.unlink()
    assert main(command) == 0
    again = load_file(path)
    assert all((again[name] == value).all() for name, value in before.items()), "same data, same seed"
    options: dict[str, Any] = {**OPTIONS, "length_predictor": "fused", "cache_dir": tmp_path}
    with LLM(str(checkpoint), **options) as llm:
        llm.generate(prompts(120, "given", 2), PARAMS, use_tqdm=False)
        stats = llm.engine.stats()["length_prediction"]["while_growing"]
        assert llm.engine.compiles_after_warmup == 0
    for stage in ("from_1", "from_32"):
        assert stats[stage]["weights"][HEAD] > 0.9
        assert stats[stage]["log_rmse"][HEAD] < 0.5 * stats[stage]["log_rmse"]["everybody"]


def test_no_prompt_is_in_two_parts(recordings: dict[str, Path]) -> None:
    data = read_recordings([recordings["given"], recordings["silent"]])
    alone = [read_recordings([folder]) for folder in recordings.values()]
    assert len(np.unique(data.request)) == sum(len(np.unique(part.request)) for part in alone) > 590
    for rotation in (0.0, 0.4):
        parts = divided(data, rotation=rotation)
        assert sum(map(len, parts)) == len(data)
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert not set(parts[first].prompt.tolist()) & set(parts[second].prompt.tolist())
            assert not set(parts[first].request.tolist()) & set(parts[second].request.tolist())
    shares = [len(np.unique(part.prompt)) / len(np.unique(data.prompt)) for part in divided(data)]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.06)
    test_prompts = [set(divided(data, (0.6, 0.2), r / 5).test.prompt.tolist()) for r in range(5)]
    assert set.union(*test_prompts) == set(data.prompt.tolist())
    assert sum(map(len, test_prompts)) == len(np.unique(data.prompt)), "every prompt is judged once"


def test_a_cut_request_costs_only_what_is_lacking() -> None:
    target = jnp.array([2.0])
    cut, whole = jnp.array([False]), jnp.array([True])
    low, high = jnp.full((1, 3), 1.0), jnp.full((1, 3), 3.0)
    assert float(loss(low, target, cut)) == pytest.approx((0.1 + 0.5 + 0.9) / 3)
    assert float(loss(high, target, cut)) == 0.0
    assert float(loss(high, target, whole)) == pytest.approx((0.9 + 0.5 + 0.1) / 3)


def test_survivors_medians_by_hand() -> None:
    def column(values: list[int]) -> np.ndarray:
        return np.array(values)

    lengths = [10, 20, 40, 80]
    data = Dataset(
        "m", (1,), np.zeros((4, 1, 1)), column([0] * 4), column([1] * 4), column(lengths), column([99] * 4),
        np.ones(4, bool), np.arange(4), np.arange(4),
    )  # fmt: skip
    assert survival_medians(data, np.array([0, 10, 30, 79, 80])).tolist() == [30.0, 30.0, 30.0, 1.0, 1.0]


def test_bad_data_is_named(recordings: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shards"):
        read_recordings([tmp_path])
    (tmp_path / "shard-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a recording"):
        read_recordings([tmp_path])
    data = read_recordings([recordings["given"]])
    with pytest.raises(ConfigError, match="layers=\\(7,\\)"):
        train(data, TrainingOptions(layers=(7,)))
    few = data.rows(data.request == 0)
    with pytest.raises(ConfigError, match="1 requests leave none for"):
        train(few, QUICK)
    assert Parts._fields == ("train", "validation", "test")
