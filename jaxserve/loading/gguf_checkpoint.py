"""A GGUF file as a checkpoint: tensors in Hugging Face's names, layout and conventions, dequantised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_config import Architecture, architecture, hf_config
from jaxserve.loading.gguf_file import GGUFFile

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"  # part of the config, not a weight


@final
class GGUFCheckpoint:
    """See `jaxserve.loading.checkpoint.Checkpoint`.

    Raises:
        CheckpointError: if the file is corrupt, or of an architecture or storage type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile(path)
        shapes = {tensor.name: tensor.shape for tensor in self.file.tensors.values()}
        factors = self.file.dequantize(_ROPE_FACTORS) if _ROPE_FACTORS in shapes else None
        _, self._architecture = architecture(self.file.metadata, path)
        self._config = hf_config(self.file.metadata, shapes, factors, path)
        self._gguf_names = {
            hf_name(name, self._architecture, path): name for name in shapes if name != _ROPE_FACTORS
        }

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._config

    def names(self) -> Sequence[str]:
        return list(self._gguf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._gguf_name(name)].shape

    def read(self, name: str, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        if self._architecture.norms_plus_one and name.endswith("norm.weight"):
            # In float32, exactly; rounding comes after.
            values = self.file.dequantize(self._gguf_name(name), np.float32) - np.float32(1)
            return values.astype(dtype or values.dtype, copy=False)
        values = self.file.dequantize(self._gguf_name(name), dtype)
        if self._architecture.permuted and ".q_proj." in name:
            return _unpermute(values, self._config["num_attention_heads"])
        if self._architecture.permuted and ".k_proj." in name:
            return _unpermute(values, self._config["num_key_value_heads"])
        return values

    def _gguf_name(self, name: str) -> str:
        if name not in self._gguf_names:
            raise CheckpointError(f"{self.file.path}: tensor {name!r} is missing")
        return self._gguf_names[name]


def hf_name(name: str, arch: Architecture, where: object) -> str:
    """Hugging Face's name of a GGUF tensor.

    Raises:
        CheckpointError: for a tensor that no supported model has.
    """
    stem, _, part = name.rpartition(".")
    if stem in _GLOBAL_NAMES and part == "weight":
        return f"{_GLOBAL_NAMES[stem]}.{part}"
    match = _LAYER.fullmatch(name)
    names = _LAYER_NAMES | _SANDWICH_NAMES if arch.sandwich_norms else _LAYER_NAMES
    if match is None or match[2] not in names:
        raise CheckpointError(f"{where}: tensor {name!r} is none that a {arch.hf_name} has")
    return f"model.layers.{int(match[1])}.{names[match[2]]}.{match[3]}"


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows back from interleaved pairs (x0 y0 x1 y1 ...) to halves (x0 x1 ... y0 y1 ...), head by head."""
    if values.shape[0] % (2 * heads):
        raise CheckpointError(f"{values.shape[0]} rows of q or k do not divide into {heads} heads of pairs")
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
