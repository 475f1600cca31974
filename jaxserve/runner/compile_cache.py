"""The folder where JAX keeps compiled programs: broken ones are taken out before JAX reads them.

JAX writes an entry in place and never again, so half a one, which a full disk or a kill leaves, would stay.
It checks little of what it reads, and that is native code. So beside each entry lies its SHA-256, written
when the engine that made it was ready, with the entry's size and time: only where those have changed is it
read at a start. An entry without a seal must at least decompress.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import warnings
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.errors import StorageError
from jaxserve.files import whole_file

_LOG = logging.getLogger(__name__)

_ENTRIES = "*-cache"
_SEAL = ".sha256"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def use_compile_cache(folder: Path) -> bool:
    """Keeps every program that is compiled from now on in a folder, and takes it from there.

    Returns:
        Whether it can: not in a folder that cannot be made, or has a broken entry that cannot be removed.
        Then programs are compiled and not kept, and the log says why.
    """
    usable = _make(folder) and take_out_broken(folder)
    wanted = str(folder) if usable else None
    if jax.config.jax_compilation_cache_dir != wanted:
        jax.config.update("jax_compilation_cache_dir", wanted)
        compilation_cache.reset_cache()  # one that is in use already would stay where it is
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return usable


def _make(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # nobody else may write native code there
    except OSError as error:
        _LOG.warning("compiled programs are not kept: %s: %s", folder, error.strerror)
        return False
    return True


@contextlib.contextmanager
def keeping_every_program(folder: Path) -> Generator[None]:
    """Raises StorageError for a program that JAX cannot write: an engine can do without, a bundle cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Error writing persistent compilation cache entry")
        try:
            yield
        except UserWarning as warning:
            raise StorageError(folder, str(warning)) from warning


def take_out_broken(folder: Path) -> bool:
    """Removes entries that are not what was written; returns whether none is left."""
    stuck = False
    for entry, problem in _broken(folder, again=True):
        _LOG.warning("compiled program %s is broken (%s): it is compiled again", entry, problem)
        try:
            entry.unlink(missing_ok=True)
            _seal_of(entry).unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("%s cannot be removed (%s): no compiled program is kept", entry, error.strerror)
            stuck = True
    return not stuck


def seal(folder: Path) -> int:
    """Writes down what entries are, for those that are new; call it when everything is compiled.

    Entries of which a full disk left a part are removed.

    Returns:
        The number of whole entries.
    """
    for entry, _ in _broken(folder, again=False):
        with contextlib.suppress(OSError):
            entry.unlink(missing_ok=True)
    entries = list(folder.glob(_ENTRIES))
    for entry in entries:
        if not _seal_of(entry).exists():
            with contextlib.suppress(OSError, StorageError), whole_file(_seal_of(entry)) as scratch:
                scratch.write_text(f"{_digest(entry.read_bytes())} {_looks_of(entry)}")
    return len(entries)


def _broken(folder: Path, *, again: bool) -> Iterator[tuple[Path, str]]:
    """Entries that are not whole, and why; with ``again`` those that are sealed are read, too."""
    for entry in sorted(folder.glob(_ENTRIES)):
        try:
            text = _seal_of(entry).read_text() if _seal_of(entry).exists() else ""
            sealed, _, looks = text.partition(" ")
            if sealed and (looks == _looks_of(entry) or not again):
                continue
            data = entry.read_bytes()
        except FileNotFoundError:  # another engine has just taken it out
            continue
        except (OSError, ValueError) as error:
            yield entry, str(error)
            continue
        if sealed and sealed != _digest(data):
            yield entry, "its SHA-256 has changed"
        elif not sealed and not _decompresses(data):
            yield entry, "it cannot be decompressed"


def _seal_of(entry: Path) -> Path:
    return entry.with_name(entry.name + _SEAL)


def _looks_of(entry: Path) -> str:
    found = entry.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decompresses(data: bytes) -> bool:
    """Whether JAX could unpack an entry: it uses zstd where Python has it, else zlib."""
    if not data.startswith(_ZSTD_MAGIC):
        return _unpacks(zlib.decompress, data, zlib.error)
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            zstd: Any = importlib.import_module(name)
            return _unpacks(zstd.decompress, data, zstd.ZstdError)
    return False  # nor can JAX


def _unpacks(decompress: Any, data: bytes, error: type[Exception]) -> bool:
    try:
        decompress(data)
    except error:
        return False
    return True
