"""The asynchronous Python API, for servers and anything else that runs an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, Self

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Engine, build_engine
from jaxserve.engine.input_processor import Messages, Prompt, RequestGroup
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.validation import RequestLimits


class _Streams:
    """The streams of one event loop: the engine's thread wakes it once a step, however many there are.

    Outputs are cumulative, so a slow reader finds the newest one only: nothing piles up for it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._newest: dict[str, RequestOutput | None] = {}  # open streams; None: taken already
        self._waiters: dict[str, asyncio.Future[None]] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """The mailbox; called on the engine's thread."""
        # A loop may be closed with streams still open; nobody is left to read them.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._accept, outputs)

    def _accept(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id not in self._newest:
                continue  # the stream was closed before its request ended
            self._newest[output.request_id] = output
            waiter = self._waiters.pop(output.request_id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def open(self, group_id: str) -> None:
        """Begins a stream."""
        self._newest[group_id] = None

    async def next(self, group_id: str) -> RequestOutput:
        """The newest output that was not taken yet."""
        while (output := self._newest[group_id]) is None:
            waiter = self._waiters[group_id] = self.loop.create_future()
            await waiter
        self._newest[group_id] = None
        return output

    def close(self, group_id: str) -> None:
        """Ends a stream; what is still to come for it is dropped."""
        self._newest.pop(group_id, None)
        self._waiters.pop(group_id, None)


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
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Completes one prompt, yielding everything generated so far; the last output has ``finished`` set.

        Closing the iterator (``aclose``, leaving the loop, cancelling the task) aborts the request.

        Args:
            prompt: a string, a list of token ids, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``.
            sampling_params: default ``SamplingParams()``, 16 tokens.
            request_id: yours, unique among those alive; one is made up otherwise.
            priority: under ``ordering="priority"``; lower runs earlier.
            timeout_s: after so many seconds the request ends with finish reason ``deadline``.

        Raises:
            ValidationError, QueueFullError, EngineClosedError: when the iteration begins.
        """
        params = sampling_params or SamplingParams()
        return self._stream(
            lambda: self._engine.inputs.from_prompt(
                prompt, params, request_id=request_id, priority=priority, timeout_s=timeout_s
            )
        )

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Answers one conversation, through the model's chat template; otherwise as `generate`."""
        params = sampling_params or SamplingParams(max_tokens=None)
        return self._stream(
            lambda: self._engine.inputs.from_messages(
                messages, params, request_id=request_id, priority=priority, timeout_s=timeout_s
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

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        streams.open(group.id)
        finished = False
        try:
            while not finished:
                output = await streams.next(group.id)
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._engine.loop.abort(group.id)
            streams.close(group.id)
