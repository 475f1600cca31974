"""Faults of the machine that an engine runs on, made on purpose."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Generator
from pathlib import Path

import jax

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes."


def xla_out_of_memory() -> jax.errors.JaxRuntimeError:
    """What XLA raises."""
    return jax.errors.JaxRuntimeError(f"{OUT_OF_MEMORY}\nand a table of buffers")


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Generator[None]:
    """As on a full disk, a write stops half-way and the next one fails, in whatever library it is made.

    The system's words are "File too large" instead of "No space left on device".
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
