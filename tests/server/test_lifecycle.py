from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.errors import ConfigError, EngineClosedError, JaxserveError
from jaxserve.request import FinishReason, SamplingParams
from jaxserve.server.app import Server, serve
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.config import ServerConfig
from tests.support.fake_engine import FakeEngine, letters

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("", "jaxserve.v1.Inference")
SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"


# The packages' type stubs do not know that their gRPC stubs take aio channels.
health_stub = cast(Any, health_pb2_grpc).HealthStub
reflection_stub = cast(Any, reflection_pb2_grpc).ServerReflectionStub


async def health_of(target: str) -> list[str]:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_stub(channel)
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
    return [health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for answer in answers]


async def test_health_follows_the_engine() -> None:
    engine = FakeEngine()
    server = Server(ServerConfig(port=0))
    target = await server.start()
    assert await health_of(target) == [NOT_SERVING, NOT_SERVING]
    async with AsyncClient(target) as client:
        with pytest.raises(EngineClosedError, match="still being loaded"):
            await client.generate("x")
        await server.attach(engine)
        assert await health_of(target) == [SERVING, SERVING]
        assert (await client.generate([15], SamplingParams(max_tokens=1))).outputs[0].text == "p"
        engine.is_ready = False
        for _ in range(100):
            if await health_of(target) == [NOT_SERVING, NOT_SERVING]:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("health must follow the engine")
    await server.stop()
    assert engine.is_closed


async def test_health_of_an_unknown_service(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_stub(channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def listed_services(target: str) -> list[str]:
    async with grpc.aio.insecure_channel(target) as channel:
        call = reflection_stub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answer = await call.read()
    return sorted(service.name for service in answer.list_services_response.service)


async def test_reflection_lists_and_describes_the_service(target: str) -> None:
    assert await listed_services(target) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "jaxserve.v1.Inference",
    ]
    async with grpc.aio.insecure_channel(target) as channel:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="jaxserve.v1.Inference")
        call = reflection_stub(channel).ServerReflectionInfo(iter([request]))
        answer = await call.read()
    assert b"GenerateStream" in answer.file_descriptor_response.file_descriptor_proto[0]


async def test_reflection_can_be_switched_off() -> None:
    server = Server(ServerConfig(port=0, reflection=False))
    target = await server.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed_services(target)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop()


async def test_calls_beyond_the_last_bound_are_refused_at_once() -> None:
    engine = FakeEngine(step_s=0.02)
    server = Server(ServerConfig(port=0, drain_timeout=0, max_concurrent_rpcs=2))
    target = await server.start()
    await server.attach(engine)
    async with AsyncClient(target) as client:
        streams = [client.stream([15], SamplingParams(max_tokens=4000)) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(JaxserveError, match="RESOURCE_EXHAUSTED"):
            await client.generate("x")
        assert (await anext(streams[0])).outputs[0].text.startswith("p")
        for stream in streams:
            await stream.aclose()
    await server.stop()


async def test_calls_that_arrive_at_once_all_wait_their_turn(target: str) -> None:
    """gRPC's own default is to end some of them with CANCELLED from 1,000 on."""
    async with AsyncClient(target) as client:
        counts = await asyncio.gather(*(client.tokenize("abc") for _ in range(2500)))
    assert {len(count) for count in counts} == {4}


async def test_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    engine = FakeEngine(step_s=0.02)
    server = Server(ServerConfig(port=0, drain_timeout=20))
    target = await server.start()
    await server.attach(engine)
    async with AsyncClient(target) as client:
        running = asyncio.create_task(client.generate([15], SamplingParams(max_tokens=30)))
        while not engine.live:
            await asyncio.sleep(0.005)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.1)
        assert await health_of(target) == [NOT_SERVING, NOT_SERVING]
        with pytest.raises(EngineClosedError, match="shutting down"):
            await client.generate("x")
        assert (await running).outputs[0].text == letters([15], 30)
        await stopping
    assert (engine.aborted, engine.is_closed) == ([], True)


async def test_drain_aborts_what_does_not_finish_in_time() -> None:
    engine = FakeEngine(step_s=0.01)
    server = Server(ServerConfig(port=0, drain_timeout=0.1))
    target = await server.start()
    await server.attach(engine)
    async with AsyncClient(target) as client:
        stream = client.stream([15], SamplingParams(max_tokens=4000))
        last = await anext(stream)
        stopping = asyncio.create_task(server.stop())
        with pytest.raises(EngineClosedError, match="shutting down"):
            async for output in stream:
                last = output
        await stopping
    assert last.finished, "what was generated so far must arrive"
    assert last.outputs[0].finish_reason is FinishReason.ABORT
    assert last.outputs[0].text == letters([15], len(last.outputs[0].text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": -1}, "port=-1"),
        ({"port": 65_536}, "port=65536"),
        ({"host": ""}, "host=''"),
        ({"host": "0.0.0.0"}, "host='0.0.0.0': .*--insecure-bind"),
        ({"host": "::"}, "--insecure-bind"),
        ({"host": "some.name"}, "--insecure-bind"),
        ({"drain_timeout": float("nan")}, "drain_timeout=nan"),
        ({"drain_timeout": -1.0}, "drain_timeout=-1"),
        ({"max_concurrent_rpcs": 0}, "max_concurrent_rpcs=0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**options)


def test_only_loopback_is_open_by_default() -> None:
    assert ServerConfig().is_loopback
    assert ServerConfig(host="localhost").serves_reflection
    assert ServerConfig(host="::1").address(7) == "[::1]:7"
    reachable = ServerConfig(host="0.0.0.0", insecure_bind=True)
    assert not reachable.serves_reflection
    assert ServerConfig(host="0.0.0.0", insecure_bind=True, reflection=True).serves_reflection


async def test_port_in_use_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await Server(ServerConfig(port=port)).start()


async def test_two_servers_never_share_a_port() -> None:
    first = Server(ServerConfig(port=0))
    port = int((await first.start()).rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match="cannot listen"):
        await Server(ServerConfig(port=port)).start()
    await first.stop()


async def test_a_failing_load_ends_the_server_with_its_error() -> None:
    def fail() -> FakeEngine:
        raise ConfigError("page_size=3: must be a power of two up to 1024")

    said: list[str] = []
    with pytest.raises(ConfigError, match="page_size=3"):
        await serve(ServerConfig(port=0), fail, said.append)
    assert len(said) == 1
    assert "loading" in said[0]


async def test_a_signal_while_loading_ends_at_once() -> None:
    def slow() -> FakeEngine:
        time.sleep(1.0)
        return FakeEngine()

    loop = asyncio.get_running_loop()
    start = loop.time()
    loop.call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    assert await serve(ServerConfig(port=0), slow, lambda line: None) is False
    assert loop.time() - start < 0.9


SERVER_PROGRAM = """
import asyncio, sys
from jaxserve.server.app import serve
from jaxserve.server.config import ServerConfig
from tests.support.fake_engine import FakeEngine
config = ServerConfig(port=0, drain_timeout=float(sys.argv[1]))
asyncio.run(serve(config, lambda: FakeEngine(step_s=0.02), lambda line: print(line, flush=True)))
print("left", flush=True)
"""


def start_process(drain_timeout_s: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM, str(drain_timeout_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving fake on "):
            return process, line.split()[-1]
    raise AssertionError("the server ended early")


def test_sigterm_drains_and_exits_with_0() -> None:
    process, target = start_process(20)
    with process, Client(target) as client:
        stream = client.stream([15], SamplingParams(max_tokens=40))
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.outputs[0].text == letters([15], 40)
        out, _ = process.communicate(timeout=10)
    assert (process.returncode, out.splitlines()[-1]) == (0, "left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_running_requests(number: signal.Signals) -> None:
    process, target = start_process(60)
    with process, Client(target) as client:
        stream = client.stream([15], SamplingParams(max_tokens=4000))
        next(stream)
        process.send_signal(number)
        time.sleep(0.2)
        assert process.poll() is None
        next(stream)
        start = time.monotonic()
        process.send_signal(number)
        with pytest.raises((ConnectionError, EngineClosedError)):
            list(stream)
        out, _ = process.communicate(timeout=10)
        assert time.monotonic() - start < 5
    assert (process.returncode, out.splitlines()[-1]) == (0, "left")


def test_killed_server_is_a_connection_error() -> None:
    process, target = start_process(60)
    with process, Client(target) as client:
        stream = client.stream([15], SamplingParams(max_tokens=4000))
        next(stream)
        process.kill()
        with pytest.raises(ConnectionError, match=target):
            list(stream)
        with pytest.raises(ConnectionError, match=target):
            client.generate("x")
