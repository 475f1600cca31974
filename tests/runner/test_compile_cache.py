"""Compiled programs that are broken on the disk: never a crash, a warning, and compiled again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.build import start_platform
from jaxserve.runner.compile_cache import seal, use_compile_cache
from tests.support.faults import files_of_at_most, names_in

pytestmark = pytest.mark.usefixtures("compile_cache_is_restored")


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x28\xb5\x2f\xfd" + b"garbage" * 50,
    "a flipped bit": flipped,
    "another's": lambda data: data[:4] + bytes(reversed(data[4:])),
}


class Hits:
    """Programs that JAX has taken from the folder."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_listener(self._listen)

    def _listen(self, event: str, **_: Any) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


@pytest.fixture(scope="module")
def hits() -> Hits:
    return Hits()


def compile_and_run() -> list[float]:
    """A program of its own each time, as far as JAX's memory goes; the same on the disk."""

    def triple(x: jax.Array) -> jax.Array:
        return x * 3.0 + 1.0

    x = np.arange(4, dtype=np.float32)
    return jax.jit(triple).lower(x).compile()(x).tolist()


def start(folder: Path) -> bool:
    """What an engine's start does about its compile cache."""
    usable = use_compile_cache(folder)
    assert compile_and_run() == [1.0, 4.0, 7.0, 10.0]
    seal(folder)
    return usable


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_broken_entry_is_compiled_again_and_replaced(
    tmp_path: Path, hits: Hits, damage: Callable[[bytes], bytes], is_sealed: bool, caplog: Any
) -> None:
    assert start(tmp_path)
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    assert names_in(tmp_path) == [entry.name, f"{entry.name}.sha256"]
    before = hits.count
    assert start(tmp_path)
    assert (hits.count, caplog.text) == (before + 1, "")
    entry.write_bytes(damage(good))
    if not is_sealed:
        entry.with_name(f"{entry.name}.sha256").unlink()
    assert start(tmp_path)
    assert hits.count == before + 1, "compiled, not read"
    assert f"compiled program {entry} is broken" in caplog.text
    assert len(entry.read_bytes()) > len(good) // 2
    assert start(tmp_path)
    assert hits.count == before + 2, "the next start finds it"


def test_a_full_disk_costs_the_entry_and_nothing_else(tmp_path: Path, hits: Hits) -> None:
    use_compile_cache(tmp_path)
    with files_of_at_most(100), pytest.warns(UserWarning, match="Error writing persistent compilation cache"):
        assert compile_and_run() == [1.0, 4.0, 7.0, 10.0]
    (half,) = entries(tmp_path)
    assert half.stat().st_size <= 100
    assert seal(tmp_path) == 0
    assert names_in(tmp_path) == [], "no half file"
    before = hits.count
    for _ in range(2):
        assert start(tmp_path)
    assert hits.count == before + 1
    entries(tmp_path)[0].with_name(f"{entries(tmp_path)[0].name}.sha256").unlink()
    with files_of_at_most(10):
        assert seal(tmp_path) == 1, "no room for the seal: the next start looks whether it decompresses"
    assert names_in(tmp_path) == [entries(tmp_path)[0].name]


@pytest.mark.parametrize("reason", ["a file is in the way", "what is broken stays"])
def test_a_folder_that_cannot_be_used_costs_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    folder = tmp_path / "xla"
    if reason == "a file is in the way":
        folder.write_text("")
    else:
        start(folder)
        entries(folder)[0].write_bytes(b"broken")

        def refuse(self: Path, missing_ok: bool = False) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
    before = names_in(tmp_path)
    assert not start(folder)
    assert names_in(tmp_path) == before
    assert jax.config.jax_compilation_cache_dir is None
    said = "File exists" if folder.is_file() else "cannot be removed (Permission denied): no compiled program"
    assert said in caplog.text


def test_an_engine_looks_through_its_cache_before_anything_is_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path / "xla")
    entries(tmp_path / "xla")[0].write_bytes(b"broken")
    start_platform(EngineConfig.from_flat({"cache_dir": tmp_path}))
    assert names_in(tmp_path / "xla") == []
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    assert "is broken (its SHA-256 has changed)" in caplog.text


def test_the_shape_of_what_jax_writes_is_what_is_checked(tmp_path: Path) -> None:
    """Names end in -cache, and nothing else is there: another JAX may do it otherwise."""
    use_compile_cache(tmp_path)
    jax.jit(lambda x: jnp.sin(x) * 2.0).lower(np.ones(3, np.float32)).compile()
    assert all(name.endswith("-cache") for name in names_in(tmp_path))
    assert names_in(tmp_path)
