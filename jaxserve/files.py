"""Files that are there whole or not at all, and what is said when there is no room for them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from jaxserve.errors import StorageError

if TYPE_CHECKING:
    import numpy as np

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A path beside ``path`` to write to; the file takes its place, and any older one's, when the block ends.

    Nothing is left of a block that fails.

    Raises:
        StorageError: if the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_safetensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. Raises StorageError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with whole_file(path) as scratch:
        try:
            save_file(dict(tensors), scratch, dict(metadata))
        except SafetensorError as error:
            raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> StorageError:
    """What to raise for a file or folder that an error kept from being written."""
    if isinstance(error, StorageError):
        return StorageError(path, error.reason)
    return StorageError(path, (isinstance(error, OSError) and error.strerror) or str(error))


@final
class JsonLinesFile:
    """JSON lines of an engine that runs: a disk that is full ends the file, never the engine.

    It holds whole lines only. What cannot be written is cut off, said once in the log, and nothing more is
    written.

    Args:
        path: opened for writing.
        keep: bytes of an existing file that stay; the rest is cut off.
        buffer_bytes: so much is collected before it is written; 0 writes every line at once.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, *, keep: int = 0, buffer_bytes: int = 0) -> None:
        self._path = path
        self._file = path.open("r+b" if keep else "wb", buffering=0)
        self._buffer = bytearray()
        self._buffer_bytes = buffer_bytes
        self._size = keep
        self._is_open = True
        if keep:
            self._file.truncate(keep)
            self._file.seek(keep)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; does nothing once the file is closed or has failed."""
        if self._is_open:
            self._buffer += json.dumps(record).encode() + b"\n"
            if len(self._buffer) > self._buffer_bytes:
                self._flush()

    def close(self) -> None:
        """Writes what is left. May be called twice."""
        if self._is_open:
            self._flush()
            self._is_open = False
            self._file.close()

    def _flush(self) -> None:
        try:
            rest = memoryview(bytes(self._buffer))
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._give_up(error)
            return
        self._size += len(self._buffer)
        self._buffer.clear()

    def _give_up(self, error: OSError) -> None:
        _LOG.error("%s: %s; it ends here, and the engine goes on", self._path, error.strerror)
        self._is_open = False
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)
        with contextlib.suppress(OSError):
            self._file.close()
