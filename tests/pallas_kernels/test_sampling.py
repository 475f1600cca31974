"""The kernel that draws tokens, against the sampler that XLA compiles."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.sampling.triton import Draws, draw_tokens
from jaxserve.runner.sampler import SamplingState, draw

_ROWS, _VOCAB = 24, 5000


def _draws(rng: np.random.Generator, **columns: np.ndarray) -> Draws:
    made = {
        "temperature": np.where(np.arange(_ROWS) % 6 == 0, 0.0, rng.uniform(0.2, 2.0, _ROWS)),
        "top_k": rng.choice([0, 1, 5, 40, _VOCAB - 1, _VOCAB + 1], _ROWS),
        "top_p": rng.choice([1.0, 0.95, 0.5, 0.1, 1e-6], _ROWS),
        "min_p": rng.choice([0.0, 0.05, 0.3], _ROWS),
        "seed": rng.integers(0, 2**32, _ROWS, dtype=np.uint32),
        "position": rng.integers(1, 9999, _ROWS),
    } | columns
    dtypes: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "min_p"), np.float32)
    return Draws(**{name: jnp.asarray(made[name], dtypes.get(name)) for name in Draws._fields})


def _logits(rng: np.random.Generator) -> np.ndarray:
    spread = rng.uniform(0.5, 6.0, (_ROWS, 1))
    return (rng.standard_normal((_ROWS, _VOCAB)) * spread).astype(np.float32)


def _by_xla(logits: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    columns = dict.fromkeys((f.name for f in dataclasses.fields(SamplingState)), jnp.zeros(_ROWS))
    columns |= {name: getattr(draws, name) for name in Draws._fields if name != "position"}
    sampled = jax.jit(draw)(logits, SamplingState(**columns), draws.position)
    return np.asarray(sampled.token_ids), np.asarray(sampled.finite)


_by_kernel = jax.jit(functools.partial(draw_tokens, interpret=jax.default_backend() != "gpu"))


@pytest.mark.parametrize("seed", range(4))
def test_draws_what_the_sampler_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, draws = _logits(rng), _draws(rng)
    logits[3] = np.round(logits[3])  # ties
    logits[4] = 1.0
    logits[7, 9], logits[8, _VOCAB - 1], logits[9, 0] = np.nan, np.inf, -np.inf
    tokens, finite = _by_kernel(logits, draws)
    expected, expected_finite = _by_xla(logits, draws)
    np.testing.assert_array_equal(finite, expected_finite)
    np.testing.assert_array_equal(np.where(finite, tokens, 0), expected)
    assert not finite[7:10].any() and finite[:7].all()


def test_what_is_masked_is_never_drawn_and_changes_nothing_else() -> None:
    rng = np.random.default_rng(5)
    logits, draws = _logits(rng), _draws(rng)
    best = np.argsort(logits, axis=1)[:, -3:]
    np.put_along_axis(logits, best, -1e30, axis=1)
    expected = np.asarray(_by_kernel(logits, draws)[0])
    np.put_along_axis(logits, best, -np.inf, axis=1)
    logits[2] = -np.inf
    tokens, finite = (np.asarray(result) for result in _by_kernel(logits, draws))
    assert not finite.any() and tokens[2] == 0
    others = np.arange(_ROWS) != 2
    np.testing.assert_array_equal(tokens[others], expected[others])
    assert not (tokens[others, None] == best[others]).any()


def test_arrays_of_weak_type_are_arrays() -> None:
    rng = np.random.default_rng(6)
    logits, draws = _logits(rng), _draws(rng, top_p=np.full(_ROWS, 0.9))
    weak = draws._replace(top_p=jnp.full(_ROWS, 0.9))
    assert weak.top_p.weak_type
    np.testing.assert_array_equal(_by_kernel(logits, weak)[0], _by_kernel(logits, draws)[0])


def test_each_filter_alone_keeps_what_it_says() -> None:
    rng = np.random.default_rng(9)
    logits = np.sort(_logits(rng), axis=1)[:, ::-1].copy()  # so that a token's id is its rank
    off = {"temperature": np.ones(_ROWS), "top_k": np.zeros(_ROWS, np.int32), "top_p": np.ones(_ROWS)}
    off["min_p"] = np.zeros(_ROWS)
    weights = np.exp(logits.astype(np.float64) - logits[:, :1])
    shares = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    allowed = {
        "top_k": (np.full(_ROWS, 3), np.full(_ROWS, 3)),
        "top_p": (np.full(_ROWS, 0.3), 1 + np.sum(shares < 0.3, axis=1)),
        "min_p": (np.full(_ROWS, 0.5), np.sum(weights >= 0.5, axis=1)),
    }
    free = np.asarray(_by_kernel(logits, _draws(rng, **off))[0])
    for name, (value, count) in allowed.items():
        tokens = np.asarray(_by_kernel(logits, _draws(rng, **(off | {name: value})))[0])
        assert (tokens < count).all(), name
        assert (free >= count).any(), name  # else the filter had nothing to do


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_lowers_for_an_h100() -> None:
    shape: Any = jax.ShapeDtypeStruct
    rows: dict[str, Any] = {name: shape((256,), jnp.float32) for name in ("temperature", "top_p", "min_p")}
    rows["top_p"] = shape((256,), jnp.float32, weak_type=True)  # as of a jnp.full
    rows |= {name: shape((256,), jnp.int32) for name in ("top_k", "position")}
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = (
            jax.jit(draw_tokens)
            .trace(shape((256, 128_256), jnp.float32), Draws(seed=shape((256,), jnp.uint32), **rows))
            .lower(lowering_platforms=("cuda",))
        )
    assert "triton" in lowered.as_text()
