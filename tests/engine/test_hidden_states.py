"""Hidden states: the right ones, at no cost when nobody asks, and recorded with their lengths."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.build import load_model
from jaxserve.engine.hidden_recording import prompt_digest
from jaxserve.errors import ConfigError
from jaxserve.models.params import Params, bind
from jaxserve.runner.length_head import (
    LengthHead,
    head_places,
    init_params,
    load_head,
    model_identity,
    normed,
    save_head,
)
from tests.support.decoder_run import DenseAttend, empty_cache
from tests.support.engine_parts import make_copies_free
from tests.support.small_engine import SMALL_ENGINE
from tests.support.tiny_checkpoint import TINY_CONFIG

OPTIONS: dict[str, Any] = SMALL_ENGINE | {"row_buckets": (1, 6)}
PROMPTS = [[i * 7 % 250 + j for j in range(n)] for i, n in enumerate((1, 5, 9, 33, 40, 64, 3, 17))]
LONGEST = 110
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=40)


def answers(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Iterator[list[list[int]]]:
    with LLM(str(checkpoint), **OPTIONS) as llm:
        yield answers(llm)


class Reference:
    """The model without an engine: every position of a text at once."""

    def __init__(self, checkpoint: Path) -> None:
        config = EngineConfig.from_flat(
            {"model": str(checkpoint), "dtype": "float32", "compile_cache": False}
        )
        model = load_model(config, progress=False)
        self.identity = model_identity(model.module.config, model.params)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

        @jax.jit
        def run(params: Params, tokens: jax.Array) -> jax.Array:
            positions = jnp.arange(LONGEST)
            attend = DenseAttend(jnp.zeros_like(tokens), positions)
            cache = empty_cache(model.module.config, 1, LONGEST)
            states = bind(model.module, params).with_states(tokens, positions, cache, attend, layers=(1, 2))[
                2
            ]
            return normed(jnp.stack(states, axis=1))

        self._run = functools.partial(run, model.params)

    def states(self, tokens: list[int]) -> np.ndarray:
        """float32 [LONGEST, 2, D]; what follows the text is behind it, and attention is causal."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = np.asarray(self._run(jnp.array([*tokens, *[0] * (LONGEST - len(tokens))])))
        return self._known[key]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def read_shards(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    (path,) = sorted(folder.glob("shard-*.safetensors"))
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pipeline_depth": 0},
        {"pipeline_depth": 2, "ordering": "sjf"},
        {"num_pages": 20, "max_model_len": 128},  # preemptions
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"max_decode_steps": 4}, marks=pytest.mark.slow),
        pytest.param(  # swaps
            {"num_pages": 20, "max_model_len": 128, "host_kv_bytes": 1 << 22, "max_decode_steps": 4},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_states_are_those_that_were_sampled_from(
    checkpoint: Path, reference: Reference, plain: list[list[int]], tmp_path: Path, change: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_copies_free(monkeypatch)
    recording: dict[str, Any] = {"hidden_layers": (1, 2), "probe_interval": 6}
    options: dict[str, Any] = OPTIONS | change | recording | {"record_hidden": str(tmp_path / "r")}
    with LLM(str(checkpoint), **options) as llm:
        assert answers(llm) == plain, "looking changes nothing"
        assert llm.engine.compiles_after_warmup == 0
        assert (llm.stats()["swap"]["resumed_tokens"] > 0) == ("host_kv_bytes" in change)
    data, metadata = read_shards(tmp_path / "r")
    assert json.loads(metadata["layers"]) == [1, 2]
    assert metadata["model"] == reference.identity
    by_prompt = {prompt_digest(p): (p, a) for p, a in zip(PROMPTS, plain, strict=True)}
    assert len(by_prompt) == len(PROMPTS)
    for row, request in enumerate(data["request"].tolist()):
        prompt, answer = by_prompt[int(data["prompt"][request])]
        assert data["output_tokens"][request] == len(answer)
        assert data["prompt_tokens"][request] == len(prompt)
        assert bool(data["stopped"][request]) == (answer[-1] == TINY_CONFIG["eos_token_id"])
        generated = int(data["generated"][row])
        assert generated < len(answer)
        wanted = reference.states([*prompt, *answer])[len(prompt) + generated - 1]
        np.testing.assert_allclose(data["states"][row].astype(np.float32), wanted, atol=4e-3, rtol=4e-3)
    probed = np.bincount(data["request"])
    assert (probed >= 40 // 10).all(), "every request of 40 tokens is looked at every 6 to 9"


def test_nobody_pays_who_does_not_ask(checkpoint: Path) -> None:
    with LLM(str(checkpoint), **OPTIONS) as llm:
        runner: Any = llm.engine.loop.core._executor
        assert runner._slots.hidden is None
        assert runner._probes is None
        assert llm.engine.loop.core._probing is None


def make_head(
    checkpoint: Path, path: Path, layers: tuple[int, ...] = (2,), identity: str | None = None
) -> Path:
    config = EngineConfig.from_flat({"model": str(checkpoint), "dtype": "float32", "compile_cache": False})
    model = load_model(config, progress=False)
    params = init_params(jax.random.key(0), 64 * len(layers), (16,))
    save_head(
        LengthHead(layers, params, identity or model_identity(model.module.config, model.params), {}), path
    )
    return path


@pytest.mark.slow
def test_a_head_is_found_beside_the_model_and_heard(
    checkpoint: Path, plain: list[list[int]], tmp_path: Path
) -> None:
    beside = head_places(checkpoint, tmp_path, "x")[0]
    assert beside.parent == checkpoint
    make_head(checkpoint, beside)
    options: dict[str, Any] = OPTIONS | {
        "length_predictor": "fused",
        "probe_interval": 5,
        "pipeline_depth": 1,
    }
    try:
        with LLM(str(checkpoint), **options) as llm:
            for _ in range(2):
                assert answers(llm) == plain
            stats = llm.engine.stats()["length_prediction"]
            assert llm.engine.compiles_after_warmup == 0
        assert stats["probes"] >= stats["launches"] > 10
        options["length_head"] = "none"
        with LLM(str(checkpoint), **options) as llm:
            assert answers(llm) == plain
            assert "probes" not in llm.engine.stats()["length_prediction"]
    finally:
        beside.unlink()


def test_what_cannot_be_is_said_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    other = make_head(checkpoint, tmp_path / "other", identity="0123456789abcdef")
    with pytest.raises(ConfigError, match="trained for the model 0123456789abcdef"):
        LLM(str(checkpoint), **OPTIONS, length_predictor="fused", length_head=str(other))
    (tmp_path / "text").write_text("no head")
    for name in ("text", "missing"):
        with pytest.raises(ConfigError, match="not a file made by `jaxserve train-predictor`"):
            LLM(str(checkpoint), **OPTIONS, length_predictor="fused", length_head=str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"hidden_layers=\(3,\): the model has the layers 1 to 2"):
        LLM(str(checkpoint), **OPTIONS, record_hidden=str(tmp_path / "r"), hidden_layers=(3,))
    with pytest.raises(ConfigError, match="record_hidden"):
        LLM(str(checkpoint), **OPTIONS, record_hidden=str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="length_predictor='best'"):
        EngineConfig.from_flat({"length_predictor": "best"})


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file made by"):
        load_head(tmp_path, "x")
