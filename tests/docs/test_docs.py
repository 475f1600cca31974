"""The documents say what the code does: their code runs, their tables and their links are right."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxserve.core.policies.registry
import jaxserve.models.registry
import jaxserve.platforms
from jaxserve.engine.stats import STAGES
from jaxserve.request import SamplingParams
from jaxserve.server.errors import ERROR_TABLE
from scripts.update_docs import SERVING, with_tables
from tests.packaging.checkout import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
BLOCK = re.compile(r"^```python test\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ((?:jaxserve|models|pallas_kernels)/[\w/]+)\.py\n")
OWN_FILE = re.compile(r"# (\w+\.py)\n")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
REGISTRIES = (
    *jaxserve.core.policies.registry.REGISTRIES,
    jaxserve.models.registry.MODELS,
    jaxserve.platforms.PLATFORMS,
)


def sections() -> list[tuple[str, list[str]]]:
    """(document and heading, its blocks) wherever there are blocks to run."""
    found: list[tuple[str, list[str]]] = []
    for document in DOCUMENTS:
        for section in re.split(r"^## ", document.read_text(), flags=re.MULTILINE):
            if blocks := BLOCK.findall(section):
                found.append((f"{document.stem}: {section.splitlines()[0]}", blocks))
    return found


def cells(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    rows: list[str] = []
    for line in text.split(f"## {heading}\n")[1].splitlines():
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            break
    return [[cell.strip().strip("`") for cell in row.split("|")[1:-1]] for row in rows[2:]]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a recipe registers is gone afterwards."""
    before: list[dict[str, object]] = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)  # type: ignore[arg-type]


def test_every_recipe_has_code() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "adding.md").read_text(), re.MULTILINE)
    assert [name.removeprefix("adding: ") for name, _ in sections() if name.startswith("adding")] == headings
    assert len(headings) == 5


@pytest.mark.parametrize(
    ("name", "blocks"), sections(), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.usefixtures("registries")
def test_blocks_run(name: str, blocks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # files of the reader's own
    shared: dict[str, object] = {}
    for block in blocks:
        if own := OWN_FILE.match(block):
            (tmp_path / own[1]).write_text(block)
            continue
        file = FILE.match(block)
        if file is None:
            exec(compile(block, name, "exec"), shared)
            continue
        dotted = f"jaxserve.{file[1].removeprefix('jaxserve/').replace('/', '.')}"
        module = types.ModuleType(dotted)
        exec(compile(block, dotted, "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, dotted, module)


def test_generated_tables_are_up_to_date() -> None:
    text = SERVING.read_text()
    assert with_tables(text) == text, "run: uv run scripts/update_docs.py"


def test_sampling_parameters_are_documented() -> None:
    documented = {row[0]: row[1] for row in cells(SERVING.read_text(), "Sampling parameters")}
    assert documented == {field.name: str(field.default) for field in dataclasses.fields(SamplingParams)}


def test_status_codes_are_documented() -> None:
    documented = {tuple(row[:3]) for row in cells(SERVING.read_text(), "Status codes")}
    assert documented == {(row.code.name, row.reason, row.error.__name__) for row in ERROR_TABLE}


def test_stats_are_documented() -> None:
    from tests.support.engine_parts import make_core

    names = [name for row in cells(SERVING.read_text(), "Metrics") for name in row[0].split("`, `")]
    core, _ = make_core()
    assert set(core.scheduler.stats()._fields) < set(names)
    assert {"stage_ms_per_step", "padding_share", "compiles_after_warmup", "finished"} < set(names)
    structure = (ROOT / "docs" / "structure.md").read_text()
    assert re.findall(r"^\| \*(\w+)\* \|", structure, re.MULTILINE) == list(STAGES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = LINK.findall(document.read_text())
    assert not [target for target in targets if not (document.parent / target).exists()]


def test_every_module_has_its_line_in_the_structure() -> None:
    """So that a file that is added, renamed or removed shows up in the document."""
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    for folder in ("core", "engine", "runner"):
        modules = {f"{folder}/{path.name}" for path in (ROOT / "jaxserve" / folder).glob("[a-z]*.py")}
        assert not modules - named, f"docs/structure.md lacks {sorted(modules - named)}"
    gone = {name for name in named if not any((ROOT / top / name).exists() for top in (".", "jaxserve"))}
    assert not gone, f"docs/structure.md names what is not there: {sorted(gone)}"
