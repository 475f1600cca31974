"""A model whose answers' lengths can be read off its hidden state, and nowhere else. Weights by hand.

The residual stream is one-hot: the token that was read last. Tokens 0 to 99 count down: after k comes k - 1,
and after 0 the end. `SILENT` comes after itself, nine times of ten, and then turns into one of the numbers
below `MOST`, all as likely: while it lasts, nobody can know how long the answer will be; then anybody can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.byte_tokenizer import END_ID, VOCAB_SIZE, byte_tokenizer

SILENT = 200
MOST = 60
_CERTAIN = 40.0
_HIDDEN = 272  # one for each token
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": END_ID,
}


def write_countdown_checkpoint(folder: Path) -> Path:
    """Writes the model; returns the folder."""
    assert VOCAB_SIZE <= _HIDDEN
    folder.mkdir(parents=True, exist_ok=True)
    scores = np.zeros((VOCAB_SIZE, _HIDDEN), np.float32)  # [next, read]
    for number in range(1, 100):
        scores[number - 1, number] = _CERTAIN
    scores[END_ID, 0] = _CERTAIN
    scores[:MOST, SILENT] = _CERTAIN - np.log(9.0 * MOST)
    scores[SILENT, SILENT] = _CERTAIN
    there = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": np.eye(VOCAB_SIZE, _HIDDEN, dtype=np.float32),
        "lm_head.weight": scores / _HIDDEN**0.5,  # what the norm makes of a one
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
        there + "input_layernorm.weight": np.ones(_HIDDEN, np.float32),
        there + "post_attention_layernorm.weight": np.ones(_HIDDEN, np.float32),
        there + "self_attn.q_proj.weight": np.zeros((32, _HIDDEN), np.float32),
        there + "self_attn.k_proj.weight": np.zeros((16, _HIDDEN), np.float32),
        there + "self_attn.v_proj.weight": np.zeros((16, _HIDDEN), np.float32),
        there + "self_attn.o_proj.weight": np.zeros((_HIDDEN, 32), np.float32),
        there + "mlp.gate_proj.weight": np.zeros((16, _HIDDEN), np.float32),
        there + "mlp.up_proj.weight": np.zeros((16, _HIDDEN), np.float32),
        there + "mlp.down_proj.weight": np.zeros((_HIDDEN, 16), np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    byte_tokenizer().save(folder)
    return folder
