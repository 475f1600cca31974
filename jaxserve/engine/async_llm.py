"""The asynchronous Python API, for servers and anything else that runs an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Engine, build_engine
from jaxserve.engine.input_processor import Messages, Prompt, RequestGroup
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.validation import RequestLimits


class _Stream:
    """One open stream: its newest output if that was not taken yet, and who waits for it."""

    __slots__ = ("group", "newest", "waiter")

    def __init__(self, group: RequestGroup) -> None:
        self.group = group
        self.newest: RequestOutput | None = None
        self.waiter: asyncio.Future[None] | None = None


class _Streams:
    """The streams of one event loop: the engine's thread wakes it once a step, however many there are.

    Outputs are cumulative, so a slow reader finds the newest one only: nothing piles up for it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # By the prompt, the very list that a request and its outputs share: a caller may use an id again as
        # soon as its request has ended, while that one's last output is still on its way or unread.
        self._open: dict[int, _Stream] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """The mailbox; called on the engine's thread."""
        # A loop may be closed with streams still open; nobody is left to read them.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._accept, outputs)

    def _accept(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._open.get(id(output.prompt_token_ids))
            if stream is None:
                continue  # the stream was closed before its request ended
            stream.newest = output
            if stream.waiter is not None and not stream.waiter.done():
                stream.waiter.set_result(None)

    def open(self, group: RequestGroup) -> _Stream:
        """Begins a stream."""
        stream = self._open[id(group.prompt_token_ids)] = _Stream(group)
        return stream

    async def next(self, stream: _Stream) -> RequestOutput:
        """The newest output that was not taken yet."""
        while (output := stream.newest) is None:
            stream.waiter = self.loop.create_future()
            await stream.waiter
        stream.newest = None
        return output

    def close(self, stream: _Stream) -> None:
        """Ends a stream; what is still to come for it is dropped."""
        del self._open[id(stream.group.prompt_token_ids)]


class AsyncLLM:
    """A model in this process, for asyncio.

    async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)
    """

    def __init__(self, model: str | None = None, *, use_tqdm: bool = True, **options: Any) -> None:
        """Loads, compiles and starts (this blocks); options and errors as for `jaxserve.LLM`."""
        if model is not None:
            options["model"] = model
        self._attach(build_engine(EngineConfig.from_flat(options), progress=use_tqdm))

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """Wraps an engine that was built elsewhere."""
        self = cls.__new__(cls)
        self._attach(engine)
        return self

    def _attach(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[asyncio.AbstractEventLoop, _Streams] = {}

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def model_name(self) -> str:
        return self._engine.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def limits(self) -> RequestLimits:
        """What one request may ask for."""
        return self._engine.inputs.limits

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken: loaded, compiled, neither draining nor dead."""
        return self._engine.loop.is_healthy

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Completes one prompt, yielding everything generated so far; the last output has ``finished`` set.

        Closing the iterator (``aclose``, leaving the loop, cancelling the task) aborts the request.

        Args:
            prompt: a string, a list of token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``.
            sampling_params: default ``SamplingParams()``, 16 tokens.
            request_id: yours, unique among those alive; one is made up otherwise.
            priority: under ``ordering="priority"`` and ``"strict_priority"``; lower runs earlier.
            client: whose request it is, under ``ordering="fair"`` and others that are fair to clients.
            cache_salt: cached prefixes are shared with requests of the same salt only; one for each tenant
                keeps tenants apart.
            timeout_s: after so many seconds the request ends with finish reason ``deadline``.

        Raises:
            ValidationError, QueueFullError, EngineClosedError: when the iteration begins.
        """
        params = sampling_params or SamplingParams()
        return self._stream(
            lambda: self._engine.inputs.from_prompt(
                prompt,
                params,
                request_id=request_id,
                priority=priority,
                client=client,
                cache_salt=cache_salt,
                timeout_s=timeout_s,
            )
        )

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Answers one conversation, through the model's chat template; otherwise as `generate`."""
        params = sampling_params or SamplingParams(max_tokens=None)
        return self._stream(
            lambda: self._engine.inputs.from_messages(
                messages,
                params,
                request_id=request_id,
                priority=priority,
                client=client,
                cache_salt=cache_salt,
                timeout_s=timeout_s,
            )
        )

    async def abort(self, request_id: str) -> None:
        """Ends a request if it is alive; its stream gets a last output with finish reason ``abort``."""
        self._engine.loop.abort(request_id)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for those alive; returns whether all finished in time."""
        return await asyncio.to_thread(self._engine.loop.drain, timeout_s)

    async def close(self) -> None:
        """Aborts what is running and frees the device's memory. May be called twice."""
        await asyncio.to_thread(self._engine.close)

    def stats(self) -> dict[str, Any]:
        """A snapshot of queues, pages, stages and padding."""
        return self._engine.stats()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _stream(self, make_group: Callable[[], RequestGroup]) -> AsyncGenerator[RequestOutput]:
        # Tokenising a long prompt, or a hostile template, must not stall the other streams.
        group = await asyncio.to_thread(make_group)
        loop = asyncio.get_running_loop()
        streams = self._streams.get(loop)
        if streams is None:
            self._streams = {known: s for known, s in self._streams.items() if not known.is_closed()}
            streams = self._streams[loop] = _Streams(loop)
        self._engine.loop.submit(group, streams.deliver, streams=True)
        # `_accept` runs on this loop, so it cannot run before the next await: opening here misses nothing.
        stream = streams.open(group)
        finished = False
        try:
            while not finished:
                output = await streams.next(stream)
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._engine.loop.abort(group.id, only=group)
            streams.close(stream)
