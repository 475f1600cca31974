"""One table of bad parameters, one message: from Python, from the command line, and over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from jaxserve import LLM, AsyncLLM, EngineConfig, SamplingParams
from jaxserve.cli import main
from jaxserve.engine.build import Engine
from jaxserve.errors import ConfigError, ValidationError
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.config import ServerConfig
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from tests.support.bad_parameters import AGAINST_THE_MODEL, ENGINE, OTHER, PROMPTS, SAMPLING, Bad, rows
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine

INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Served:
    """One engine behind all three."""

    def __init__(self, engine: Engine, target: str, stub: InferenceStub) -> None:
        self.engine, self.target, self.stub = engine, target, stub
        self.llm = LLM.from_engine(engine)

    async def over_grpc(self, request: pb.GenerateRequest) -> str:
        """What the call is refused with; both calls say the same."""
        said: set[str] = set()
        for call in (self.stub.Generate(request), self.stub.GenerateStream(request).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() in (INVALID, grpc.StatusCode.FAILED_PRECONDITION)
            said.add(caught.value.details() or "")
        (message,) = said
        return message

    async def on_the_command_line(self, capsys: Any, *argv: str) -> str:
        """What `generate` says, here and with the server."""
        code = await asyncio.to_thread(main.main, ["generate", *argv, f"--server={self.target}"])
        return one_line(code, capsys, "generate")


def one_line(code: int, capsys: Any, command: str) -> str:
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"jaxserve {command}: ")
    return err.removeprefix(f"jaxserve {command}: ").removesuffix("\n")


@pytest.fixture
async def served() -> AsyncGenerator[Served]:
    engine, _ = make_engine()
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    target = await server.start()
    await server.attach(AsyncLLM.from_engine(engine))
    async with grpc.aio.insecure_channel(target) as channel, AsyncClient(target) as client:
        yield Served(engine, target, InferenceStub(channel))
        output = await client.generate([1, 2], SamplingParams(max_tokens=3, seed=0))
        assert output.outputs[0].token_ids == expected_tokens([1, 2], 0, 3, 256), "it must go on serving"
    assert engine.stats()["num_finished"] == 1, "what was refused never reached the scheduler"
    await server.stop()


@pytest.mark.parametrize("bad", rows(SAMPLING))
async def test_sampling_parameters(served: Served, bad: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**bad.options)
    assert (str(caught.value), caught.value.field) == (bad.message, bad.field)
    assert await served.over_grpc(bad.request(text="x")) == bad.message
    if bad.has_flags:
        for command in ("generate", "chat"):  # before anything is loaded
            assert one_line(main.main([command, "x", *bad.flags()]), capsys, command) == bad.message
        assert await served.on_the_command_line(capsys, "x", *bad.flags()) == bad.message


@pytest.mark.parametrize("bad", rows(AGAINST_THE_MODEL))
async def test_what_the_model_does_not_allow(
    served: Served, bad: Bad, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        served.llm.generate("x", SamplingParams(**bad.options), use_tqdm=False)
    assert str(caught.value) == bad.message
    assert await served.over_grpc(bad.request(text="x")) == bad.message
    if bad.has_flags:
        assert await served.on_the_command_line(capsys, "x", *bad.flags()) == bad.message


@pytest.mark.parametrize(("prompt", "message"), PROMPTS, ids=["empty", "a token too long", "too long"])
async def test_prompts(served: Served, prompt: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        served.llm.generate(prompt, use_tqdm=False)
    assert str(caught.value) == message
    assert await served.over_grpc(pb.GenerateRequest(text=prompt)) == message
    assert await served.on_the_command_line(capsys, prompt) == message


@pytest.mark.parametrize("bad", rows(OTHER))
async def test_options_of_a_request(served: Served, bad: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        served.llm.generate("x", use_tqdm=False, **bad.options)
    assert str(caught.value) == bad.message
    request = pb.GenerateRequest(text="x", client=bad.options.get("client", ""))
    request.cache.salt = bad.options.get("cache_salt", "")
    assert await served.over_grpc(request) == bad.message
    assert await served.on_the_command_line(capsys, "x", *bad.flags()) == bad.message


@pytest.mark.parametrize("bad", rows(ENGINE))
def test_engine_options(bad: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python, and from the commands that start an engine, a gRPC server among them."""
    for make in (EngineConfig.from_flat, lambda options: LLM(**options), lambda options: AsyncLLM(**options)):
        with pytest.raises(ConfigError) as caught:
            make(bad.options)
        assert str(caught.value) == bad.message
    for argv in (["serve"], ["generate", "x"], ["chat", "x"]):
        assert one_line(main.main([*argv, *bad.flags()]), capsys, argv[0]) == bad.message
