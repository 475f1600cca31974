"""Gemma 2, and what Gemma 3 keeps of it: sandwich norms with (1 + weight), scaled embeddings, windows."""

from __future__ import annotations

import dataclasses
from typing import final

from jaxserve.models.config import DecoderConfig
from jaxserve.models.hf_config import (
    HfConfig,
    common_config,
    optional_float,
    positive_float,
    refuse,
    sliding_windows,
)
from jaxserve.models.weights import NormNames, WeightSource, decoder_weight_map

GEMMA_NORMS = NormNames(
    mlp="pre_feedforward_layernorm",
    post_attention="post_attention_layernorm",
    post_mlp="post_feedforward_layernorm",
)
_DEFAULTS: HfConfig = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


@final
class Gemma2:
    """`Gemma2ForCausalLM`."""

    @staticmethod
    def config_from_hf(hf: HfConfig) -> DecoderConfig:
        """Reads a config.json; raises ConfigError for what cannot run."""
        return gemma_config(hf, _DEFAULTS, window_pattern=2, architecture="Gemma2ForCausalLM")

    @staticmethod
    def weight_map(config: DecoderConfig) -> dict[str, WeightSource]:
        """Where each parameter's tensors are; norm weights come without the 1 (a GGUF adds it)."""
        return decoder_weight_map(config, norms=GEMMA_NORMS)


def gemma_config(
    hf: HfConfig, defaults: HfConfig, *, window_pattern: int, architecture: str
) -> DecoderConfig:
    """What Gemma 2 and 3 share. Every ``window_pattern``-th layer sees everything, the others a window."""
    hf = {**defaults, **hf}
    refuse(hf, "use_bidirectional_attention")
    config = common_config(hf, {}, architecture=architecture)
    pattern = tuple(
        "full_attention" if (i + 1) % window_pattern == 0 else "sliding_attention"
        for i in range(config.num_layers)
    )
    biased = bool(hf.get("attention_bias"))
    return dataclasses.replace(
        config,
        norm_plus_one=True,
        sandwich_norms=True,
        qkv_bias=biased,
        o_bias=biased,
        sliding_windows=sliding_windows(hf, config.num_layers, pattern),
        attention_scale=positive_float(hf, "query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=optional_float(hf, "attn_logit_softcapping"),
        logit_soft_cap=optional_float(hf, "final_logit_softcapping"),
        embedding_scale=config.hidden_size**0.5,
    )
