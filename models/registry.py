"""Which family runs a checkpoint. A new family is a file and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from jaxserve.errors import ConfigError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.weights import WeightSource

MODELS = {
    "Gemma2ForCausalLM": "jaxserve.models.gemma2:Gemma2",
    "Gemma3ForCausalLM": "jaxserve.models.gemma3:Gemma3",
    "LlamaForCausalLM": "jaxserve.models.llama:Llama",
    "MistralForCausalLM": "jaxserve.models.llama:Mistral",
    "Qwen2ForCausalLM": "jaxserve.models.qwen2:Qwen2",
    "Qwen3ForCausalLM": "jaxserve.models.qwen3:Qwen3",
}


class Family(Protocol):
    """How a family's checkpoints map onto the decoder."""

    def config_from_hf(self, hf: Mapping[str, Any]) -> DecoderConfig:
        """Reads a Hugging Face config.json; raises ConfigError for what cannot run."""
        ...

    def weight_map(self, config: DecoderConfig) -> dict[str, WeightSource]:
        """For every parameter path the tensors, in Hugging Face naming, that it is fused from."""
        ...


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json's first architecture.

    Raises:
        ConfigError: if it names none, or one that is not in the registry.
    """
    names: list[Any] = hf.get("architectures") or []
    name = names[0] if names else None
    if not isinstance(name, str) or name not in MODELS:
        raise ConfigError(f"architectures={name!r}: must be one of {', '.join(MODELS)}")
    module, _, attribute = MODELS[name].partition(":")
    return cast(Family, getattr(importlib.import_module(module), attribute))
