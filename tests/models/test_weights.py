"""Parameters: fused from tensors, bound, drawn at random, and cut over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import bind, param_specs
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import ShardingRules, check_divisible, make_mesh, sharding_for, shardings_for
from jaxserve.models.weights import assemble, random_params
from tests.support.tiny_models import HF_CONFIGS, hf_weights

RULES = ShardingRules()


def tiny(name="llama_biased", dtype="float32", **changes):
    hf = HF_CONFIGS[name] | changes
    family = find_family(hf)
    config = family.config_from_hf(hf)
    decoder = Decoder(config, dtype)
    return config, decoder, param_specs(decoder), family.weight_map(config)


def test_fused_weights_hold_what_belongs_together():
    _, _, specs, sources = tiny()
    tensors = hf_weights("llama_biased")
    there = "model.layers.1.self_attn."
    qkv = assemble(sources["layers.1.attention.qkv"], tensors.__getitem__, specs["layers.1.attention.qkv"])
    assert qkv.shape == (2, 4, 10, 32)  # 2 kv heads; 2 query heads each, key, value
    np.testing.assert_array_equal(qkv[1, 0], tensors[f"{there}q_proj.weight"][20:30])  # query head 2
    np.testing.assert_array_equal(qkv[0, 1], tensors[f"{there}q_proj.weight"][10:20])  # query head 1
    np.testing.assert_array_equal(qkv[1, 2], tensors[f"{there}k_proj.weight"][10:20])
    np.testing.assert_array_equal(qkv[1, 3], tensors[f"{there}v_proj.weight"][10:20])
    path = "layers.1.attention.qkv_bias"
    bias = assemble(sources[path], tensors.__getitem__, specs[path])
    np.testing.assert_array_equal(bias[1, 2], tensors[f"{there}k_proj.bias"][10:20])
    path = "layers.1.mlp.gate_up"
    gate_up = assemble(sources[path], tensors.__getitem__, specs[path])
    assert gate_up.shape == (24, 2, 2, 32)  # blocks of 2 columns
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(gate_up[5, 1], up[10:12])
    path = "layers.1.attention.o"
    o = assemble(sources[path], tensors.__getitem__, specs[path])
    np.testing.assert_array_equal(o[:, 1, 0], tensors[f"{there}o_proj.weight"][:, 20:30])


def test_every_tensor_belongs_to_one_parameter_and_is_read_once():
    _, _, specs, sources = tiny()
    tensors = hf_weights("llama_biased")
    read: list[str] = []

    def reader(name):
        read.append(name)
        return tensors[name]

    for path, spec in specs.items():
        value = assemble(sources[path], reader, spec)
        assert (value.shape, value.dtype) == (spec.shape, spec.dtype)
        assert tuple(read[-len(sources[path].names) :]) == sources[path].names
    assert sorted(read) == sorted(tensors)


def test_loading_casts_to_the_models_precision():
    _, _, specs, sources = tiny(dtype="bfloat16")
    tensors = hf_weights("llama_biased")
    norm = assemble(sources["final_norm.weight"], tensors.__getitem__, specs["final_norm.weight"])
    assert norm.dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("tensor", "shape", "path", "message"),
    [
        ("model.norm.weight", (31,), "final_norm.weight", r"norm\.weight \[31\]: must make up \[32\]"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            (41, 32),
            "layers.0.attention.qkv",
            r"q_proj\.weight \[41, 32\]",
        ),
        (
            "model.layers.0.self_attn.k_proj.weight",
            (20, 31),
            "layers.0.attention.qkv",
            r"k_proj\.weight \[20, 31\]",
        ),
        (
            "model.layers.0.mlp.up_proj.weight",
            (47, 32),
            "layers.0.mlp.gate_up",
            r"up_proj\.weight \[47, 32\]",
        ),
        ("model.layers.0.self_attn.o_proj.weight", (), "layers.0.attention.o", r"o_proj\.weight \[\]"),
    ],
)
def test_tensors_of_a_wrong_shape_are_named(tensor, shape, path, message):
    _, _, specs, sources = tiny()
    tensors = hf_weights("llama_biased") | {tensor: np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError, match=message):
        assemble(sources[path], tensors.__getitem__, specs[path])


def test_bind_refuses_parameters_that_do_not_fit():
    _, decoder, specs, _ = tiny()
    params = {path: jnp.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    path = "layers.0.mlp.down"
    with pytest.raises(CheckpointError, match=r"unknown parameter 'layers\.9\.mlp\.down'"):
        bind(decoder, params | {"layers.9.mlp.down": params[path]})
    with pytest.raises(CheckpointError, match=r"'layers\.0\.mlp\.down' is missing"):
        bind(decoder, {key: value for key, value in params.items() if key != path})
    with pytest.raises(CheckpointError, match=r"is bfloat16\[32, 48\], the model needs float32\[32, 48\]"):
        bind(decoder, params | {path: params[path].astype(jnp.bfloat16)})
    with pytest.raises(CheckpointError, match=r"is float32\[48, 32\], the model needs float32\[32, 48\]"):
        bind(decoder, params | {path: params[path].T})


def test_random_params_are_drawn_once_per_path_and_sharded():
    specs = {
        path: spec for path, spec in tiny()[2].items() if path.endswith(("gate_up", "final_norm.weight"))
    }
    params = random_params(specs, shardings_for(specs, make_mesh(2), RULES), seed=7)
    assert {path: (p.shape, p.dtype) for path, p in params.items()} == {
        path: (s.shape, s.dtype) for path, s in specs.items()
    }
    first, second = (np.asarray(params[f"layers.{i}.mlp.gate_up"]) for i in range(2))
    assert abs(first.std() * 32**0.5 - 1) < 0.1
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(params["final_norm.weight"], np.ones(32))
    again = random_params(specs, shardings_for(specs, make_mesh(1), RULES), seed=7)
    np.testing.assert_array_equal(again["layers.1.mlp.gate_up"], second)


def test_shards_are_whole_head_groups_and_ffn_columns():
    _, _, specs, _ = tiny()
    shardings = shardings_for(specs, make_mesh(2), RULES)
    assert shardings["layers.0.attention.qkv"].spec == PartitionSpec("tensor", None, None, None)
    assert shardings["layers.0.attention.qkv_bias"].spec == PartitionSpec("tensor", None, None)
    assert shardings["layers.0.attention.o"].spec == PartitionSpec(None, "tensor", None, None)
    assert shardings["layers.0.mlp.gate_up"].spec == PartitionSpec("tensor", None, None, None)
    assert shardings["layers.0.mlp.down"].spec == PartitionSpec(None, "tensor")
    assert shardings["layers.0.attention_norm.weight"].is_fully_replicated
    # 61 rows do not divide by 2, 62 do.
    assert shardings["embed.weight"].is_fully_replicated
    _, _, even, _ = tiny(vocab_size=62)
    assert sharding_for(even["lm_head.weight"], make_mesh(2), RULES).spec == PartitionSpec("tensor", None)


def test_meshes_that_cannot_cut_the_model_are_refused():
    config, _, specs, _ = tiny(intermediate_size=45)
    check_divisible(config, make_mesh(1), RULES)
    with pytest.raises(ConfigError, match="tensor_parallel_size=4: must divide num_key_value_heads=2"):
        check_divisible(config, make_mesh(4), RULES)
    with pytest.raises(ConfigError, match=r"=2: must divide intermediate_size=45; this model allows 1$"):
        check_divisible(config, make_mesh(2), RULES)
    with pytest.raises(ConfigError, match="kv_heads=2: must be a multiple of 4"):
        sharding_for(specs["layers.0.attention.qkv"], make_mesh(4), RULES)
    with pytest.raises(ConfigError, match="mesh axis 'expert': must be one of tensor"):
        sharding_for(specs["layers.0.mlp.down"], make_mesh(2), ShardingRules(ffn="expert"))
    with pytest.raises(ConfigError, match=f"tensor_parallel_size=1000: must be at most {len(jax.devices())}"):
        make_mesh(1000)
