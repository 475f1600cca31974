from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file that the engine loads in no time."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder laid out like the real traces, with rows made here."""
    folder = tmp_path / "traces"
    (folder / "prompts").mkdir(parents=True)
    rows = [(0.0, 300, 90), (0.5, 4, 700), (2.5, 800, 10), (4.0, 90, 3)]
    text = io.StringIO()
    csv.writer(text).writerows([("arrival_s", "prompt_tokens", "output_tokens"), *rows])
    (folder / "azure2023_conv.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    prompts = [{"id": str(i), "prompt": f"hello world number {i % 3}"} for i in range(5)]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "prompts" / "gpteacher.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder
