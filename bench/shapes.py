"""Models by the shape of a known one, with random weights: their steps take as long as the real one's.

Only shapes decide how long a step takes. So timings need no checkpoint and no network, and these models run
wherever their weights fit.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from bench.workloads import PromptSource
from jaxserve.config import EngineConfig
from jaxserve.engine.build import LoadedModel, declare_model, load_model, start_platform
from jaxserve.errors import ConfigError
from jaxserve.loading.tokenizer import SpecialTokens, Tokenizer
from jaxserve.models.params import param_specs
from jaxserve.models.sharding import shardings_for
from jaxserve.models.weights import random_params

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA_3_2_1B: dict[str, Any] = LLAMA_3_1_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SMOLLM2_135M: dict[str, Any] = LLAMA_3_1_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
QWEN_3_8B: dict[str, Any] = LLAMA_3_1_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN_3_0_6B: dict[str, Any] = QWEN_3_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = LLAMA_3_1_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
# Architectures as their config.json files have them; `tiny` is nobody's, and tries a bench out.
MODELS = {
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "smollm2-135m": SMOLLM2_135M,
    "qwen3-8b": QWEN_3_8B,
    "qwen3-0.6b": QWEN_3_0_6B,
    "tiny": TINY,
}


def add_shape_flag(parser: argparse.ArgumentParser) -> None:
    """``--shape``, the same for every bench."""
    parser.add_argument(
        "--shape",
        choices=tuple(MODELS),
        help="random weights of this shape, made on the device, in place of --model",
    )


def model_of(config: EngineConfig, shape: str | None, *, progress: bool = False) -> LoadedModel:
    """The shape with random weights, or the configured model if none is named. Raises as `load_model`."""
    return load_model(config, progress=progress) if shape is None else random_model(config, shape)


def prompt_source(model: LoadedModel, shape: str | None, traces: Path | None, seed: int) -> PromptSource:
    """Prompts for a model of `model_of`: real texts for a real one, random ids for random weights."""
    return PromptSource(model.tokenizer, traces if shape is None else None, seed)


def random_model(config: EngineConfig, shape: str) -> LoadedModel:
    """A model of a named shape; its weights are drawn on the device from ``config.seed``.

    Raises:
        ConfigError: for an unknown name, or devices that cannot share this model.
    """
    if shape not in MODELS:
        raise ConfigError(f"shape={shape!r}: must be one of {', '.join(MODELS)}")
    platform = start_platform(config)
    module, placement = declare_model(config, platform, MODELS[shape])
    specs = param_specs(module)
    shardings = shardings_for(specs, placement.mesh, placement.rules)
    params = random_params(specs, shardings, config.seed)
    tokenizer = letters_tokenizer(module.config.vocab_size)
    return LoadedModel(shape, None, platform, placement, module, params, tokenizer)


@functools.cache
def letters_tokenizer(vocab_size: int) -> Tokenizer:
    """One token a word of one letter or more: real detokenising, no file. It reads no text."""
    words = [chr(ord("a") + index % 26) * (1 + index // 26 % 8) + str(index) for index in range(vocab_size)]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a0")
    )
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, SpecialTokens())
