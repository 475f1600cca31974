"""Rules about the sources that no linter states: sizes, imports, pickles, and what may not be committed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT

PACKAGES = ("jaxserve", "models", "pallas_kernels")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 250  # a kernel with its inner stages, each of which keeps to MAX_FUNCTION_LINES
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
GENERATED = ("_pb2.py", "_pb2_grpc.py")

type Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Python files that people wrote; links are not followed, so each is listed once."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not path.name.endswith(GENERATED)]


def where(path: Path, node: ast.stmt) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def nodes(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def own_lines(function: Function) -> int:
    """Lines of a function less those of the functions defined in it."""
    inner: list[Function] = []
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner.append(node)
        else:
            pending.extend(ast.iter_child_nodes(node))
    return lines(function) - sum(lines(each) for each in inner)


def test_sources_are_found() -> None:
    assert all(sources(package) for package in PACKAGES)


def test_files_keep_to_their_budget() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources(*PACKAGES, "tests")
    }
    assert not {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_keep_to_their_budget(package: str) -> None:
    whole = MAX_KERNEL_LINES if package == "pallas_kernels" else MAX_FUNCTION_LINES
    too_long = {
        f"{where(path, node)} {node.name}": (own_lines(node), lines(node))
        for path, node in nodes(package)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (own_lines(node) > MAX_FUNCTION_LINES or lines(node) > whole)
    }
    assert not too_long


def test_imports_are_absolute() -> None:
    found = nodes(*PACKAGES, "bench", "scripts", "tests")
    assert not [where(path, node) for path, node in found if isinstance(node, ast.ImportFrom) and node.level]


def test_nothing_is_pickled() -> None:
    bad: list[str] = []
    for path, node in nodes(*PACKAGES, "bench", "scripts"):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {(node.module or "").split(".")[0]}
        else:
            continue
        bad += [f"{where(path, node)} {module}" for module in modules & PICKLES]
    assert not bad
    assert not [str(path) for path in sources(*PACKAGES, "bench") if "allow_pickle=True" in path.read_text()]


def test_lock_files_and_build_products_are_not_kept(tracked: list[str]) -> None:
    product = re.compile(
        r"(^|/)(uv\.lock|pylock.*\.toml|poetry\.lock|package-lock\.json|__pycache__)(/|$)|\.(pyc|whl)$"
    )
    assert not [name for name in tracked if product.search(name)]


def test_no_path_of_somebodys_machine_is_kept(tracked: list[str]) -> None:
    path = re.compile(r"(?<![\w.\-/<>}])/(?:root|work|home/\w+|Users/\w+)/|[A-Z]:\\Users\\")
    found: list[str] = []
    for name in tracked:
        file = ROOT / name
        if file.is_symlink() or not file.is_file():
            continue
        content = file.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if path.search(line) and file != Path(__file__).resolve():
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found
