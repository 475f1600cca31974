"""The checkout that the tests look at, and the programs they run on it."""

import dataclasses
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Uv:
    """The `uv` program; without it, tests that need environments of their own are skipped."""

    command: str

    def __call__(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        return run(self.command, *arguments, cwd=cwd)


@dataclasses.dataclass(frozen=True)
class Artifacts:
    """A source distribution and the wheel built from it."""

    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """The command's standard output; a failure shows both streams."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in {"PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"}
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kept_files() -> list[str]:
    """What git keeps, or would on `git add --all`, links included: a clean checkout's tracked files."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return sorted({name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)})
