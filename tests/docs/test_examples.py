"""The README's and the examples' code runs, here against engines whose tokens are known without a model."""

from __future__ import annotations

import asyncio
import re
import runpy
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import jaxserve
from jaxserve.server.app import Server
from jaxserve.server.config import ServerConfig
from tests.packaging.checkout import ROOT
from tests.support.fake_engine import FakeEngine
from tests.support.fake_llm import make_engine


@pytest.fixture
async def target() -> AsyncGenerator[str]:
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    address = await server.start()
    await server.attach(FakeEngine(answer="The Rhine."))
    yield address
    await server.stop()


def readme_block(heading: str) -> str:
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1]
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return blocks[0]


async def test_client_example(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "client.py"))
    await asyncio.to_thread(example["main"], target)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["models: fake", "The Rhine."]
    assert [line[:4] for line in lines[2:]] == ["[0] ", "[1] ", "[2] "]


async def test_readme_client(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = readme_block("gRPC").replace("127.0.0.1:50051", target)
    await asyncio.to_thread(exec, code, {})
    assert capsys.readouterr().out.splitlines()[-1] == "The Rhine."


def test_readme_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    def fake_llm(model: str, **options: Any) -> jaxserve.LLM:
        jaxserve.EngineConfig.from_flat({"model": model, **options})
        asked.update(options, model=model)
        return real.from_engine(make_engine(script=b"Paris. ")[0])

    real = jaxserve.LLM
    monkeypatch.setattr(jaxserve, "LLM", fake_llm, raising=False)
    exec(readme_block("Python"), {})
    lines = capsys.readouterr().out.splitlines()
    assert asked == {"model": "smollm2-135m-instruct", "dtype": "float32", "max_num_seqs": 8}
    assert lines[0].startswith("Paris. Paris. ") and lines[0].endswith(" length")
    assert lines[-1].startswith("Paris. Paris. ")
