"""`jaxserve.v1.Inference` over an engine, with one error boundary around every call."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from jaxserve import validation
from jaxserve.errors import EngineClosedError, ModelNotFoundError, ValidationError
from jaxserve.outputs import RequestOutput
from jaxserve.request import FinishReason
from jaxserve.server.engine_api import EngineApi
from jaxserve.server.errors import DeadlineError, RequestAbortedError, RequestFailedError, to_status
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.requests import FIELD_PATHS, chat_from_proto, check_known_fields, params_from_request
from jaxserve.server.responses import DeltaEncoder

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
_MAX_TIMEOUT_S = float(validation.MAX_TOKENS)


class Phase(enum.Enum):
    """What the server is doing; calls are taken only while it is serving."""

    LOADING = "the model is still being loaded"
    SERVING = "serving"
    DRAINING = "the server is shutting down"


class InferenceService:
    """The five calls. Each is a coroutine that returns its response or writes it to the context.

    `attach` gives it an engine; before that, and after `refuse`, every call ends in UNAVAILABLE.
    """

    def __init__(self) -> None:
        self._engine: EngineApi | None = None
        self._phase = Phase.LOADING
        self._running: set[str] = set()

    def attach(self, engine: EngineApi) -> None:
        """Starts taking calls."""
        self._engine = engine
        self._phase = Phase.SERVING

    def refuse(self) -> None:
        """Takes no new calls; those under way go on."""
        self._phase = Phase.DRAINING

    async def abort_running(self) -> None:
        """Ends every generation under way; their callers get what there is, and UNAVAILABLE or ABORTED."""
        for request_id in tuple(self._running):
            await self._serving_or_draining().abort(request_id)

    async def generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """The whole answer."""
        last = None
        async with contextlib.aclosing(self._outputs(request, context)) as outputs:
            async for output in outputs:
                last = output
        encoder = DeltaEncoder(request.response, self._serving_or_draining().model_name)
        response = encoder.encode(self._finished(last))
        assert response is not None  # a first message is never empty
        return response

    async def generate_stream(self, request: pb.GenerateRequest, context: Any) -> None:
        """One message per output of the engine. Leaving in any way aborts the request."""
        encoder, last = DeltaEncoder(request.response, self._serving().model_name), None
        async with contextlib.aclosing(self._outputs(request, context)) as outputs:
            async for output in outputs:
                last = output
                message = encoder.encode(output)
                if message is not None:
                    await context.write(message)
        self._finished(last)

    async def tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids of a text, or of a conversation under the model's template."""
        engine = self._engine_for(request.model)
        tokenizer, kind = engine.tokenizer, request.WhichOneof("prompt")
        if kind == "chat":
            text = await asyncio.to_thread(tokenizer.render_chat, chat_from_proto(request.chat))
            validation.check_tokenized_chars("messages", text)
            token_ids = await asyncio.to_thread(tokenizer.encode, text, False, parse_special=True)
        elif kind == "text":
            text = validation.check_prompt_text(request.text)
            validation.check_tokenized_chars("prompt", text)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)
        else:
            raise ValidationError("prompt", None, "must be one of text or chat")
        return pb.TokenizeResponse(token_ids=token_ids)

    async def detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Text of token ids."""
        engine = self._engine_for(request.model)
        token_ids = request.token_ids
        validation.check_detokenized_ids(token_ids, engine.limits)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await asyncio.to_thread(engine.tokenizer.decode, list(token_ids), skip_special_tokens=skip)
        return pb.DetokenizeResponse(text=text)

    async def list_models(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """The one model that is served."""
        engine = self._serving()
        limits = engine.limits
        model = pb.Model(
            name=engine.model_name, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size
        )
        return pb.ListModelsResponse(models=[model])

    def _serving(self) -> EngineApi:
        if self._engine is None or self._phase is not Phase.SERVING:
            raise EngineClosedError(self._phase.value)
        return self._engine

    def _engine_for(self, model: str) -> EngineApi:
        engine = self._serving()
        if model not in ("", engine.model_name):
            raise ModelNotFoundError(f"model={model[:80]!r}: this server has {engine.model_name!r}")
        return engine

    def _serving_or_draining(self) -> EngineApi:
        if self._engine is None:
            raise EngineClosedError(self._phase.value)
        return self._engine

    async def _outputs(self, request: pb.GenerateRequest, context: Any) -> AsyncGenerator[RequestOutput]:
        """The engine's outputs; closing this closes the engine's generator, which aborts the request."""
        engine = self._engine_for(request.model)
        request_id = request.request_id or f"grpc-{uuid.uuid4().hex}"
        outputs = _start(engine, request, request_id, _timeout_s(context))
        is_mine = request_id not in self._running  # else the engine refuses it as a duplicate
        self._running.add(request_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            if is_mine:
                self._running.discard(request_id)

    def _finished(self, last: RequestOutput | None) -> RequestOutput:
        """The last output. One that was ended before its time is an error, even if part of it was sent."""
        if last is None or not last.finished:
            raise RequestAbortedError("the engine ended the request without an answer")
        reasons = {completion.finish_reason for completion in last.outputs}
        if FinishReason.DEADLINE in reasons:
            raise DeadlineError("the deadline passed")
        if FinishReason.ABORT in reasons:
            if self._phase is Phase.DRAINING:
                raise EngineClosedError(self._phase.value)
            raise RequestAbortedError("the request was aborted")
        if reasons == {FinishReason.ERROR}:
            raise RequestFailedError(f"the request failed: {last.outputs[0].error}")
        return last


def _start(
    engine: EngineApi, request: pb.GenerateRequest, request_id: str, timeout_s: float | None
) -> AsyncGenerator[RequestOutput]:
    params = params_from_request(request)
    options: dict[str, Any] = {
        "request_id": request_id,
        "priority": request.priority,
        "client": request.client,
        "cache_salt": request.cache.salt,
        "timeout_s": timeout_s,
    }
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return engine.chat(chat_from_proto(request.chat), params, **options)
    if kind == "text":
        return engine.generate(request.text, params, **options)
    if kind == "token_ids":
        return engine.generate(list(request.token_ids.ids), params, **options)
    raise ValidationError("prompt", None, "must be one of text, token_ids or chat")


def rpc_handlers(service: InferenceService) -> grpc.GenericRpcHandler:
    """gRPC's handlers for the service, each inside the error boundary.

    They replace the generated ones because those let a message that cannot be parsed end in INTERNAL.
    """
    behaviours: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
        "Generate": service.generate,
        "GenerateStream": service.generate_stream,
        "Tokenize": service.tokenize,
        "Detokenize": service.detokenize,
        "ListModels": service.list_models,
    }
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in SERVICE.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            _bounded(behaviours[method.name]),
            request_deserializer=_parser(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)


def _bounded(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """The exception boundary: one request's error ends that request, with the status its kind has."""

    async def call(request: Message | DecodeError, context: Any) -> Any:
        try:
            if isinstance(request, DecodeError):
                raise ValidationError("request", "<bytes>", f"must be a message of this method ({request})")
            check_known_fields(request)
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the boundary itself; cancellation passes through it
            status = to_status(error, _field_paths(request))
        return await context.abort(status.code, status.details, status.trailing_metadata)

    return call


def _parser(message_class: type[Message]) -> Callable[[bytes], Message | DecodeError]:
    def parse(data: bytes) -> Message | DecodeError:
        try:
            return message_class.FromString(data)
        except DecodeError as error:
            return error

    return parse


def _field_paths(request: Message | DecodeError) -> dict[str, str]:
    if not isinstance(request, pb.GenerateRequest):
        return {}
    return FIELD_PATHS | {"prompt": request.WhichOneof("prompt") or "prompt"}


def _timeout_s(context: Any) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else min(max(remaining, 0.0), _MAX_TIMEOUT_S)
