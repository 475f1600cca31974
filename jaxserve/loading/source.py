"""From what the user typed to the files of a model."""

from __future__ import annotations

import dataclasses
import errno
import re
from pathlib import Path
from typing import Any, Literal

from jaxserve.errors import CheckpointError, ModelNotFoundError
from jaxserve.files import cannot_write
from jaxserve.loading import catalogue
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.json_files import read_json

ORBAX_MARKER = "jaxserve_checkpoint.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_LEFT_OUT = ["*/*", "consolidated*"]  # other exports of the same weights
_FORMS = (
    f"a name in the catalogue ({', '.join(catalogue.CATALOGUE)}), a .gguf file, a folder with config.json "
    "and *.safetensors, a folder made by `jaxserve convert`, or a hub name like org/name"
)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """The files of one model.

    Attributes:
        name: what the user typed.
        kind: which of the three formats.
        path: the .gguf file, or the folder.
    """

    name: str
    kind: Literal["gguf", "safetensors", "orbax"]
    path: Path


def resolve_model(name: str, cache_dir: Path, revision: str | None = None) -> ModelSource:
    """Finds a model, fetching it where the name is one of the catalogue's or the hub's.

    Args:
        name: see the message of the error.
        cache_dir: where fetched models are kept.
        revision: hub branch, tag or commit; one for all files.

    Raises:
        ModelNotFoundError: if there is no such model, or it cannot be fetched.
        CheckpointError: if the path is there and holds no model.
    """
    if name in catalogue.CATALOGUE:
        return ModelSource(name, "gguf", catalogue.pull(name, cache_dir))
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path)
    if not _HUB_NAME.fullmatch(name) or ".." in name or name.endswith(".gguf"):
        raise ModelNotFoundError(f"model={name!r}: no such file, folder or name; give {_FORMS}")
    return _local(name, _download(name, revision))


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Opens a model's weights for reading.

    Raises:
        CheckpointError: if its files are corrupt, incomplete or of an unsupported kind.
    """
    if source.kind == "gguf":
        from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(source.path)
    if source.kind == "safetensors":
        from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(source.path)
    from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint

    return OrbaxCheckpoint(source.path)


def read_architecture(name: str, cache_dir: Path, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json; a folder that holds nothing else will do. Raises as `resolve_model`."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    return open_checkpoint(resolve_model(name, cache_dir, revision)).hf_config


def _local(name: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix == ".gguf":
            return ModelSource(name, "gguf", path)
        raise CheckpointError(f"{path}: a model file must end in .gguf; give {_FORMS}")
    if (path / ORBAX_MARKER).is_file():
        return ModelSource(name, "orbax", path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return ModelSource(name, "safetensors", path)
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return ModelSource(name, "gguf", found[0])
    raise CheckpointError(f"{path}: holds no model (config.json and *.safetensors); give {_FORMS}")


def _download(name: str, revision: str | None) -> Path:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFoundError(f"revision={revision!r}: must be a branch, a tag or a commit")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT_OUT
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise cannot_write(Path(error.filename or name), error) from error
        at = f" --revision {revision}" if revision else ""
        raise ModelNotFoundError(
            f"model={name!r}: not a local path, and the hub could not be read ({_first_line(error)}). "
            f"Where there is a network run: hf download {name}{at}"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
