"""The tiny models of `tests.support.tiny_models` as a converter to GGUF would write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.gguf_files import llama_metadata, permute
from tests.support.tiny_models import HF_CONFIGS, hf_weights

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def to_gguf(name: str, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a tiny model under GGUF's names and conventions."""
    hf, gemma = HF_CONFIGS[name], architecture.startswith("gemma")
    metadata = llama_metadata(hf, architecture)
    if gemma:
        metadata[f"{architecture}.attention.sliding_window"] = hf["sliding_window"]
    names = _GEMMA_NAMES if gemma else _NAMES
    tensors: dict[str, np.ndarray] = {}
    for key, values in hf_weights(name).items():
        stem, _, part = key.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if architecture == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            values = permute(values, hf["num_attention_heads" if "q_proj" in stem else "num_key_value_heads"])
        if gemma and stem.endswith("norm"):
            values = values + np.float32(1)
        tensors[f"{layer}{names[stem]}.{part}"] = values
    return metadata, tensors
