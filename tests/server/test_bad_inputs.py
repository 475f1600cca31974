"""What `ecosystem` lists as hostile: each gets its status and its field, and the server goes on serving."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.errors import CapacityError, EngineClosedError, ModelNotFoundError, ValidationError
from jaxserve.request import SamplingParams
from jaxserve.server.app import MAX_MESSAGE_BYTES
from jaxserve.server.client import AsyncClient
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from jaxserve.server.requests import FIELD_PATHS
from tests.support.bad_parameters import SAMPLING, ids
from tests.support.fake_engine import VOCAB_SIZE, FakeEngine

INVALID = grpc.StatusCode.INVALID_ARGUMENT
INT64_MIN = -(2**63)
type Change = Callable[[pb.GenerateRequest], Any]


def setting(path: str, value: Any) -> Change:
    """A change that sets (or extends, or updates) one field, given by its path."""
    *groups, name = path.split(".")

    def change(request: Any) -> None:
        for group in groups:
            request = getattr(request, group)
        if isinstance(value, dict):
            getattr(request, name).update(value)
        elif isinstance(value, list):
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)

    return change


# Besides `tests.support.bad_parameters`, which Python and the command line refuse in the same words.
BAD_FIELDS: list[tuple[str, Any]] = [
    ("priority", 2**31),
    ("priority", INT64_MIN),
    ("stopping.min_tokens", 17),  # of 16 by default
    ("decoding.logit_bias", {VOCAB_SIZE: 1.0}),
    ("stopping.stop_token_ids", [VOCAB_SIZE]),
    ("stopping.stop_token_ids", [1] * 100_000),
    ("stopping.stop", ["x"] * 10_000),
    ("stopping.stop", ["x" * 2**20]),
]
BAD_PROMPTS: list[tuple[str, Change, str]] = [
    ("no prompt", lambda request: request.ClearField("text"), "prompt"),
    ("empty text", setting("text", ""), "text"),
    ("no ids", lambda request: request.token_ids.SetInParent(), "token_ids.ids"),
    ("id -1", setting("token_ids.ids", [1, -1]), "token_ids.ids"),
    ("id V", setting("token_ids.ids", [1, VOCAB_SIZE]), "token_ids.ids"),
    ("id 2**32", setting("token_ids.ids", [1, 2**32]), "token_ids.ids"),
    ("context + 1 ids", setting("token_ids.ids", [1] * 4096), "token_ids.ids"),
    ("a million ids", setting("token_ids.ids", [1] * 10**6), "token_ids.ids"),
    ("no messages", lambda request: request.chat.SetInParent(), "chat.messages"),
    ("unknown role", lambda request: request.chat.messages.add(role="wizard", content="x"), "chat.messages"),
    ("request id with spaces", setting("request_id", "a b"), "request_id"),
    ("request id of 129", setting("request_id", "a" * 129), "request_id"),
    ("request id as a path", setting("request_id", "../../etc/passwd"), "request_id"),
    ("client with spaces", setting("client", "a b"), "client"),
    ("client of 129", setting("client", "a" * 129), "client"),
    (
        "both limits",
        lambda request: request.stopping.MergeFrom(pb.Stopping(max_tokens=3, unlimited=True)),
        "stopping.max_tokens",
    ),
]
CASES = [
    *(pytest.param(bad.request(), FIELD_PATHS[bad.field], id=ids(bad)) for bad in SAMPLING),
    *(pytest.param(setting(path, value), path, id=f"{path}={str(value)[:20]}") for path, value in BAD_FIELDS),
    *(pytest.param(change, field, id=name) for name, change, field in BAD_PROMPTS),
]


def details_of(
    error: grpc.aio.AioRpcError,
) -> tuple[list[str], error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    bad, info, retry = (
        error_details_pb2.BadRequest(),
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (bad, info, retry):
            detail.Unpack(message)
    return [violation.field for violation in bad.field_violations], info, retry


@pytest.fixture
async def stub(target: str):
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_send_message_length", -1)]) as channel:
        stub = InferenceStub(channel)
        yield stub
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[15]), stopping=pb.Stopping(max_tokens=2))
        assert (await stub.Generate(request)).outputs[0].text == "pq", "the server must go on serving"


@pytest.mark.parametrize(("change", "field"), CASES)
async def test_bad_field_is_refused_by_name(stub, engine: FakeEngine, change: Any, field: str) -> None:
    request = pb.GenerateRequest(text="x")
    if isinstance(change, pb.GenerateRequest):
        request.MergeFrom(change)
    else:
        change(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request)
    assert caught.value.code() is INVALID, caught.value
    fields, info, _ = details_of(caught.value)
    assert fields == [field]
    assert info.domain == "jaxserve"
    assert info.reason in {"INVALID_FIELD", "CAPACITY"}
    assert len(caught.value.details() or "") < 400
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.GenerateStream(request):
            pytest.fail("a refused request must not answer")
    assert (caught.value.code(), details_of(caught.value)[0]) == (INVALID, [field])
    assert engine.params is None, "it must not have reached the engine's queue"


async def test_the_client_raises_the_engines_own_error(client: AsyncClient) -> None:
    with pytest.raises(
        ValidationError, match=r"^prompt_token_ids=999: must be an integer in \[0, 255\]$"
    ) as caught:
        await client.generate([1, 999])
    assert (caught.value.field, type(caught.value)) == ("prompt_token_ids", ValidationError)
    with pytest.raises(
        CapacityError, match=r"^prompt_token_ids='<5000 tokens>': must have at most 4095 tokens here$"
    ):
        await client.generate([1] * 5000)
    with pytest.raises(ValidationError, match=r"^logit_bias=256"):
        await client.generate([1], SamplingParams(logit_bias={256: 1.0}))
    for prompt in ("\ud800", [2**70], [1.5], ["a"], {"prompt": "x", "prompt_token_ids": [1]}, {}):
        with pytest.raises(ValidationError, match=r"^prompt="):
            await client.generate(cast(Any, prompt))
    for message in (
        {"role": "user"} | {"content": None, "name": "x"},
        {"role": 3},
        {"template": "{% for %}"},
    ):
        with pytest.raises(ValidationError, match=r"^messages="):
            await client.chat([message])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"priority": 2**63},
            r"priority=9223372036854775808: must be an integer in \[-2147483648, 2147483647\]",
        ),
        ({"priority": -(2**31) - 1}, r"priority=-2147483649: must be an integer in \["),
        ({"priority": 1.5}, r"priority=1\.5: must be an integer in \["),
        ({"priority": None}, r"priority=None: must be an integer in \["),
        ({"cache_salt": "x" * 257}, r"cache_salt='x+\W*: must be a text of at most 256 characters"),
        ({"client": "no spaces"}, r"client='no spaces': must be empty or 1 to 128 characters"),
        ({"client": None}, r"client=None: must be empty"),
        ({"cache_salt": 7}, r"cache_salt=7: must be a text"),
        ({"cache_salt": "\ud800"}, r"cache_salt=.*must be valid Unicode"),
        ({"request_id": "\udcff"}, r"request_id='\\udcff': must be 1 to 128 characters of"),
        ({"request_id": 7}, "request_id=7: must be 1 to 128 characters of"),
        ({"timeout_s": -1.0}, r"timeout_s=-1\.0: must be a finite number in \["),
        ({"timeout_s": "soon"}, r"timeout_s='soon': must be a finite number in \["),
        ({"timeout_s": math.nan}, r"timeout_s=nan: must be a finite number in \["),
    ],
)
async def test_what_the_wire_cannot_hold_is_named_by_the_client(
    client: AsyncClient, engine: FakeEngine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=f"^{message}"):
        await client.generate("x", **options)
    with pytest.raises(ValidationError, match=f"^{message}"):
        await anext(client.stream_chat([{"role": "user", "content": "x"}], **options))
    assert engine.params is None


async def test_text_and_ids_that_the_wire_cannot_hold(client: AsyncClient, target: str) -> None:
    refused = r"must be valid Unicode without lone surrogates"
    with pytest.raises(ValidationError, match=rf"^stop='a\\udcff': {refused}"):
        SamplingParams(stop=["fine", "a\udcff"])
    with pytest.raises(ValidationError, match=rf"^prompt='\\ud800': {refused}"):
        await client.tokenize("\ud800")
    with pytest.raises(ValidationError, match=r"^messages=.*surrogates"):
        await client.tokenize([{"role": "user", "content": "\ud800"}])
    for token_ids in ([2**70], [1, -1], [1.5], ["a"]):
        with pytest.raises(ValidationError, match=r"^token_ids=.*: must be an integer in \[0, "):
            await client.detokenize(cast(Any, token_ids))
    for messages in (None, "hi", {"role": "user", "content": "x"}, 5):
        with pytest.raises(ValidationError, match=r"^messages=.*: must be a list"):
            await client.chat(cast(Any, messages))
    for prompt in (None, b"x", {1, 2}, {"prompt": [1]}, {"prompt_token_ids": {5: 1}}):
        with pytest.raises(ValidationError, match=r"^prompt=.*: must be a string, a list of token ids, "):
            await client.generate(cast(Any, prompt))
    for params in ({"temperature": 1.0}, 5, "x"):
        with pytest.raises(ValidationError, match=r"^sampling_params=.*: must be SamplingParams$"):
            await client.generate("x", cast(Any, params))
    async with AsyncClient(target, model="\ud800") as other:
        for call in (other.generate("x"), other.tokenize("x"), other.detokenize([1])):
            with pytest.raises(ValidationError, match=rf"^model='\\ud800': {refused}"):
                await call


async def test_capacity_other_than_the_prompts_is_a_precondition(
    stub, client: AsyncClient, engine: FakeEngine
) -> None:
    engine.failure = CapacityError("max_tokens", 10, "the KV cache holds 8 tokens in all")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(text="x"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(CapacityError, match=r"^max_tokens=10: the KV cache"):
        await client.generate("x")
    engine.failure = None


@pytest.mark.parametrize("model", ["other", "../fake", "fake ", "x" * 10_000])
async def test_unknown_model(stub, client: AsyncClient, target: str, model: str) -> None:
    calls = (
        stub.Generate(pb.GenerateRequest(text="x", model=model)),
        stub.Tokenize(pb.TokenizeRequest(text="x", model=model)),
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[1], model=model)),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    async with AsyncClient(target, model=model) as other:
        with pytest.raises(ModelNotFoundError, match="this server has 'fake'"):
            await other.generate("x")
    assert (await stub.Generate(pb.GenerateRequest(text="x", model="fake"))).outputs


@pytest.mark.parametrize(
    ("method", "request_message", "field"),
    [
        ("Tokenize", pb.TokenizeRequest(), "prompt"),
        ("Tokenize", pb.TokenizeRequest(text=""), "prompt"),
        ("Tokenize", pb.TokenizeRequest(chat=pb.Chat()), "messages"),
        ("Tokenize", pb.TokenizeRequest(text="a" * (2**20 + 1)), "prompt"),
        ("Tokenize", pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 4097)), "messages"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1] * (2**18 + 1)), "token_ids"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[5, -1]), "token_ids"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[VOCAB_SIZE]), "token_ids"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[2**40]), "token_ids"),
    ],
)
async def test_bad_tokenizer_calls(stub, method: str, request_message: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_message)
    assert (caught.value.code(), details_of(caught.value)[0]) == (INVALID, [field])


GOOD = pb.GenerateRequest(text="hello", sampling=pb.Sampling(n=1)).SerializeToString()
RAW = {
    "garbage": b"\xff\xfe\x00garbage",
    "truncated": GOOD[:-1],
    "trailing bytes": GOOD + b"\x03",
    "invalid UTF-8": b"\x1a\x04ab\xff\xfe",
    "lone surrogate": b"\x1a\x03\xed\xa0\x80",
    "wrong type": b"\x1a\x02\x08\x01" + b"\x32\x02\x0a\xff",
    "nested 10,000 deep": b"\x2a\x7f" * 10_000,
    "unknown field": GOOD + b"\x9a\x06\x01x",
    "unknown nested field": b"\x1a\x01x\x32\x03\xf8\x07\x01",
    "reserved field": GOOD + b"\x6a\x00",
}


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
async def test_bytes_that_are_no_request(
    stub, engine: FakeEngine, target: str, data: bytes, method: str
) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        path = f"/jaxserve.v1.Inference/{method}"
        call = (
            channel.unary_unary(path)(data)
            if method == "Generate"
            else channel.unary_stream(path)(data).read()
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert (caught.value.code(), details_of(caught.value)[0]) == (INVALID, ["request"])
    assert engine.params is None


async def test_unknown_fields_are_named(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"sampling.<field 127>"):
            await channel.unary_unary("/jaxserve.v1.Inference/Generate")(RAW["unknown nested field"])


@pytest.mark.parametrize(
    "path", ["/jaxserve.v1.Inference/Nothing", "/jaxserve.v2.Inference/Generate", "//", "/x"]
)
async def test_wrong_method(stub, target: str, path: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(path)(GOOD)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_oversized_message_and_metadata(stub, engine: FakeEngine) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(text="x" * (MAX_MESSAGE_BYTES + 1)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(text="x"), metadata=[("x-large", "x" * 2**20)])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert engine.params is None


async def test_our_own_bug_shows_an_id_and_nothing_else(stub, engine: FakeEngine, caplog) -> None:
    engine.failure = RuntimeError("secret detail")
    request = pb.GenerateRequest(text="x")
    with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    found = re.fullmatch(
        r"internal error ([0-9a-f]{32}); the server's log has it", caught.value.details() or ""
    )
    assert found, caught.value.details()
    assert "secret" not in repr(caught.value.trailing_metadata())
    assert found[1] in caplog.text
    assert "secret detail" in caplog.text
    texts = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in stub.GenerateStream(request):
            texts += [output.text for output in message.outputs]
    assert (len(texts), caught.value.code()) == (1, grpc.StatusCode.INTERNAL)
    assert not engine.live
    engine.failure = None


async def test_closed_engine_is_unavailable_with_a_hint(
    target: str, client: AsyncClient, engine: FakeEngine
) -> None:
    await engine.drain(0)
    async with grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceStub(channel).Generate(pb.GenerateRequest(text="x"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    _, info, retry = details_of(caught.value)
    assert (info.reason, retry.retry_delay.seconds) == ("ENGINE_CLOSED", 1)
    with pytest.raises(EngineClosedError, match="draining"):
        await client.generate("x")
