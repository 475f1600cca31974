"""Tiny configurations of every family, and weights for them that any machine draws alike.

Only numpy, so that the recorder can run this beside torch, where there is no jax. Sizes are small but odd
enough to tell axes apart; windows are shorter than the token lists, and every switch is on somewhere.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

_BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = _BASE | {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 17,
    "sliding_window": 5,
    "tie_word_embeddings": True,
}

HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": _BASE
    | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4},
    "llama3": _BASE
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_biased": _BASE
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "mistral": _BASE
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6},
    "qwen2": _BASE
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": 8,  # transformers' Qwen2 knows no other than hidden_size / heads
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": _BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1000000.0},
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window_pattern": 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


def token_ids(name: str, count: int = 24) -> np.ndarray:
    """int32 [count] ids, other ones for every model."""
    return _random(f"tokens of {name}").randint(0, 61, count).astype(np.int32)


def hf_weights(name: str) -> dict[str, np.ndarray]:
    """float32 tensors of a model, in Hugging Face naming and layout."""
    hf = HF_CONFIGS[name]
    shapes = _shapes(hf)
    return {key: _draw(f"{name}/{key}", shape, "norm" in key, hf) for key, shape in shapes.items()}


def _shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    family = hf["model_type"]
    hidden, ffn, head_dim = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
    rows = {"q": hf["num_attention_heads"] * head_dim}
    rows["k"] = rows["v"] = hf["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (hf["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (hf["vocab_size"], hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family.startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(hf["num_hidden_layers"]):
        there = f"model.layers.{layer}."
        for norm in norms:
            shapes[f"{there}{norm}.weight"] = (hidden,)
        for p in "qkv":
            shapes[f"{there}self_attn.{p}_proj.weight"] = (rows[p], hidden)
            if family == "qwen2" or hf.get("attention_bias"):
                shapes[f"{there}self_attn.{p}_proj.bias"] = (rows[p],)
        shapes[f"{there}self_attn.o_proj.weight"] = (hidden, rows["q"])
        if hf.get("attention_bias"):
            shapes[f"{there}self_attn.o_proj.bias"] = (hidden,)
        if family in ("qwen3", "gemma3_text"):
            shapes[f"{there}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{there}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{there}mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{there}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{there}mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def _draw(key: str, shape: tuple[int, ...], is_norm: bool, hf: dict[str, Any]) -> np.ndarray:
    values = _random(key).standard_normal(shape)
    if is_norm:
        center = 0.0 if hf["model_type"].startswith("gemma") else 1.0
        return (center + 0.3 * values).astype(np.float32)
    # Large enough that attention is far from uniform and soft caps bite.
    return (values * (0.5 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5)).astype(np.float32)


def _random(key: str) -> np.random.RandomState:
    """RandomState, because numpy promises that its stream never changes."""
    return np.random.RandomState(zlib.crc32(key.encode()))
