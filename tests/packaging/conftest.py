"""A snapshot of the checkout as git would keep it, and the distributions built from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT, Artifacts, Uv, kept_files, run


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """Paths relative to the repository's root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    return kept_files()


@pytest.fixture(scope="session")
def uv() -> Uv:
    """`uv run` names itself in UV; elsewhere it is on PATH, unless that is a shim that does not run."""
    for command in (os.environ.get("UV"), shutil.which("uv")):
        if (
            command
            and subprocess.run([command, "--version"], capture_output=True, check=False).returncode == 0
        ):
            return Uv(command)
    pytest.skip("needs uv")


@pytest.fixture(scope="session")
def snapshot(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one commit that holds what is kept, as a fresh clone would check it out."""
    origin, clone = tmp_path_factory.mktemp("origin"), tmp_path_factory.mktemp("clone") / "jaxserve"
    for name in tracked:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, origin / name, follow_symlinks=False)
    run("git", "init", "--quiet", cwd=origin)
    run("git", "add", "--all", "--force", cwd=origin)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    run("git", *identity, "commit", "--quiet", "--no-verify", "--message", "snapshot", cwd=origin)
    run("git", "clone", "--quiet", origin.as_uri(), clone, cwd=origin)
    return clone


@pytest.fixture(scope="session")
def artifacts(uv: Uv, snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Built as a release is: the wheel from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--python", sys.executable, "--out-dir", out, cwd=snapshot)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Artifacts(sdist, wheel)
