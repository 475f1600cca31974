"""Qwen 3 (dense): Llama with normed queries and keys."""

from __future__ import annotations

import dataclasses
from typing import final

from jaxserve.models.config import DecoderConfig
from jaxserve.models.hf_config import HfConfig, common_config
from jaxserve.models.qwen2 import qwen_windows
from jaxserve.models.weights import NormNames, WeightSource, decoder_weight_map


@final
class Qwen3:
    """`Qwen3ForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        defaults: HfConfig = {"max_position_embeddings": 32768, "head_dim": 128}
        config = common_config(hf, defaults, architecture="Qwen3ForCausalLM")
        biased = bool(hf.get("attention_bias"))
        windows = qwen_windows(hf, config.num_layers)
        return dataclasses.replace(
            config, qk_norm=True, qkv_bias=biased, o_bias=biased, sliding_windows=windows
        )

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are."""
        return decoder_weight_map(config, norms=NormNames())
