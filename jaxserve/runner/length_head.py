"""The network that reads a hidden state and says how many tokens are still to come.

After ARES (arXiv 2510.13668): a small MLP on the last token's hidden state, asked again while the request
decodes. Ours gives three quantiles of ``log(1 + remaining)``, sees the state of any layers divided by its
root mean square, and the numbers of tokens generated and in the prompt. It never sees ``max_tokens``: that is
a limit that callers choose, not a property of the answer, and the host clips to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ConfigError
from jaxserve.files import write_safetensors
from jaxserve.models.config import DecoderConfig

# A safetensors file, but not by its name: a model's folder is searched for those.
FILE_NAME = "length_head"
QUANTILES = (0.1, 0.5, 0.9)
NUM_COUNTS = 2
_FORMAT = "1"
_COUNT_SCALE = 8.0  # log(1 + 3000): counts come in at about the size of a normed state
_EPS = 1e-6

HeadParams = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class LengthHead:
    """A trained head.

    Attributes:
        layers: whose states it reads, counted from 1.
        params: ``0.kernel`` float32 [in, out], ``0.bias`` float32 [out], ``1.kernel``, ...
        model: `model_identity` of the model that it was trained for.
        training: how it was trained and what it reached, for people.
    """

    layers: tuple[int, ...]
    params: Mapping[str, Any]
    model: str
    training: Mapping[str, Any]


def init_params(key: jax.Array, state_size: int, widths: Sequence[int]) -> HeadParams:
    """Fresh parameters: He's initialisation, and a last layer near zero.

    Args:
        state_size: numbers of a row's states, over all layers.
        widths: of the hidden layers.
    """
    sizes = [state_size + NUM_COUNTS, *widths, len(QUANTILES)]
    params: HeadParams = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        scale = (2.0 / fan_in) ** 0.5 * (1.0 if i < len(widths) else 0.01)
        key, drawn = jax.random.split(key)
        params[f"{i}.kernel"] = scale * jax.random.normal(drawn, (fan_in, fan_out), jnp.float32)
        params[f"{i}.bias"] = jnp.zeros(fan_out, jnp.float32)
    return params


def counts(generated: Any, prompt_tokens: Any) -> np.ndarray:
    """float32 [n, NUM_COUNTS] from tokens generated [n] and prompt tokens [n]."""
    return (np.log1p(np.stack([generated, prompt_tokens], axis=-1)) / _COUNT_SCALE).astype(np.float32)


def normed(states: jax.Array) -> jax.Array:
    """States [..., D] divided by their root mean square, float32."""
    x = states.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPS)


def log_remaining(params: Mapping[str, jax.Array], states: jax.Array, token_counts: jax.Array) -> jax.Array:
    """Quantiles of log(1 + remaining tokens), float32 [n, 3], increasing.

    Args:
        params: of a head.
        states: [n, layers, D], `normed`.
        token_counts: float32 [n, NUM_COUNTS], `counts`.
    """
    x = jnp.concatenate([states.astype(jnp.float32).reshape(states.shape[0], -1), token_counts], axis=-1)
    last = len(params) // 2 - 1
    for i in range(last + 1):
        x = x @ params[f"{i}.kernel"] + params[f"{i}.bias"][None]
        x = jax.nn.relu(x) if i < last else x
    below, middle, above = x[:, 0], x[:, 1], x[:, 2]
    return jnp.stack([middle - jax.nn.softplus(below), middle, middle + jax.nn.softplus(above)], axis=-1)


def model_identity(config: DecoderConfig, params: Mapping[str, jax.Array]) -> str:
    """A digest of a model: its architecture and, rounded to bfloat16, the weights of its final norm.

    The same for every precision that the model is served in.
    """
    norm = np.asarray(params["final_norm.weight"], np.float32).astype(ml_dtypes.bfloat16)
    return hashlib.sha256(repr(config).encode() + norm.tobytes()).hexdigest()[:16]


def head_places(model_path: Path | None, cache_dir: Path, identity: str) -> list[Path]:
    """Where a model's head is looked for: beside its files, if it has any, and in the cache folder."""
    cached = cache_dir / "length_heads" / f"{identity}.{FILE_NAME}"
    if model_path is None:
        return [cached]
    if model_path.is_dir():
        return [model_path / FILE_NAME, cached]
    return [model_path.with_name(f"{model_path.name}.{FILE_NAME}"), cached]


def save_head(head: LengthHead, path: Path) -> None:
    """Writes a head to a safetensors file. Raises StorageError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": _FORMAT,
        "model": head.model,
        "layers": json.dumps(head.layers),
        "training": json.dumps(dict(head.training)),
    }
    write_safetensors({name: np.asarray(value) for name, value in head.params.items()}, path, metadata)


def load_head(path: Path, identity: str) -> LengthHead:
    """Reads a head.

    Args:
        identity: `model_identity` of the model that is served.

    Raises:
        ConfigError: if the file is no head, or one of another model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            params = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata["format"] != _FORMAT:
            raise ConfigError(f"length_head={path}: made by another version of jaxserve; train it again")
        head = LengthHead(
            tuple(json.loads(metadata["layers"])), params, metadata["model"], json.loads(metadata["training"])
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(
            f"length_head={path}: not a file made by `jaxserve train-predictor` ({error})"
        ) from None
    if head.model != identity:
        raise ConfigError(
            f"length_head={path}: trained for the model {head.model}, this one is {identity}; "
            "train one for it, or give length_head='none'"
        )
    return head
