"""Llama 2 and 3, what copied them (SmolLM2, ...), and Mistral, which adds a window to every layer."""

from __future__ import annotations

import dataclasses
from typing import final

from jaxserve.models.config import DecoderConfig
from jaxserve.models.hf_config import HfConfig, common_config, refuse, sliding_windows
from jaxserve.models.weights import NormNames, WeightSource, decoder_weight_map


@final
class Llama:
    """`LlamaForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        refuse(hf, "mlp_bias")
        biased = bool(hf.get("attention_bias"))
        config = common_config(hf, {}, architecture="LlamaForCausalLM")
        return dataclasses.replace(config, qkv_bias=biased, o_bias=biased)

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are."""
        return decoder_weight_map(config, norms=NormNames())


@final
class Mistral:
    """`MistralForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        # Absent means the default of the first release; later ones say null.
        defaults: HfConfig = {"sliding_window": 4096, "num_key_value_heads": 8}
        config = common_config(hf, defaults, architecture="MistralForCausalLM")
        pattern = ("sliding_attention",) * config.num_layers
        windows = sliding_windows({**defaults, **hf}, config.num_layers, pattern)
        return dataclasses.replace(config, sliding_windows=windows)

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are."""
        return decoder_weight_map(config, norms=NormNames())
