"""Our own parameter tree as an Orbax checkpoint: restored straight to devices, or read back tensor by tensor.

A folder made by `save` holds ``params/`` (Orbax), ``config.json`` (Hugging Face's), the tokenizer's files,
and a marker with the format's version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from jaxserve.errors import CheckpointError
from jaxserve.files import cannot_write
from jaxserve.loading.json_files import read_json
from jaxserve.loading.source import ORBAX_MARKER
from jaxserve.loading.unfuse import unfuse
from jaxserve.models.params import Params, ParamSpec
from jaxserve.models.registry import find_family

_FORMAT_VERSION = 1
_PARAMS = "params"
_GROUP_BYTES = 512 * 2**20  # restored at a time: the host holds no more, and the progress bar moves


def save(folder: Path, params: Params, hf_config: Mapping[str, Any]) -> None:
    """Writes parameters and config into an existing folder; the marker comes last. Raises StorageError."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((folder / _PARAMS).absolute(), params)
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's own come as the latter two
        raise cannot_write(folder / _PARAMS, error) from error
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    marker = {"format": "jaxserve parameters", "version": _FORMAT_VERSION}
    (folder / ORBAX_MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")


@final
class OrbaxCheckpoint:
    """See `jaxserve.loading.checkpoint.Checkpoint`.

    Raises:
        CheckpointError: if the folder is incomplete, corrupt or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        version = read_json(folder / ORBAX_MARKER).get("version")
        if version != _FORMAT_VERSION:
            raise CheckpointError(f"{folder / ORBAX_MARKER}: version={version!r}: must be {_FORMAT_VERSION}")
        self._config = read_json(folder / "config.json")
        family = find_family(self._config)
        sources = family.weight_map(family.config_from_hf(self._config))
        self._stored = _stored_shapes(folder / _PARAMS)
        self._sources = {path: sources[path] for path in sources if path in self._stored}
        self._path_of = {name: path for path, source in self._sources.items() for name in source.names}

    @property
    def hf_config(self) -> dict[str, Any]:
        return self._config

    def names(self) -> Sequence[str]:
        return list(self._path_of)

    def shape(self, name: str) -> tuple[int, ...]:
        path = self._path(name)
        shape, dtype = self._stored[path]
        # Shapes only: an array that takes no memory.
        return unfuse(self._sources[path], np.broadcast_to(np.zeros((), dtype), shape))[name].shape

    def read(self, name: str, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        path = self._path(name)
        shape, stored = self._stored[path]
        here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        abstract = jax.ShapeDtypeStruct(shape, dtype or stored, sharding=here)
        value = self._restore({path: abstract})[path]
        return unfuse(self._sources[path], np.asarray(value))[name]

    def restore(
        self, specs: Mapping[str, ParamSpec], shardings: Mapping[str, NamedSharding]
    ) -> Iterator[tuple[str, jax.Array]]:
        """Parameters by path, each read straight to its devices in the dtype of its spec.

        Raises:
            CheckpointError: for a parameter of another shape, or unreadable files.
        """
        group: dict[str, jax.ShapeDtypeStruct] = {}
        size = 0
        for path, spec in specs.items():
            if self._stored[path][0] != spec.shape:
                raise CheckpointError(
                    f"{self.folder}: parameter {path!r} is {list(self._stored[path][0])}, "
                    f"the model needs {list(spec.shape)}"
                )
            if group and size + spec.nbytes > _GROUP_BYTES:
                yield from self._restore(group).items()
                group, size = {}, 0
            group[path] = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path])
            size += spec.nbytes
        yield from self._restore(group).items()

    def _restore(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        import orbax.checkpoint as ocp

        restore = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                return checkpointer.restore((self.folder / _PARAMS).absolute(), args=restore)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise CheckpointError(f"{self.folder / _PARAMS}: cannot be read: {error}") from error

    def _path(self, name: str) -> str:
        if name not in self._path_of:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self._path_of[name]


def _stored_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Parameter path -> (shape, dtype) as the checkpoint has them."""
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
        return {path: (tuple(array.shape), np.dtype(array.dtype)) for path, array in tree.items()}
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not an Orbax checkpoint, or incomplete: {error}") from error
