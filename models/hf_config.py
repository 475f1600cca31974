"""Reading a Hugging Face ``config.json``: what all families share, and refusing what no family can run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from jaxserve.errors import ConfigError
from jaxserve.models.config import Activation, DecoderConfig, LinearScaling, Llama3Scaling, RopeConfig

HfConfig = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_DEFAULTS: HfConfig = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def common_config(hf: HfConfig, defaults: HfConfig, *, architecture: str) -> DecoderConfig:
    """What every Llama-like config says; a family replaces what it does otherwise.

    Args:
        hf: the config.json.
        defaults: what the family assumes for absent fields; checkpoints leave out what was the default.
        architecture: for messages.

    Raises:
        ConfigError: for a field that is missing, malformed or asks for what is not supported.
    """
    hf = {**_DEFAULTS, **defaults, **hf}
    quantization = _optional_object(hf, "quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ConfigError(f"quantization_config={method!r}: safetensors weights must not be quantised")
    activation = hf.get("hidden_activation") or hf["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act={activation!r}: must be one of {', '.join(_ACTIVATIONS)}")
    num_heads = positive_int(hf, "num_attention_heads")
    hidden = positive_int(hf, "hidden_size")
    head_dim = hidden // num_heads if hf.get("head_dim") is None else positive_int(hf, "head_dim")
    no_kv_heads = hf.get("num_key_value_heads") is None
    return DecoderConfig(
        architecture=architecture,
        vocab_size=positive_int(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive_int(hf, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads if no_kv_heads else positive_int(hf, "num_key_value_heads"),
        head_dim=head_dim,
        max_position_embeddings=positive_int(hf, "max_position_embeddings"),
        rope=rope_config(hf),
        sliding_windows=(None,) * positive_int(hf, "num_hidden_layers"),
        norm_eps=positive_float(hf, "rms_norm_eps"),
        tie_embeddings=bool(hf["tie_word_embeddings"]),
        activation=_ACTIVATIONS[activation],
        attention_scale=head_dim**-0.5,
        eos_token_ids=_token_ids(hf, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(hf, "bos_token_id")), None),
    )


def rope_config(hf: HfConfig) -> RopeConfig:
    """The rotary embedding, from ``rope_parameters`` (new files) or ``rope_theta`` and ``rope_scaling``."""
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    scaling = _optional_object(hf, name)
    theta = scaling.get("rope_theta") or hf["rope_theta"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial!r}: must be 1.0")
    theta = positive_float({"rope_theta": theta}, "rope_theta")
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, scaling=LinearScaling(factor=positive_float(scaling, "factor")))
        case "llama3":
            return RopeConfig(
                theta=theta,
                scaling=Llama3Scaling(
                    factor=positive_float(scaling, "factor"),
                    low_freq_factor=positive_float(scaling, "low_freq_factor"),
                    high_freq_factor=positive_float(scaling, "high_freq_factor"),
                    original_max_position_embeddings=positive_int(
                        scaling, "original_max_position_embeddings"
                    ),
                ),
            )
        case _:
            raise ConfigError(f"rope_type={kind!r}: must be one of default, linear, llama3")


def sliding_windows(hf: HfConfig, num_layers: int, default_types: tuple[str, ...]) -> tuple[int | None, ...]:
    """Each layer's window, from ``layer_types`` where the file has it, else from the family's pattern.

    Args:
        hf: the config.json, family defaults included.
        num_layers: of the model.
        default_types: "sliding_attention" or "full_attention" for each layer.
    """
    types = hf.get("layer_types") or default_types
    if not isinstance(types, list | tuple):
        raise ConfigError(f"layer_types={types!r}: must be a list in config.json")
    if len(types) != num_layers:
        raise ConfigError(f"layer_types has {len(types)} entries: must be num_hidden_layers={num_layers}")
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise ConfigError(f"layer_types={kind!r}: must be sliding_attention or full_attention")
    if hf.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive_int(hf, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def optional_float(hf: HfConfig, name: str) -> float | None:
    """A positive number, or None where the field is absent or null."""
    return None if hf.get(name) is None else positive_float(hf, name)


def positive_float(hf: HfConfig, name: str) -> float:
    """A field that must be a positive, finite number."""
    value = hf.get(name)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0.0 < cast(float, value) < math.inf:
        raise ConfigError(f"{name}={value!r}: must be a positive number in config.json")
    return float(cast(float, value))


def positive_int(hf: HfConfig, name: str) -> int:
    """A field that must be a positive integer."""
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a positive integer in config.json")
    return value


def refuse(hf: HfConfig, name: str) -> None:
    """Raises ConfigError if a switch is on that would change what the model computes."""
    if hf.get(name):
        raise ConfigError(f"{name}={hf[name]!r}: is not supported, must be false")


def _optional_object(hf: HfConfig, name: str) -> HfConfig:
    value = hf.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r}: must be an object in config.json")
    return cast(HfConfig, value)


def _token_ids(hf: HfConfig, name: str) -> tuple[int, ...]:
    value = hf.get(name)
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{name}={value!r}: must be a token id, or a list of them")
    return tuple(ids)
