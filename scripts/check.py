"""Everything that must hold before a change lands, in one command.

Runs the formatter's check, the linter, the type checker, the import rules and the tests, in this order,
and fails if any of them fails. Names of stages as arguments run only those; what follows `--` goes to pytest:

    uv run --group models scripts/check.py
    uv run scripts/check.py lint types
    uv run scripts/check.py tests -- tests/core -x
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stages(pytest_args: list[str]) -> dict[str, list[str]]:
    """Each stage's command. Tools come from the environment that runs this script."""
    python = sys.executable
    lint_imports = str(Path(python).with_name("lint-imports"))
    return {
        "format": [python, "-m", "ruff", "format", "--check", "--output-format=concise"],
        "lint": [python, "-m", "ruff", "check", "--output-format=concise"],
        "types": [python, "-m", "pyright", "--pythonpath", python],
        "imports": [lint_imports, "--no-logo"],
        "tests": [python, "-m", "pytest", "-n2", "--dist=worksteal", "--durations=15", *pytest_args],
    }


def run(name: str, command: list[str]) -> bool:
    """Run one stage from the repository's root, say how long it took, and whether it passed."""
    print(f"--- {name}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, check=False).returncode
    if name != "tests":  # pytest's summary, the last line of a good run, has its own time
        verdict = "ok" if code == 0 else f"FAILED ({code})"
        print(f"--- {name}: {verdict}, {time.perf_counter() - start:.1f} s\n", flush=True)
    return code == 0


def main(arguments: list[str]) -> int:
    """Run the named stages, or all of them; 0 if each passed."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, pytest_args = arguments[:split], arguments[split + 1 :]
    commands = stages(pytest_args)
    if unknown := [name for name in names if name not in commands]:
        print(f"no stage {', '.join(unknown)}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    chosen = [name for name in commands if not names or name in names]
    failed = [name for name in chosen if not run(name, commands[name])]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
