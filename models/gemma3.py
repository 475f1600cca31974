"""Gemma 3 text models: Gemma 2 with normed queries and keys, no soft caps, and two rotary embeddings."""

from __future__ import annotations

import dataclasses
from typing import final

from jaxserve.models.config import DecoderConfig
from jaxserve.models.gemma2 import GEMMA_NORMS, gemma_config
from jaxserve.models.hf_config import HfConfig, positive_int, rope_config
from jaxserve.models.weights import WeightSource, decoder_weight_map

_DEFAULTS: HfConfig = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


@final
class Gemma3:
    """`Gemma3ForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        hf = {**_DEFAULTS, **hf}
        both: HfConfig = hf.get("rope_parameters") or {}
        # Old files: one scaling, of the full layers alone. New ones: parameters for each kind of layer.
        full = {**hf, "rope_parameters": both.get("full_attention")}
        local = {
            "rope_theta": hf["rope_local_base_freq"],
            "rope_parameters": both.get("sliding_attention"),
        }
        config = gemma_config(
            full,
            {},
            window_pattern=positive_int(hf, "sliding_window_pattern"),
            architecture="Gemma3ForCausalLM",
        )
        return dataclasses.replace(config, qk_norm=True, local_rope=rope_config(local))

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are; norm weights come without the 1 (a GGUF adds it)."""
        return decoder_weight_map(config, norms=GEMMA_NORMS)
