"""`jaxserve convert`: between checkpoint formats."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxserve.errors import ConfigError, StorageError
from jaxserve.files import cannot_write, write_safetensors
from jaxserve.loading import orbax_checkpoint
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.safetensors_checkpoint import INDEX_NAME
from jaxserve.loading.source import ModelSource, open_checkpoint
from jaxserve.loading.tokenizer import load_tokenizer
from jaxserve.loading.weights import load_params
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import ShardingRules, make_mesh

Target = Literal["orbax", "safetensors"]
_DTYPES = ("float32", "bfloat16", "float16")
_SHARD_BYTES = 2 * 2**30
_MOST_REMOVAL_S = 10.0
_REMOVAL_PAUSE_S = 0.05
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def convert(
    source: ModelSource, target: Path, dtype: str, kind: Target | None = None, *, progress: bool = True
) -> ModelSource:
    """Writes a model in another format, with its config and its tokenizer.

    Args:
        source: from `resolve_model`.
        target: a folder that does not exist yet; it appears when it is complete.
        dtype: of the weights written: float32, bfloat16 or float16.
        kind: ``orbax`` (our parameters, restored straight to devices) or ``safetensors`` (Hugging Face's
            layout). By default an Orbax source becomes safetensors, anything else Orbax.
        progress: show a bar.

    Raises:
        ConfigError: if the target exists or the dtype is unknown.
        CheckpointError: if the source is corrupt or incomplete.
        StorageError: if the target cannot be written; nothing of it is left.
    """
    kind = kind or ("safetensors" if source.kind == "orbax" else "orbax")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    if target.exists():
        raise ConfigError(f"target={str(target)!r}: exists already; give a new folder")
    checkpoint = open_checkpoint(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _scratch_folder(target.parent) as scratch:
            folder = scratch / "model"
            folder.mkdir()
            config = {**checkpoint.hf_config, "torch_dtype": dtype, "dtype": dtype}
            if kind == "orbax":
                _write_orbax(checkpoint, config, folder, dtype, progress)
            else:
                _write_safetensors(checkpoint, config, folder, dtype)
            _write_tokenizer(source, folder)
            folder.rename(target)
    except (OSError, StorageError) as error:
        raise cannot_write(target, error) from error
    return ModelSource(str(target), kind, target)


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Generator[Path]:
    """A folder that is gone when the block fails, though TensorStore's threads may still write to it then."""
    folder = Path(tempfile.mkdtemp(prefix=".convert-", dir=parent))
    try:
        yield folder
    except BaseException:
        num_times_gone, end = 0, time.monotonic() + _MOST_REMOVAL_S
        while num_times_gone < 3 and time.monotonic() < end:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(_REMOVAL_PAUSE_S)
            num_times_gone = 0 if folder.exists() else num_times_gone + 1
        raise
    shutil.rmtree(folder)


def _write_orbax(
    checkpoint: Checkpoint, config: dict[str, Any], folder: Path, dtype: str, progress: bool
) -> None:
    family = find_family(config)
    model_config = family.config_from_hf(config)
    module = Decoder(model_config, dtype)
    mesh = make_mesh(1, jax.devices("cpu"))
    sources = family.weight_map(model_config)
    params = load_params(checkpoint, module, sources, mesh, ShardingRules(), progress=progress)
    orbax_checkpoint.save(folder, params, config)


def _write_safetensors(checkpoint: Checkpoint, config: dict[str, Any], folder: Path, dtype: str) -> None:
    shards = list(_shards(checkpoint, np.dtype(jax.numpy.dtype(dtype)).itemsize))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        tensors = {
            name: np.ascontiguousarray(checkpoint.read(name, jax.numpy.dtype(dtype))) for name in names
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        write_safetensors(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(checkpoint: Checkpoint, itemsize: int) -> Iterator[list[str]]:
    """Names in groups that fit in one file each."""
    names: list[str] = []
    size = 0
    for name in sorted(checkpoint.names()):
        nbytes = int(np.prod(checkpoint.shape(name), dtype=np.int64)) * itemsize
        if names and size + nbytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _write_tokenizer(source: ModelSource, folder: Path) -> None:
    if source.kind == "gguf":
        load_tokenizer(source).save(folder)
        return
    for name in _TOKENIZER_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
