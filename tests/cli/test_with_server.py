"""The commands against a server in another process, with the fake engine."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_engine import chat_token_ids, letters

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import jaxserve.engine
from tests.support.fake_engine import FakeEngine
import types
module = types.ModuleType("jaxserve.engine.async_llm")
module.AsyncLLM = lambda **options: FakeEngine(step_s=0.01)
sys.modules["jaxserve.engine.async_llm"] = module
from jaxserve.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def start(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "serve", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    process = start("--port", "0")
    assert process.stdout is not None
    first, second = process.stdout.readline(), process.stdout.readline()
    assert first.startswith("jaxserve: listening on 127.0.0.1:")
    assert second.startswith("jaxserve: serving fake on 127.0.0.1:")
    yield second.split()[-1]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "shutting down" in out


def run(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve.cli.main", *argv]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def test_generate(target: str) -> None:
    done = run("generate", "abc", "--server", target, "--max-tokens", "5")
    assert (done.returncode, done.stdout) == (0, letters([0, 97, 98, 99], 5) + "\n"), done.stderr


def test_chat_conversation(target: str) -> None:
    done = run("chat", "--server", target, "--max-tokens", "3", stdin="hi\nyou\n")
    first = letters(chat_token_ids([{"role": "user", "content": "hi"}]), 3)
    messages = [("user", "hi"), ("assistant", first), ("user", "you")]
    second = letters(chat_token_ids([{"role": role, "content": content} for role, content in messages]), 3)
    assert (done.returncode, done.stdout.split()) == (0, [first, second]), done.stderr


def test_errors_of_the_server_are_one_line(target: str) -> None:
    done = run("generate", "x", "--server", target, "--model", "other")
    assert (done.returncode, done.stderr) == (2, "jaxserve generate: model='other': this server has 'fake'\n")
    done = run("generate", "x", "--server", target, "--stop-token-ids", "999")
    assert (done.returncode, done.stderr) == (
        2,
        "jaxserve generate: stop_token_ids=999: must be an integer in [0, 255]\n",
    )


def test_health(target: str) -> None:
    done = run("health", "--server", target, "--service", "jaxserve.v1.Inference")
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    done = run("health", "--server", target, "--service", "nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    done = run("health", "--server", "127.0.0.1:9")
    assert done.returncode == 1
    assert "no jaxserve server answers at 127.0.0.1:9" in done.stderr


def test_port_in_use_is_one_line(target: str) -> None:
    process = start("--port", target.rsplit(":", 1)[1])
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert err == f"jaxserve serve: cannot listen on {target}: Address already in use\n"


def test_ctrl_c_ends_an_answer_cleanly(target: str) -> None:
    command = [
        sys.executable,
        "-m",
        "jaxserve.cli.main",
        "generate",
        "x",
        "--server",
        target,
        "--max-tokens",
        "4000",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert len(process.stdout.read(5)) == 5
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (130, "")
