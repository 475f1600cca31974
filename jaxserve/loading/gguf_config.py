"""GGUF metadata -> the Hugging Face ``config.json`` that the file was converted from.

Sources: llama.cpp's convert_hf_to_gguf.py for the keys, the families' published configs for what the metadata
leaves out (Gemma's local rope theta, its layer pattern, its query scale).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError

# llama.cpp recognises Gemma's 27B models by their depth; only they scale queries by hidden_size / heads.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6  # five layers with a window, then one without
_GEMMA3_LOCAL_ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture is spelled in Hugging Face's terms.

    Attributes:
        hf_name: entry of ``architectures``.
        model_type: HF's ``model_type``.
        permuted: the rows of q and k are stored permuted for interleaved rope.
        norms_plus_one: norm weights are stored with 1 added.
        sandwich_norms: four norms a layer, Gemma's way of naming them.
    """

    hf_name: str
    model_type: str
    permuted: bool = False
    norms_plus_one: bool = False
    sandwich_norms: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", norms_plus_one=True, sandwich_norms=True),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", norms_plus_one=True, sandwich_norms=True),
}


def architecture(metadata: Mapping[str, Any], where: object) -> tuple[str, Architecture]:
    """The file's architecture: its GGUF name and what that means.

    Raises:
        CheckpointError: if it is missing or not one of `ARCHITECTURES`; `where` names the file.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: general.architecture={name!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def hf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
    where: object,
) -> dict[str, Any]:
    """A ``config.json`` for the model.

    Args:
        metadata: the file's.
        shapes: GGUF tensor name -> shape, outermost first.
        rope_factors: values of ``rope_freqs.weight`` [head_dim / 2], which Llama 3.1 and later have.
        where: names the file in messages.

    Raises:
        CheckpointError: for a missing or impossible value.
    """
    name, arch = architecture(metadata, where)
    fields = _Fields(metadata, name, where)
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where}: tensor 'token_embd.weight' is missing")
    heads = fields.positive("attention.head_count")
    hidden = fields.positive("embedding_length")
    config: dict[str, Any] = {
        "architectures": [arch.hf_name],
        "model_type": arch.model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": fields.positive("feed_forward_length"),
        "num_hidden_layers": fields.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.positive("attention.head_count_kv", heads),
        "head_dim": fields.positive("attention.key_length", hidden // heads),
        "max_position_embeddings": fields.positive("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(fields, rope_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    window = metadata.get(f"{name}.attention.sliding_window")
    if name == "llama" and window:
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": int(window),
        }
    if name in _GEMMA_27B_LAYERS:
        config |= _gemma_config(name, fields, config)
    return config


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """Reads the architecture's own metadata (``llama.block_count``), checking each value."""

    metadata: Mapping[str, Any]
    prefix: str
    where: object

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.where}: {self.prefix}.{key}={value!r}: must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
            raise CheckpointError(
                f"{self.where}: {self.prefix}.{key}={value!r}: must be a finite number >= 0"
            )
        # Stored as float32; the shortest decimal that rounds to it is what the author wrote (1e-05).
        return float(str(np.float32(value)))


def _gemma_config(name: str, fields: _Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    pattern = 2 if name == "gemma2" else _GEMMA3_PATTERN
    is_27b = layers == _GEMMA_27B_LAYERS[name]
    extra: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if is_27b else config["head_dim"],
        "sliding_window": fields.positive("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if name == "gemma2":
        extra["attn_logit_softcapping"] = fields.number("attn_logit_softcapping", 50.0)
        extra["final_logit_softcapping"] = fields.number("final_logit_softcapping", 30.0)
    else:
        extra["rope_local_base_freq"] = _GEMMA3_LOCAL_ROPE_THETA
    return extra


def _rope_scaling(fields: _Fields, factors: np.ndarray | None) -> dict[str, Any] | None:
    kind = fields.metadata.get(f"{fields.prefix}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(fields, factors)
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    original = fields.metadata.get(f"{fields.prefix}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(fields: _Fields, factors: np.ndarray) -> dict[str, Any]:
    """The parameters whose factors these are: the file keeps only the result of Llama 3.1's formula."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    theta = fields.number("rope.freq_base", 10_000.0)
    wavelength = 2 * np.pi * theta ** (np.arange(factors.size) / factors.size)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{fields.where}: rope_freqs.weight is not Llama 3's scaling of the frequencies"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """End of sequence and, for chat models, end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [int(metadata[key]) for key in keys if key in metadata]
    return list(dict.fromkeys(ids))
