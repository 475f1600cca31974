"""Requests at random, from nearly right to garbage: each gets an answer or a clear error, and nobody else
notices. Sockets are left out, so that many can be tried; all else is the real server and step loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import AsyncLLM
from jaxserve.engine.build import Engine
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.service import SERVICE, InferenceService, rpc_handlers
from jaxserve.validation import RequestLimits
from tests.support.byte_tokenizer import VOCAB_SIZE
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine

CONTEXT = 48
CLEAR = {
    grpc.StatusCode.INVALID_ARGUMENT: r"^(?s:[a-z_]+=.+: .+)",
    grpc.StatusCode.FAILED_PRECONDITION: r"^(?s:[a-z_]+=.+: must be at most \d+ after a prompt of \d+)$",
    grpc.StatusCode.NOT_FOUND: r"^model=.+: this server has 'fake'$",
    grpc.StatusCode.DEADLINE_EXCEEDED: r"^the deadline passed$",
}


class AbortedCallError(Exception):
    """What gRPC raises in a handler that aborts."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details
        super().__init__(f"{code}: {details}")


class Context:
    """A call's context without a connection."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self.written: list[Any] = []
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s

    async def write(self, message: Any) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise AbortedCallError(code, details)


class Details:
    """What gRPC asks the handlers with."""

    invocation_metadata = ()

    def __init__(self, method: str) -> None:
        self.method = f"/{SERVICE.full_name}/{method}"


class Served:
    """The server's handlers over an engine whose tokens are known."""

    def __init__(self) -> None:
        self.engine: Engine = make_engine(num_slots=4, num_pages=40)[0]
        self.engine.inputs.limits = RequestLimits(VOCAB_SIZE, CONTEXT, 39 * 4)
        service = InferenceService()
        service.attach(AsyncLLM.from_engine(self.engine))
        self._handlers: Any = rpc_handlers(service)
        self._runner = asyncio.Runner()
        self.codes: set[grpc.StatusCode | None] = set()

    def close(self) -> None:
        self.engine.close()
        self._runner.close()

    async def call(self, method: str, data: bytes, remaining_s: float | None = None) -> Any:
        """Calls as gRPC does: the parser, then the handler."""
        handler = self._handlers.service(Details(method))
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        context = Context(remaining_s)
        answer = await behaviour(handler.request_deserializer(data), context)
        return context.written if handler.response_streaming else answer

    def try_out(self, method: str, data: bytes, remaining_s: float | None = None) -> None:
        """One call beside a good one, which must not notice."""
        self._runner.run(self._try_out(method, data, remaining_s))

    async def _try_out(self, method: str, data: bytes, remaining_s: float | None) -> None:
        good = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[15, 3]),
            sampling=pb.Sampling(seed=1),
            stopping=pb.Stopping(max_tokens=4, ignore_eos=True),
            response=pb.ResponseOptions(token_ids=True),
        )
        answer: Any
        outcome: Any
        answer, outcome = await asyncio.gather(
            self.call("Generate", good.SerializeToString()),
            self.call(method, data, remaining_s),
            return_exceptions=True,
        )
        assert list(answer.outputs[0].token_ids) == expected_tokens([15, 3], 1, 4, 256)
        if isinstance(outcome, AbortedCallError):
            assert outcome.code in CLEAR, outcome
            assert re.match(CLEAR[outcome.code], outcome.details), outcome
            assert len(outcome.details) <= 1000
            self.codes.add(outcome.code)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            assert outcome is not None
            self.codes.add(None)
        for _ in range(1000):
            if self.engine.loop.num_alive == 0 and not self.engine.loop.core.has_work:
                break
            await asyncio.sleep(0.001)
        assert self.engine.stats()["num_used_pages"] == 0
        assert self.engine.loop.is_healthy
        self.engine.loop.core.scheduler.check_integrity()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


INTEGERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([128, 129, 255, 256, 257, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]),
)
DOUBLES = st.one_of(st.floats(0.0, 1.0), st.floats(), st.sampled_from([-1.0, 1.1, 2.0, 100.0, 101.0]))
TEXTS = st.one_of(
    st.sampled_from(
        ["", "user", "assistant", "system", "fake", "x" * 50, "x" * 2000, "<end>", "../../x", "\x00"]
    ),
    st.text(max_size=12),
)


def values_of(field: Any) -> st.SearchStrategy[Any]:
    """Values that one field can hold."""
    kinds = {
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_DOUBLE: DOUBLES,
        FieldDescriptor.CPPTYPE_STRING: TEXTS,
        FieldDescriptor.CPPTYPE_INT64: INTEGERS,
    }
    if field.message_type is not None:
        return messages(GetMessageClass(field.message_type))
    return kinds[field.cpp_type]


def messages(kind: type[Message], most_fields: int = 4) -> st.SearchStrategy[Any]:
    """Messages with some of their fields set, to anything that the wire can hold."""

    @st.composite
    def draw_message(draw: st.DrawFn) -> Message:
        message = kind()
        fields = draw(
            st.lists(st.sampled_from(list(kind.DESCRIPTOR.fields)), max_size=most_fields, unique=True)
        )
        for field in fields:
            set_field(draw, message, field)
        return message

    return draw_message()


def set_field(draw: st.DrawFn, message: Message, field: Any) -> None:
    holder = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        holder.update(draw(st.dictionaries(INTEGERS, DOUBLES, max_size=3)))
    elif field.is_repeated:
        holder.extend(draw(st.lists(values_of(field), max_size=5)))
    elif field.message_type is not None:
        holder.SetInParent()
        holder.MergeFrom(draw(values_of(field)))
    else:
        setattr(message, field.name, draw(values_of(field)))


@st.composite
def nearly_right(draw: st.DrawFn) -> pb.GenerateRequest:
    """A request that would be answered, with one field changed, or none."""
    request = pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=5))
    for _ in range(draw(st.integers(0, 2))):
        group = draw(st.sampled_from(["", "sampling", "decoding", "stopping", "response", "cache"]))
        message = getattr(request, group) if group else request
        set_field(draw, message, draw(st.sampled_from(list(message.DESCRIPTOR.fields))))
    return request


@st.composite
def garbage(draw: st.DrawFn) -> bytes:
    """A request's bytes, cut, mixed up, or made of nothing."""
    data = bytearray(draw(nearly_right()).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@settings(max_examples=150)
@given(request=st.one_of(nearly_right(), nearly_right(), messages(pb.GenerateRequest)), streams=st.booleans())
def test_requests(served: Served, request: pb.GenerateRequest, streams: bool) -> None:
    served.try_out("GenerateStream" if streams else "Generate", request.SerializeToString())


@settings(max_examples=100)
@given(
    data=st.one_of(garbage(), st.binary(max_size=40)),
    method=st.sampled_from([m.name for m in SERVICE.methods]),
)
def test_bytes(served: Served, data: bytes, method: str) -> None:
    served.try_out(method, data)


@settings(max_examples=60)
@given(request=st.one_of(messages(pb.TokenizeRequest), messages(pb.DetokenizeRequest)))
def test_calls_of_the_tokenizer(served: Served, request: Message) -> None:
    method = "Tokenize" if isinstance(request, pb.TokenizeRequest) else "Detokenize"
    served.try_out(method, request.SerializeToString())


@settings(max_examples=20)
@given(remaining_s=st.one_of(st.floats(-1.0, 0.02), st.sampled_from([0.0, 1e-9, 1e300, float("inf")])))
def test_deadlines(served: Served, remaining_s: float) -> None:
    request = pb.GenerateRequest(text="hello", stopping=pb.Stopping(unlimited=True))
    served.try_out("Generate", request.SerializeToString(), remaining_s)


def test_both_answers_and_errors_were_tried(served: Served) -> None:
    """Behind the others: what only ever refuses, or never does, tries little."""
    if not served.codes:
        pytest.skip("runs with the tests above")
    assert {None, grpc.StatusCode.INVALID_ARGUMENT} <= served.codes


@pytest.mark.nightly
@settings(max_examples=20_000)
@given(
    data=st.one_of(nearly_right().map(pb.GenerateRequest.SerializeToString), garbage()),
    method=st.sampled_from(["Generate", "GenerateStream"]),
)
def test_twenty_thousand(served: Served, data: bytes, method: str) -> None:
    served.try_out(method, data)
