"""GGUF tensors and metadata in Hugging Face's terms."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint
from jaxserve.models.registry import find_family
from tests.support.gguf_files import llama_metadata, permute, write_gguf
from tests.support.gguf_models import to_gguf
from tests.support.tiny_models import HF_CONFIGS, hf_weights

FAMILIES = {"llama2": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3"}


@pytest.mark.parametrize(("name", "architecture"), FAMILIES.items())
def test_tensors_are_those_of_the_hugging_face_model(tmp_path, name, architecture):
    path = write_gguf(tmp_path / "m.gguf", *to_gguf(name, architecture))
    checkpoint, expected = GGUFCheckpoint(path), hf_weights(name)
    assert set(checkpoint.names()) == set(expected)
    for tensor, values in expected.items():
        assert checkpoint.shape(tensor) == values.shape, tensor
        # Gemma's +1 and back costs the last bits of small norms.
        np.testing.assert_allclose(checkpoint.read(tensor), values, rtol=0, atol=2e-7, err_msg=tensor)


def test_q_and_k_are_unpermuted_head_by_head(tmp_path):
    heads, head_dim = 2, 6
    rows = np.arange(heads * head_dim, dtype=np.float32)[:, None].repeat(32, axis=1)
    stored = permute(rows, heads)
    assert stored[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    hf = HF_CONFIGS["llama2"] | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    tensors = {
        "token_embd.weight": np.ones((61, 32), np.float32),
        "blk.0.attn_q.weight": stored,
        "blk.0.attn_k.weight": permute(rows[:6], 1),
        "blk.0.attn_v.weight": rows,
    }
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", llama_metadata(hf), tensors))
    for projection, expected in (("q", rows), ("k", rows[:6]), ("v", rows)):
        read = checkpoint.read(f"model.layers.0.self_attn.{projection}_proj.weight")
        assert read.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "architecture"), FAMILIES.items())
def test_config_gives_the_same_decoder(tmp_path, name, architecture):
    path = write_gguf(tmp_path / "m.gguf", *to_gguf(name, architecture))
    config, hf = GGUFCheckpoint(path).hf_config, HF_CONFIGS[name]
    for key in (
        "architectures",
        "vocab_size",
        "hidden_size",
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
    ):
        assert config[key] == hf[key], key
    assert config["tie_word_embeddings"] == bool(hf.get("tie_word_embeddings"))
    decoder = find_family(config).config_from_hf(config)
    assert decoder.num_layers == hf["num_hidden_layers"]
    assert decoder.num_heads == hf["num_attention_heads"]


def test_what_gemma3_metadata_leaves_out(tmp_path):
    metadata, tensors = to_gguf("gemma3", "gemma3")
    config = GGUFCheckpoint(
        write_gguf(tmp_path / "m.gguf", metadata | {"gemma3.block_count": 7}, tensors)
    ).hf_config
    assert config["rope_local_base_freq"] == 10000.0
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 10
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["attn_logit_softcapping"] is None
    assert config["final_logit_softcapping"] is None
    deep = metadata | {"gemma3.block_count": 62}
    config = GGUFCheckpoint(write_gguf(tmp_path / "deep.gguf", deep, tensors)).hf_config
    assert config["query_pre_attn_scalar"] == 8  # hidden_size 32 over 4 heads: the 27B model


def llama3_factors(factor: float, theta: float, size: int) -> np.ndarray:
    """Llama 3.1's formula, frequency by frequency (`_compute_llama3_parameters` of transformers)."""
    out: list[float] = []
    for i in range(size):
        wavelength = 2 * np.pi * theta ** (i / size)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192 / 1:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    metadata, tensors = to_gguf("llama2", "llama")
    metadata["llama.rope.freq_base"] = 500000.0
    factors = {"rope_freqs.weight": llama3_factors(32.0, 500000.0, 64)}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata, tensors | factors))
    assert checkpoint.hf_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in checkpoint.names())
    other = {"rope_freqs.weight": np.linspace(1, 7, 64, dtype=np.float32)}
    with pytest.raises(CheckpointError, match="rope_freqs"):
        GGUFCheckpoint(write_gguf(tmp_path / "bad.gguf", metadata, tensors | other))


def test_linear_scaling_and_end_tokens(tmp_path):
    metadata, tensors = to_gguf("qwen3", "qwen3")
    metadata |= {"qwen3.rope.scaling.type": "linear", "qwen3.rope.scaling.factor": 4.0}
    metadata |= {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 9}
    config = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata, tensors)).hf_config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["eos_token_id"] == [5, 9]


@pytest.mark.parametrize(
    ("change", "extra", "reason"),
    [
        ({"general.architecture": "mamba"}, {}, "'mamba' is not supported; supported are llama"),
        ({"llama.block_count": 0}, {}, "llama.block_count=0"),
        ({"llama.attention.head_count": "four"}, {}, "head_count='four'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "must be a finite number"),
        (
            {},
            {"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)},
            "ffn_gate_exps.weight' is none that",
        ),
        ({}, {"blk.x.attn_q.weight": np.ones((2, 32), np.float32)}, "is none that a LlamaForCausalLM has"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, change, extra, reason):
    metadata, tensors = to_gguf("llama2", "llama")
    with pytest.raises(CheckpointError, match=reason):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata | change, tensors | extra))


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", *to_gguf("llama2", "llama")))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.mlp"):
        checkpoint.read("model.layers.9.mlp.down_proj.weight")


def test_quantised_matrices_and_exact_norms(tmp_path):
    metadata, tensors = to_gguf("llama2", "llama")
    tensors = {name: values for name, values in tensors.items() if values.shape[-1] % 32 == 0}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", metadata, tensors, Kind.Q8_0))
    expected = hf_weights("llama2")
    for name in checkpoint.names():
        atol = 0.0 if "norm" in name else 0.02
        np.testing.assert_allclose(checkpoint.read(name), expected[name], rtol=0, atol=atol, err_msg=name)
