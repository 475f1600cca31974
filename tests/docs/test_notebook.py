"""The notebook runs from top to bottom on a tiny model; the committed one holds a real model's outputs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.packaging.checkout import ROOT
from tests.support.tiny_checkpoint import write_tiny_checkpoint

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "row_buckets": (2,),
    "token_buckets": (32,),
    "max_model_len": 256,
    "num_pages": 40,
    "compile_cache": False,
}


def read_notebook() -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook: Any) -> dict[str, str]:
    """Cell id -> what it printed or displayed, as text."""
    return {cell.id: "".join(map(_text, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"}


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.data["text/plain"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    checkpoint = write_tiny_checkpoint(folder / "tiny")
    notebook = read_notebook()
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"MODEL = {str(checkpoint)!r}\nOPTIONS = {OPTIONS!r}"
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute()


def test_it_runs(executed: Any) -> None:
    shown = outputs(executed)
    assert "model=tiny" in shown["load"] and "slots=2" in shown["load"]
    assert shown["generate"].count(" (12 tokens, ") == 3
    assert shown["logprobs"].count("\n") == 4
    assert shown["close"] == "the engine is closed\n"


def test_streaming_works_in_the_notebooks_event_loop(executed: Any) -> None:
    (updates,) = re.findall(r"\((\d+) updates\)", outputs(executed)["stream"])
    assert 1 <= int(updates) <= 33


def test_seeds_repeat_and_nothing_compiled(executed: Any) -> None:
    shown = outputs(executed)
    assert "same seed, same text: True\nanother seed, another text: True\n" in shown["seeds"]
    stats = ast.literal_eval(shown["stats"])
    assert stats["num_finished"] == 11
    assert stats["compiles_after_warmup"] == 0


def test_displays_are_rich(executed: Any) -> None:
    data = {cell.id: cell.outputs[-1].data for cell in executed.cells if cell.id in ("load", "chat")}
    assert "<table>" in data["load"]["text/html"]
    assert data["chat"]["text/markdown"].startswith("**prompt** user:Name three")


def test_what_is_committed_is_a_real_models_answer() -> None:
    notebook = read_notebook()
    shown = outputs(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "Paris" in shown["generate"]
    assert "same seed, same text: True" in shown["seeds"]
    assert ast.literal_eval(shown["stats"])["compiles_after_warmup"] == 0


def test_it_names_nobodys_machine() -> None:
    assert not re.search(r"/(?:home|root|tmp|Users|work)/", Path(NOTEBOOK).read_text())
