"""TLS, client certificates and bearer tokens, against certificates made on the spot."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.errors import ConfigError
from jaxserve.request import SamplingParams
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.config import ConnectionConfig, ServerConfig
from jaxserve.server.errors import AuthenticationError
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from tests.cli.test_with_server import run
from tests.support.fake_engine import FakeEngine, letters

TOKEN = "a-token-of-more-than-16"
type Options = dict[str, Any]
PROMPT, PARAMS, ANSWER = [15], SamplingParams(max_tokens=3), "pqr"


class Pair(NamedTuple):
    """A certificate that is its own authority, and its key."""

    cert: Path
    key: Path


def make_pair(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    where = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *curve, *where, "-keyout", str(pair.key), "-out", str(pair.cert)]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client", "stranger"):
        make_pair(folder, name)
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "wrong").write_text(TOKEN[:-1] + "x")
    return folder


def pair(folder: Path, name: str) -> Options:
    return {"tls_cert": folder / f"{name}.pem", "tls_key": folder / f"{name}.key"}


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncGenerator[str]:
    server = Server(ServerConfig(port=0, drain_timeout=0.0, **options))
    target = await server.start()
    await server.attach(FakeEngine())
    try:
        yield target
    finally:
        await server.stop()


async def answer(target: str, **connection: Any) -> str:
    async with AsyncClient(target, **connection) as client:
        return (await client.generate(PROMPT, PARAMS, timeout_s=20)).outputs[0].text


async def test_tls(folder: Path) -> None:
    trusting = {"tls_ca": folder / "server.pem"}
    async with serving(**pair(folder, "server")) as target:
        assert await answer(target, **trusting) == ANSWER
        for connection in ({}, {"tls": True}, {"tls_ca": folder / "stranger.pem"}):
            with pytest.raises(ConnectionError, match=f"no jaxserve server answers at {target}"):
                await answer(target, **connection)
        assert await answer(target, **trusting) == ANSWER


async def test_client_certificates(folder: Path) -> None:
    trusting = {"tls_ca": folder / "server.pem"}
    async with serving(**pair(folder, "server"), tls_client_ca=folder / "client.pem") as target:
        assert await answer(target, **trusting, **pair(folder, "client")) == ANSWER
        for strangers in ({}, pair(folder, "stranger")):
            with pytest.raises(ConnectionError):
                await answer(target, **trusting, **strangers)


async def test_every_call_but_health_needs_the_token(folder: Path) -> None:
    async with serving(auth_token_file=folder / "token") as target:
        async with AsyncClient(target, auth_token_file=folder / "token") as client:
            assert (await client.generate(PROMPT, PARAMS)).outputs[0].text == ANSWER
            assert [o.outputs[0].text async for o in client.stream(PROMPT, PARAMS)][-1] == ANSWER
            assert await client.detokenize(await client.tokenize("hi")) == "hi"
            assert await client.list_models() == ["fake"]
        wrong: list[Options] = [{}, {"auth_token_file": folder / "wrong"}]
        for connection in wrong:
            async with AsyncClient(target, **connection) as client:
                for call in (
                    client.generate(PROMPT, PARAMS),
                    anext(client.stream(PROMPT, PARAMS)),
                    client.tokenize("hi"),
                    client.list_models(),
                ):
                    with pytest.raises(AuthenticationError, match="needs its token"):
                        await call
        async with grpc.aio.insecure_channel(target) as channel:
            health = cast(Any, health_pb2_grpc).HealthStub(channel)
            state = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert state == health_pb2.HealthCheckResponse.SERVING
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            reflection = cast(Any, reflection_pb2_grpc).ServerReflectionStub(channel)
            # The server may refuse while the client still writes, which grpc.aio calls INTERNAL at times.
            with pytest.raises(grpc.aio.AioRpcError, match=r"UNAUTHENTICATED|INTERNAL"):
                await reflection.ServerReflectionInfo(iter([asked])).read()


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", TOKEN)],
        [("authorization", f"bearer {TOKEN}")],
        [("authorization", f"Bearer {TOKEN} ")],
        [("authorization", f"Bearer {TOKEN}x")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")],
        [("x-authorization", f"Bearer {TOKEN}")],
        [("authorization", "x" * 10_000)],
    ],
)
async def test_nothing_but_the_token_will_do(folder: Path, metadata: list[tuple[str, str]]) -> None:
    async with (
        serving(auth_token_file=folder / "token") as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        stub, request = InferenceStub(channel), pb.GenerateRequest(text="x")
        good = [("authorization", f"Bearer {TOKEN}")]
        assert (await stub.Generate(request, metadata=good)).outputs
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert TOKEN not in repr(caught.value)


async def test_all_of_it_at_once_from_the_command_line(folder: Path) -> None:
    options = {**pair(folder, "server"), "tls_client_ca": folder / "client.pem"}
    async with serving(**options, auth_token_file=folder / "token") as target:
        flags = ["--server", target, "--tls-ca", f"{folder}/server.pem", "--tls-cert", f"{folder}/client.pem"]
        flags += ["--tls-key", f"{folder}/client.key"]
        done = await asyncio.to_thread(run, "health", *flags)
        assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr
        done = await asyncio.to_thread(run, "generate", "abc", *flags, "--max-tokens", "3")
        assert done.returncode == 2
        assert done.stderr.startswith("jaxserve generate: this server needs its token")
        flags += ["--auth-token-file", f"{folder}/token"]
        done = await asyncio.to_thread(run, "generate", "abc", *flags, "--max-tokens", "3")
        assert (done.returncode, done.stdout) == (0, letters([0, 97, 98, 99], 3) + "\n"), done.stderr


def test_what_other_hosts_can_reach_needs_authentication() -> None:
    tls: Options = {"tls_cert": Path("c"), "tls_key": Path("k")}
    anonymous: list[Options] = [{}, tls]
    for options in anonymous:
        with pytest.raises(ConfigError, match=r"host='0\.0\.0\.0': .*--auth-token-file or .*--insecure-bind"):
            ServerConfig(host="0.0.0.0", **options)
    known: list[Options] = [
        {"auth_token_file": Path("t")},
        tls | {"tls_client_ca": Path("ca")},
        {"insecure_bind": True},
    ]
    for options in known:
        assert not ServerConfig(host="0.0.0.0", **options).serves_reflection


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls_cert": "server.pem"}, r"tls_cert='.*server\.pem': needs its tls_key"),
        ({"tls_key": "server.key"}, r"tls_key='.*server\.key': needs its tls_cert"),
        ({"tls_cert": "server.pem", "tls_key": "client.key"}, "must be a certificate and its private key"),
        ({"tls_cert": "server.key", "tls_key": "server.key"}, "must be a certificate and its private key"),
        ({"tls_cert": "nothing", "tls_key": "server.key"}, r"must be a certificate .*No such file"),
        ({"auth_token_file": "nothing"}, r"auth_token_file='.*nothing': cannot be read: No such file"),
        ({"auth_token_file": "empty"}, "must hold one token of at least 16 visible ASCII"),
        ({"auth_token_file": "short"}, "must hold one token of at least 16 visible ASCII"),
        ({"auth_token_file": "two lines"}, "must hold one token of at least 16 visible ASCII"),
        ({"auth_token_file": "binary"}, "must hold one token of at least 16 visible ASCII"),
    ],
)
def test_files_that_cannot_work_are_refused_at_both_ends(
    folder: Path, options: dict[str, str], message: str
) -> None:
    for name, content in (("empty", b""), ("short", b"x" * 15), ("two lines", b"x" * 16 + b"\n" + b"y" * 16)):
        (folder / name).write_bytes(content)
    (folder / "binary").write_bytes(bytes(range(128, 160)))
    paths: Options = {name: folder / file for name, file in options.items()}
    with pytest.raises(ConfigError, match=message):
        Server(ServerConfig(port=0, **paths))
    with pytest.raises(ConfigError, match=message):
        Client("127.0.0.1:9", **paths)


def test_authorities_must_be_certificates(folder: Path) -> None:
    with pytest.raises(ConfigError, match="tls_client_ca='ca': needs tls_cert and tls_key"):
        ServerConfig(tls_client_ca=Path("ca"))
    with pytest.raises(ConfigError, match=r"tls_client_ca=.*: must be a PEM file of certificates"):
        Server(ServerConfig(port=0, **pair(folder, "server"), tls_client_ca=folder / "token"))
    with pytest.raises(ConfigError, match=r"tls_ca=.*: must be a PEM file of certificates .*No such file"):
        Client("127.0.0.1:9", tls_ca=str(folder / "nothing"))
    with pytest.raises(TypeError, match="tls_certificate"):
        Client("127.0.0.1:9", tls_certificate="x")
    assert ConnectionConfig(tls_ca=cast(Any, "ca.pem")).uses_tls
    assert not ConnectionConfig(auth_token_file=Path("t")).uses_tls
