"""`bench/tpu_first_hour.sh` without a TPU: a `uv` that only takes notes stands in for every command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import speed
from jaxserve.cli import main

ROOT = Path(__file__).parents[2]

# One line a command, its words divided by tabs; plays the parts of the devices and of a bundle.
UV = r"""#!/usr/bin/env bash
shift 2  # run --no-sync
(IFS=$'\t'; printf '%s\n' "${*//$'\n'/ }" >>"$NOTES")
[[ "$*" == "$FAILS"* ]] && exit 3
case "$*" in
    *hbm_bytes*) echo 8 ;;
    *.name*) echo v6e ;;
    "jaxserve compile"*) mkdir -p "$OUT/bundle/xla" && touch "$OUT/bundle/xla/jit_step-1" ;;
    "jaxserve generate"*--bundle*) [[ -z "$COMPILES" ]] || touch "$OUT/bundle/xla/jit_step-2" ;;
esac
exit 0
"""


class Rehearsal(NamedTuple):
    """What the script did: its exit status, its output, and the words of its commands."""

    status: int
    output: str
    commands: list[list[str]]


def rehearse(folder: Path, *, fails: str = "nothing", compiles: str = "") -> Rehearsal:
    """Runs the script; the command that begins with ``fails`` does, ``compiles`` makes a bundle useless."""
    uv, notes, out = folder / "bin" / "uv", folder / "notes", folder / "out"
    uv.parent.mkdir()
    uv.write_text(UV)
    uv.chmod(0o755)
    path = f"{uv.parent}{os.pathsep}{os.environ['PATH']}"
    told = {"PATH": path, "NOTES": str(notes), "OUT": str(out), "FAILS": fails, "COMPILES": compiles}
    ran = subprocess.run(
        [ROOT / "bench" / "tpu_first_hour.sh", out], env=told, capture_output=True, text=True, check=False
    )
    commands = [line.split("\t") for line in notes.read_text().splitlines()]
    return Rehearsal(ran.returncode, ran.stdout + ran.stderr, commands)


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        if command[0] == "jaxserve":
            main.main([command[1], "--help"])
        else:
            assert command[:2] == ["python", "bench/speed.py"]
            speed.run("speed", "", None, ["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_all_its_commands_and_options_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = rehearse(tmp_path)
    assert done.status == 0, done.output
    assert "Done:" in done.output
    ours = [each for each in done.commands if each[0] == "jaxserve" or "bench/speed.py" in each]
    assert [each[1] for each in ours] == [
        *("doctor", "generate", "generate", "bench/speed.py", "bench", "compile", "generate")
    ]
    for command in ours:
        text = help_of(command, capsys)
        for option in (word for word in command if word.startswith("--")):
            assert option in text.split() or f"{option}," in text, f"{command[:2]} has no {option}"
    (suite,) = (each for each in done.commands if "pytest" in each)
    assert all((ROOT / word).exists() for word in suite if word.startswith("tests/"))
    (measured,) = (each for each in ours if each[1] == "bench/speed.py")
    assert measured[measured.index("--tensor-parallel-size") + 1] == "8"


def test_it_stops_at_the_first_step_that_fails(tmp_path: Path) -> None:
    failed = rehearse(tmp_path, fails="python -m pytest")
    assert failed.status != 0
    assert failed.commands[-1][:3] == ["python", "-m", "pytest"]


def test_a_bundle_whose_steps_are_compiled_again_fails(tmp_path: Path) -> None:
    failed = rehearse(tmp_path, compiles="again")
    assert failed.status == 1
    assert "the engine compiled steps again: bundles do not carry over" in failed.output
