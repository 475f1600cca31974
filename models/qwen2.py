"""Qwen 2 and 2.5: Llama with biases on the query, key and value projections."""

from __future__ import annotations

import dataclasses
from typing import final

from jaxserve.errors import ConfigError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.hf_config import HfConfig, common_config, sliding_windows
from jaxserve.models.weights import NormNames, WeightSource, decoder_weight_map


@final
class Qwen2:
    """`Qwen2ForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        config = common_config(hf, {"max_position_embeddings": 32768}, architecture="Qwen2ForCausalLM")
        windows = qwen_windows(hf, config.num_layers)
        return dataclasses.replace(config, qkv_bias=True, sliding_windows=windows)

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are."""
        return decoder_weight_map(config, norms=NormNames())


def qwen_windows(hf: HfConfig, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window: files name one that counts only if switched on, and from max_window_layers up."""
    if not hf.get("use_sliding_window"):
        return (None,) * num_layers
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ConfigError(f"max_window_layers={first!r}: must be an integer in config.json")
    pattern = tuple("sliding_attention" if i >= first else "full_attention" for i in range(num_layers))
    return sliding_windows({"sliding_window": 4096, **hf}, num_layers, pattern)
