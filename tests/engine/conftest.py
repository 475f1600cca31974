"""What tests of engines have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine_parts import make_copies_free
from tests.support.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder; a module's own, as engines may leave files in it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def free_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to host memory and back cost nothing: a tiny model computes faster than anything copies."""
    make_copies_free(monkeypatch)
