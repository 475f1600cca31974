"""A folder in Hugging Face's layout: ``config.json`` and one or several ``*.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from jaxserve.errors import CheckpointError
from jaxserve.loading.json_files import read_json

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@final
class SafetensorsCheckpoint:
    """See `jaxserve.loading.checkpoint.Checkpoint`. Files are mapped; a tensor is copied when it is read.

    Raises:
        CheckpointError: if a file is missing or corrupt, or the index and the files do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = read_json(folder / "config.json")
        self._files: dict[str, Any] = {}  # file name -> open handle
        self._file_of: dict[str, str] = {}  # tensor -> file name
        index = read_json(folder / INDEX_NAME, missing={})
        if not index:
            self._add_file(_only_file(folder))
            return
        expected = _weight_map(folder, index)
        for name in sorted(set(expected.values())):
            self._add_file(name)
        missing = sorted(name for name, file in expected.items() if self._file_of.get(name) != file)
        if missing:
            raise CheckpointError(
                f"{folder / expected[missing[0]]}: lacks {len(missing)} tensors "
                f"of the index, e.g. {missing[0]!r}"
            )

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._config

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        stored = self._slice(name).get_dtype()
        where = self.folder / self._file_of[name]
        if stored not in _DTYPES:
            raise CheckpointError(f"{where}: tensor {name!r} is {stored}; read are {', '.join(_DTYPES)}")
        try:
            values: np.ndarray = self._files[self._file_of[name]].get_tensor(name)
        except (SafetensorError, ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: tensor {name!r}: {error}") from error
        return values.astype(dtype or values.dtype, copy=False)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self._files[self._file_of[name]].get_slice(name)

    def _add_file(self, name: str) -> None:
        path = self.folder / name
        try:
            handle = safe_open(path, framework="numpy")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: this shard of the checkpoint is missing") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a safetensors file, or truncated: {error}") from error
        self._files[name] = handle
        for tensor in handle.keys():  # noqa: SIM118  not a dict
            if tensor in self._file_of:
                raise CheckpointError(f"{path}: tensor {tensor!r} is in {self._file_of[tensor]} too")
            self._file_of[tensor] = name


def _only_file(folder: Path) -> str:
    if (folder / "model.safetensors").is_file():
        return "model.safetensors"
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: needs model.safetensors, or {INDEX_NAME} "
            f"that says what is in which of {found or 'the files'}"
        )
    return found[0]


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """Tensor -> file name, with no way out of the folder."""
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{folder / INDEX_NAME}: weight_map must be a non-empty object")
    for name, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_NAME}: {name!r} is said to be in {file!r}: must be a *.safetensors"
            )
    return mapping
