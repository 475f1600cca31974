"""A tiny model as a folder on disk: config.json, safetensors, a tokenizer whose ids are bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.byte_tokenizer import END_ID, VOCAB_SIZE, byte_tokenizer

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": END_ID,
}


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes random weights whose greedy answers do not fall into a loop at once; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    hidden, ffn, heads, kv_heads, head_dim, vocab = (
        TINY_CONFIG[key]
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
        )
    )

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 2.0 / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(vocab, hidden) * 4, "lm_head.weight": draw(vocab, hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(TINY_CONFIG["num_hidden_layers"]):
        there = f"model.layers.{layer}."
        tensors |= {
            there + "input_layernorm.weight": np.ones(hidden, np.float32),
            there + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            there + "self_attn.q_proj.weight": draw(heads * head_dim, hidden),
            there + "self_attn.k_proj.weight": draw(kv_heads * head_dim, hidden),
            there + "self_attn.v_proj.weight": draw(kv_heads * head_dim, hidden),
            there + "self_attn.o_proj.weight": draw(hidden, heads * head_dim),
            there + "mlp.gate_proj.weight": draw(ffn, hidden),
            there + "mlp.up_proj.weight": draw(ffn, hidden),
            there + "mlp.down_proj.weight": draw(hidden, ffn),
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    byte_tokenizer().save(folder)
    return folder
