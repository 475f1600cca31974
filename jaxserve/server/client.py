"""Python clients of a jaxserve server: the engine's API, over gRPC.

`Client` blocks, `AsyncClient` is for asyncio; both raise the errors that the engine itself would raise in
this process, and ConnectionError where no server answers.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Self

import grpc

from jaxserve import validation
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.server import requests
from jaxserve.server.config import ConnectionConfig
from jaxserve.server.errors import from_rpc_error
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from jaxserve.server.responses import OutputBuilder
from jaxserve.server.security import call_metadata, open_channel

type Prompt = str | Sequence[int] | Mapping[str, Any]
type Messages = Sequence[Mapping[str, Any]]

_MAX_MESSAGE_BYTES = 16 * 2**20
# gRPC never retries a call whose first message has arrived, so no token is generated twice for a reader.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "jaxserve.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config", json.dumps(_RETRIES)),
)


class Client:
    """A blocking connection to one server, for any number of threads.

    Args:
        target: ``host:port``.
        model: the name to ask for; empty takes whatever the server has.
        connection: fields of `jaxserve.server.config.ConnectionConfig`, e.g. ``tls_ca="ca.pem"``,
            ``auth_token_file="token"``. Default: neither TLS nor a token.

    Raises:
        ConfigError: for certificates, keys or a token that cannot be read or do not fit.
    """

    def __init__(self, target: str, *, model: str = "", **connection: Any) -> None:
        self._target = target
        self._model = model
        config = ConnectionConfig(**connection)
        self._metadata = call_metadata(config)
        self._channel = open_channel(grpc, target, config, _CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The whole answer to one prompt.

        Options, as `jaxserve.AsyncLLM.generate`: ``request_id``, ``priority``, ``client``, ``cache_salt``,
        ``timeout_s``.
        """
        return self._whole(_prompt_call(prompt, params, self._model, **options))

    def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The whole answer to a conversation; options as for `generate`."""
        return self._whole(_chat_call(messages, params, self._model, **options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[RequestOutput]:
        """Cumulative outputs as they come, the last one finished; closing the generator aborts."""
        return self._stream(_prompt_call(prompt, params, self._model, **options))

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> Generator[RequestOutput]:
        """As `stream`, for a conversation."""
        return self._stream(_chat_call(messages, params, self._model, **options))

    def tokenize(self, prompt: str | Messages, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, or of a conversation under the model's template."""
        return list(
            self._unary(
                self._stub.Tokenize, _tokenize_request(prompt, self._model, add_special_tokens)
            ).token_ids
        )

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._unary(
            self._stub.Detokenize, _detokenize_request(token_ids, self._model, skip_special_tokens)
        ).text

    def list_models(self) -> list[str]:
        """Names of the models that the server has."""
        return [model.name for model in self._unary(self._stub.ListModels, pb.ListModelsRequest()).models]

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _unary(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None

    def _whole(self, call: _Call) -> RequestOutput:
        return call.outputs.add(self._unary(self._stub.Generate, call.request, call.timeout_s))

    def _stream(self, call: _Call) -> Generator[RequestOutput]:
        messages = self._stub.GenerateStream(call.request, timeout=call.timeout_s, metadata=self._metadata)
        try:
            for message in messages:
                yield call.outputs.add(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None
        finally:
            messages.cancel()


class AsyncClient:
    """As `Client`, for asyncio. Make it inside the event loop that uses it."""

    def __init__(self, target: str, *, model: str = "", **connection: Any) -> None:
        self._target = target
        self._model = model
        config = ConnectionConfig(**connection)
        self._metadata = call_metadata(config)
        self._channel = open_channel(grpc.aio, target, config, _CHANNEL_OPTIONS)
        self._stub = InferenceStub(self._channel)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """The whole answer to one prompt.

        Options, as `jaxserve.AsyncLLM.generate`: ``request_id``, ``priority``, ``client``, ``cache_salt``,
        ``timeout_s``.
        """
        return await self._whole(_prompt_call(prompt, params, self._model, **options))

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """The whole answer to a conversation; options as for `generate`."""
        return await self._whole(_chat_call(messages, params, self._model, **options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput]:
        """Cumulative outputs as they come, the last one finished; closing the generator aborts."""
        return self._stream(_prompt_call(prompt, params, self._model, **options))

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput]:
        """As `stream`, for a conversation."""
        return self._stream(_chat_call(messages, params, self._model, **options))

    async def tokenize(self, prompt: str | Messages, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, or of a conversation under the model's template."""
        request = _tokenize_request(prompt, self._model, add_special_tokens)
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        request = _detokenize_request(token_ids, self._model, skip_special_tokens)
        return (await self._unary(self._stub.Detokenize, request)).text

    async def list_models(self) -> list[str]:
        """Names of the models that the server has."""
        return [
            model.name for model in (await self._unary(self._stub.ListModels, pb.ListModelsRequest())).models
        ]

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _unary(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None

    async def _whole(self, call: _Call) -> RequestOutput:
        return call.outputs.add(await self._unary(self._stub.Generate, call.request, call.timeout_s))

    async def _stream(self, call: _Call) -> AsyncGenerator[RequestOutput]:
        messages = self._stub.GenerateStream(call.request, timeout=call.timeout_s, metadata=self._metadata)
        try:
            async for message in messages:
                yield call.outputs.add(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from None
        finally:
            messages.cancel()


class _Call:
    """One generation: its request, its time limit, and what has come back."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        params: SamplingParams,
        model: str,
        *,
        request_id: str = "",
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> None:
        # What the wire's types cannot hold is the caller's error, in the engine's own words.
        validation.check_unicode("model", model)
        if request_id != "":
            validation.check_request_id(request_id)
        validation.check_priority(priority)
        validation.check_client(client)
        validation.check_cache_salt(cache_salt)
        validation.check_timeout(timeout_s)
        self.request = request
        self.request.request_id, self.request.model, self.request.priority = request_id, model, priority
        self.request.client, self.request.cache.salt = client, cache_salt
        requests.set_params(self.request, params)
        self.request.response.token_ids = True
        self.request.response.prompt_token_ids = not self.request.HasField("token_ids")
        self.timeout_s = timeout_s
        text = self.request.text if self.request.HasField("text") else None
        self.outputs = OutputBuilder(text, list(self.request.token_ids.ids), params.n)


def _prompt_call(prompt: Prompt, params: SamplingParams | None, model: str, **options: Any) -> _Call:
    return _Call(requests.prompt_to_request(prompt), params or SamplingParams(), model, **options)


def _chat_call(messages: Messages, params: SamplingParams | None, model: str, **options: Any) -> _Call:
    request = pb.GenerateRequest(chat=requests.chat_to_proto(messages))
    # As the engine in the process: an answer to a conversation is as long as the model makes it.
    return _Call(request, params or SamplingParams(max_tokens=None), model, **options)


def _tokenize_request(prompt: str | Messages, model: str, add_special_tokens: bool) -> pb.TokenizeRequest:
    validation.check_unicode("model", model)
    if isinstance(prompt, str):
        validation.check_prompt_text(prompt)
        return pb.TokenizeRequest(model=model, text=prompt, add_special_tokens=add_special_tokens)
    return pb.TokenizeRequest(model=model, chat=requests.chat_to_proto(prompt))


def _detokenize_request(
    token_ids: Sequence[int], model: str, skip_special_tokens: bool
) -> pb.DetokenizeRequest:
    validation.check_unicode("model", model)
    validation.check_token_ids("token_ids", token_ids)
    return pb.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
