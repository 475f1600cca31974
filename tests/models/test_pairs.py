"""bfloat16 weights as pairs: the same numbers from the same memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.models.decoder import Decoder
from jaxserve.models.pairs import is_paired, multiply_row, pair_views, unpair
from jaxserve.models.params import bind, param_specs
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import ShardingRules, make_mesh, shardings_for
from jaxserve.models.weights import random_params
from tests.support.decoder_run import empty_cache, run
from tests.support.tiny_models import HF_CONFIGS


def random_matrix(rows: int, columns: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, columns), jnp.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 96), (40, 576)])
def test_the_product_is_that_of_the_values(rows: int, columns: int) -> None:
    weight, x = random_matrix(rows, columns, 0), random_matrix(1, columns, 1)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    got = jax.jit(multiply_row)(x, pair_views({"w": weight})["w"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * columns**0.5)
    swapped = x.reshape(-1, 2)[:, ::-1].reshape(1, -1)  # the tolerance notices which half comes first
    assert np.abs(np.asarray(multiply_row(swapped, pair_views({"w": weight})["w"])) - expected).max() > 0.1


def test_views_take_no_memory_and_keep_it_alive() -> None:
    weight = random_matrix(64, 64, 2)
    address, before = weight.unsafe_buffer_pointer(), np.asarray(weight, np.float32)
    view = pair_views({"w": weight})["w"]
    assert view.unsafe_buffer_pointer() == address
    del weight
    np.testing.assert_array_equal(np.asarray(unpair(view), np.float32), before)


def test_what_cannot_be_paired_is_passed_on() -> None:
    others = {
        "float32": jnp.ones((4, 64)),
        "vector": jnp.ones(64, jnp.bfloat16),
        "ragged": jnp.ones((4, 48), jnp.bfloat16),
    }
    views = pair_views(others)
    assert all(views[name] is others[name] for name in others)
    assert not any(is_paired(view) for view in views.values())


def wide_llama() -> tuple[Decoder, dict[str, jax.Array]]:
    """A tiny Llama whose matrices are wide enough for pairs."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf = HF_CONFIGS["llama3"] | sizes | heads
    module = Decoder(find_family(hf).config_from_hf(hf), jnp.bfloat16)
    specs = param_specs(module)
    return module, random_params(specs, shardings_for(specs, make_mesh(1), ShardingRules()), seed=3)


def test_a_decoder_computes_the_same_with_pairs() -> None:
    module, params = wide_llama()
    views = pair_views(params)
    assert all(views[path].unsafe_buffer_pointer() == params[path].unsafe_buffer_pointer() for path in params)
    matrices = {path for path, array in params.items() if array.ndim >= 2}
    assert {path for path, view in views.items() if is_paired(view)} == matrices
    tokens = np.array([7])
    logits = [
        run(module, each, tokens, tokens * 0, tokens * 0, empty_cache(module.config, 1, 1, jnp.bfloat16))[0]
        for each in (params, views)
    ]
    scale = np.abs(logits[0]).max()
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=0.02 * scale)  # bfloat16 activations


def test_pairs_of_another_size_are_refused() -> None:
    module, params = wide_llama()
    views = pair_views(params)
    views["layers.0.mlp.down"] = views["layers.0.mlp.down"][:, :-1]
    with pytest.raises(CheckpointError, match=r"'layers.0.mlp.down' is uint32\[64, 47\], the model needs"):
        bind(module, views)
