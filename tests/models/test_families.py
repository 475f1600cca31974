"""What families read from real config.json files (shortened), and what they refuse."""

import re
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.models.config import LinearScaling, Llama3Scaling, RopeConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import param_specs
from jaxserve.models.registry import MODELS, find_family
from tests.support.tiny_models import HF_CONFIGS

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
GEMMA_3_270M: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}


def read(hf):
    return find_family(hf).config_from_hf(hf)


def test_smollm2():
    config = read(SMOLLM2_135M)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.queries_per_kv) == (9, 3, 64, 3)
    assert config.rope == RopeConfig(theta=100000.0)
    assert config.attention_scale == 0.125
    assert config.tie_embeddings
    assert config.sliding_windows == (None,) * 30
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    specs = param_specs(Decoder(config, "bfloat16"))
    assert sum(spec.nbytes for spec in specs.values()) == 2 * 134_515_008
    assert specs["layers.7.attention.qkv"].shape == (3, 5, 64, 576)


def test_gemma_3_270m():
    config = read(GEMMA_3_270M)
    assert config.sliding_windows == ((512,) * 5 + (None,)) * 3
    assert config.layer_rope(4) == RopeConfig(theta=10000.0)
    assert config.layer_rope(5) == RopeConfig(theta=1000000.0)
    assert config.attention_scale == 1 / 16
    assert config.embedding_scale == pytest.approx(25.298221)
    assert config.tie_embeddings  # absent in the file: the family's default
    assert (config.attention_soft_cap, config.logit_soft_cap) == (None, None)
    specs = param_specs(Decoder(config, "float32"))
    assert sum(spec.nbytes for spec in specs.values()) == 4 * 268_098_176


def test_gemma_3_layers_without_layer_types_follow_the_pattern():
    hf = {key: value for key, value in GEMMA_3_270M.items() if key != "layer_types"}
    assert read(hf) == read(GEMMA_3_270M)


def test_rope_parameters_of_new_files_equal_the_old_fields():
    old = GEMMA_3_270M | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert read(new) == read(old)
    assert read(new).rope == RopeConfig(theta=1000000.0, scaling=LinearScaling(factor=8.0))

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old_llama = SMOLLM2_135M | {"rope_theta": 500000.0, "rope_scaling": scaling}
    new_llama = SMOLLM2_135M | {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    assert read(new_llama) == read(old_llama)
    assert isinstance(read(old_llama).rope.scaling, Llama3Scaling)


def test_qwen2_ignores_its_window_unless_it_is_switched_on():
    hf = HF_CONFIGS["qwen2"] | {"use_sliding_window": False}
    assert read(hf).sliding_windows == (None, None)
    assert read(hf | {"use_sliding_window": True}).sliding_windows == (None, 4)
    with pytest.raises(ConfigError, match="max_window_layers=None: must be an integer"):
        read(HF_CONFIGS["qwen2"] | {"max_window_layers": None})


def test_mistral_window():
    hf = dict(HF_CONFIGS["mistral"])
    assert read(hf).sliding_windows == (6, 6)
    assert read(hf | {"sliding_window": None}).sliding_windows == (None, None)
    del hf["sliding_window"]
    assert read(hf).sliding_windows == (4096, 4096)


@pytest.mark.parametrize("name", sorted(HF_CONFIGS))
def test_the_weight_map_names_exactly_the_parameters(name):
    hf = HF_CONFIGS[name]
    family = find_family(hf)
    config = family.config_from_hf(hf)
    assert family.weight_map(config).keys() == param_specs(Decoder(config, "float32")).keys()


def test_every_registered_family_can_be_imported():
    for architecture in MODELS:
        family = find_family({"architectures": [architecture]})
        assert callable(family.config_from_hf)
        assert callable(family.weight_map)


@pytest.mark.parametrize(
    "hf",
    [{"architectures": ["MambaForCausalLM"]}, {"architectures": [["nested"]]}, {"architectures": []}, {}],
)
def test_unknown_architectures_list_the_known_ones(hf):
    name = (hf.get("architectures") or [None])[0]
    with pytest.raises(ConfigError, match=re.escape(f"architectures={name!r}: must be one of Gemma2For")):
        find_family(hf)
    with pytest.raises(ConfigError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"):
        find_family(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None: must be a positive integer"),
        ({"hidden_size": True}, "hidden_size=True: must be a positive integer"),
        ({"vocab_size": -1}, "vocab_size=-1: must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 4}, "num_attention_heads=9: must be a multiple of num_key_value_heads=4"),
        ({"head_dim": 63}, "head_dim=63: must be even"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': must be a positive number"),
        ({"rope_theta": 0}, "rope_theta=0: must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn': must be one of default"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None: must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear': must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "relu"}, "hidden_act='relu': must be one of silu"),
        ({"mlp_bias": True}, "mlp_bias=True: is not supported"),
        ({"eos_token_id": "2"}, "eos_token_id='2': must be a token id"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config='awq'"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message.replace("'", ".")):
        read(SMOLLM2_135M | change)


def test_gemma_refuses_bad_layer_types():
    with pytest.raises(ConfigError, match="layer_types has 3 entries: must be num_hidden_layers=18"):
        read(GEMMA_3_270M | {"layer_types": ["full_attention"] * 3})
    with pytest.raises(ConfigError, match="layer_types=18: must be a list"):
        read(GEMMA_3_270M | {"layer_types": 18})
    with pytest.raises(ConfigError, match="layer_types='chunked_attention'"):
        read(GEMMA_3_270M | {"layer_types": ["chunked_attention"] * 18})
    with pytest.raises(ConfigError, match="use_bidirectional_attention=True"):
        read(GEMMA_3_270M | {"use_bidirectional_attention": True})
