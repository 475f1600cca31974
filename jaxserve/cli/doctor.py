"""`jaxserve doctor`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from jaxserve.cli.arguments import command_parser
from jaxserve.config import EngineConfig

_PACKAGES = (
    *(
        "jaxserve-engine",
        "jax",
        "jaxlib",
        "flax",
        "orbax-checkpoint",
        "numpy",
        "ml_dtypes",
        "tokenizers",
        "grpcio",
    ),
    *("protobuf", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
_GIB = 2**30


def main(argv: list[str]) -> int:
    """Prints versions, devices and folders; 1 if JAX finds no device at all."""
    command_parser("doctor", "Show versions, devices, memory and folders.").parse_args(argv)
    width = max(map(len, _PACKAGES))
    for name, value in (*_system(), *_versions(), *_folders()):
        print(f"{name:{width}}  {value}", flush=True)
    try:
        import jax

        devices = jax.devices()
    except RuntimeError as error:
        print(f"{'devices':{width}}  none: {error}", file=sys.stderr)
        return 1
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / _GIB:.1f} GiB for JAX" if memory else ""
        print(f"{'device':{width}}  {device.platform}:{device.id} {device.device_kind}{size}")
    return 0


def _system() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    memory = psutil.virtual_memory()
    yield (
        "processor",
        f"{psutil.cpu_count()} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
    )


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _folders() -> Iterator[tuple[str, str]]:
    cache = EngineConfig().cache_dir
    yield "cache", f"{cache}, {_size(cache) / _GIB:.2f} GiB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
