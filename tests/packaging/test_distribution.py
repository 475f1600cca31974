"""What is built, installed and cloned is what the repository holds."""

import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT, Artifacts, Uv, run

RENAMES = {"models/": "jaxserve/models/", "pallas_kernels/": "jaxserve/pallas_kernels/"}
LINKS = {"jaxserve/models", "jaxserve/pallas_kernels"}
IMPORTS = "import jaxserve.models, jaxserve.pallas_kernels; print(jaxserve.models.__file__)"


def packaged(tracked: list[str]) -> set[str]:
    """Where the repository's files lie once installed."""
    kept = {name for name in tracked if name.startswith(("jaxserve/", *RENAMES)) and name not in LINKS}
    for source, target in RENAMES.items():
        kept = {target + name.removeprefix(source) if name.startswith(source) else name for name in kept}
    return kept


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def site_packages_of(venv: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))


@pytest.fixture
def venv(uv: Uv, tmp_path: Path) -> Path:
    """A fresh environment that falls back to this one's site-packages for everything but jaxserve."""
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    fallback = site_packages_of(tmp_path / "venv") / "zz_dependencies.pth"
    fallback.write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv"


def test_wheel_holds_the_tracked_files_and_nothing_else(artifacts: Artifacts, tracked: list[str]) -> None:
    with zipfile.ZipFile(artifacts.wheel) as wheel:
        names = wheel.namelist()
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert len(names) == len(set(names))
    assert set(names) - metadata == packaged(tracked)
    (dist_info,) = {name.split("/")[0] for name in metadata}
    assert dist_info.startswith("jaxserve_engine-")
    assert {name.split("/")[0] for name in names} == {"jaxserve", dist_info}
    assert "jaxserve/py.typed" in names


def test_sdist_holds_the_sources_and_no_links(artifacts: Artifacts, tracked: list[str]) -> None:
    with tarfile.open(artifacts.sdist) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    sources = {name for name in tracked if name.startswith(("jaxserve/", *RENAMES)) and name not in LINKS}
    assert names - sources == {"PKG-INFO", "README.md", "LICENSE", "pyproject.toml", ".gitignore"}
    assert sources <= names


def test_wheel_installs_and_imports(artifacts: Artifacts, uv: Uv, venv: Path, tmp_path: Path) -> None:
    python = python_of(venv)
    uv("pip", "install", "--quiet", "--no-deps", "--offline", "--python", python, artifacts.wheel)
    where = Path(run(python, "-c", IMPORTS, cwd=tmp_path).strip())
    assert where == site_packages_of(venv) / "jaxserve/models/__init__.py"
    assert "usage" in run(python.with_name("jaxserve"), "--help", cwd=tmp_path).lower()


def test_editable_install_imports_the_checkout(snapshot: Path, uv: Uv, venv: Path, tmp_path: Path) -> None:
    python = python_of(venv)
    uv("pip", "install", "--quiet", "--no-deps", "--python", python, "--editable", snapshot)
    where = Path(run(python, "-c", IMPORTS, cwd=tmp_path).strip())
    assert where == snapshot / "jaxserve/models/__init__.py"
    assert where.samefile(snapshot / "models/__init__.py")


def test_plain_clone_imports(snapshot: Path, venv: Path, tmp_path: Path) -> None:
    where = run(python_of(venv), "-c", IMPORTS, cwd=tmp_path, env={"PYTHONPATH": str(snapshot)})
    assert Path(where.strip()) == snapshot / "jaxserve/models/__init__.py"


@pytest.mark.parametrize("name", ["models", "pallas_kernels"])
def test_the_links_are_relative_and_their_targets_say_how_to_import_them(name: str) -> None:
    assert (ROOT / "jaxserve" / name).readlink() == Path("..") / name
    with pytest.raises(ImportError, match=f"import this package as jaxserve.{name}, not {name}"):
        __import__(name)
