"""An engine whose answers are computed by hand, for tests of everything above the engine.

Token i of completion c of a prompt is the letter number (sum(prompt) + c + i) mod 26; ids are UTF-8 bytes.
With ``answer`` set, the tokens are that text's bytes instead, and then it stops (finish reason stop).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from jaxserve import validation
from jaxserve.errors import DuplicateRequestError, EngineClosedError, QueueFullError, ValidationError
from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxserve.request import FinishReason, SamplingParams

VOCAB_SIZE = 256
NUM_CACHED = 3
_ROLES = ("system", "user", "assistant")


def letters(prompt: Sequence[int], count: int, completion: int = 0) -> str:
    """The text that the engine answers a prompt with."""
    first = sum(prompt) + completion
    return "".join(chr(ord("a") + (first + i) % 26) for i in range(count))


def chat_token_ids(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The prompt that a conversation becomes."""
    return FakeTokenizer().encode(FakeTokenizer().render_chat(messages), False, True)


class FakeTokenizer:
    """UTF-8 bytes as token ids; a special token (0) in front if asked for."""

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        return ([0] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [token_id for token_id in ids if token_id or not skip_special_tokens]
        return bytes(shown).decode(errors="ignore")

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not messages or any(message["role"] not in _ROLES for message in messages):
            raise ValidationError("messages", list(messages), f"must not be empty, with roles of {_ROLES}")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class FakeEngine:
    """Has `jaxserve.server.engine_api.EngineApi`.

    Attributes:
        step_s: seconds that one step, hence one token, takes.
        live: ids of requests that run now.
        aborted: ids of requests that were closed before they had finished, in order.
        options: what the latest request was called with besides prompt and parameters.
        failure: raised instead of the second output, if set.
        error: what every request ends with at its second token (finish reason error), if set.
        max_live: requests beyond which QueueFullError is raised.
    """

    def __init__(self, *, step_s: float = 0.0, answer: str | None = None, max_model_len: int = 4096) -> None:
        self.model_name = "fake"
        self.tokenizer = FakeTokenizer()
        self.limits = validation.RequestLimits(VOCAB_SIZE, max_model_len, 10 * max_model_len)
        self.is_ready = True
        self.step_s = step_s
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.params: SamplingParams | None = None
        self.options: dict[str, Any] = {}
        self.failure: Exception | None = None
        self.error: str | None = None
        self.max_live = 10_000
        self.is_closed = False
        self._answer = None if answer is None else answer.encode()
        self._draining = False
        self._to_abort: set[str] = set()
        self._ids = itertools.count()

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if self._draining:
            raise EngineClosedError("the engine is draining")
        token_ids = (
            self.tokenizer.encode(validation.check_prompt_text(prompt)) if isinstance(prompt, str) else prompt
        )
        validation.check_prompt_token_ids(token_ids, self.limits)
        validation.check_params_against_model(params, self.limits)
        validation.check_priority(options["priority"])
        validation.check_client(options["client"])
        validation.check_timeout(options["timeout_s"])
        request_id = validation.check_request_id(options["request_id"] or f"fake-{next(self._ids)}")
        if request_id in self.live:
            raise DuplicateRequestError("request_id", request_id, "must not be the id of a live request")
        if len(self.live) >= self.max_live:
            raise QueueFullError("too many requests wait", retry_after_s=2.5)
        self.params, self.options = params, options
        self.live.add(request_id)
        is_finished = False
        try:
            async for output in self._steps(request_id, prompt, token_ids, params, options["timeout_s"]):
                is_finished = output.finished
                yield output
        finally:
            self.live.discard(request_id)
            if not is_finished:
                self.aborted.append(request_id)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        return self.generate(chat_token_ids(messages), params, **options)

    async def abort(self, request_id: str) -> None:
        self._to_abort.add(request_id)

    async def drain(self, timeout_s: float) -> bool:
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)
        return not self.live

    async def close(self) -> None:
        self.is_closed = True

    async def _steps(
        self,
        request_id: str,
        prompt: Any,
        token_ids: Sequence[int],
        params: SamplingParams,
        timeout_s: float | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        longest = self.limits.max_model_len - len(token_ids)
        count = longest if params.max_tokens is None else min(params.max_tokens, longest)
        end_reason = FinishReason.LENGTH
        if self._answer is not None and len(self._answer) <= count:
            count, end_reason = len(self._answer), FinishReason.STOP
        for step in itertools.count(1):
            await asyncio.sleep(self.step_s)
            if self.failure is not None and step == 2:
                raise self.failure
            reason = end_reason if step >= count else None
            if timeout_s is not None and loop.time() - start >= timeout_s:
                reason = FinishReason.DEADLINE
            elif request_id in self._to_abort:
                reason = FinishReason.ABORT
            elif self.error is not None and step == 2:
                reason = FinishReason.ERROR
            completions = [
                self._completion(index, token_ids, min(step, count), params) for index in range(params.n)
            ]
            for completion in completions:
                completion.finish_reason = reason
                completion.error = self.error if reason is FinishReason.ERROR else None
            times = (start, start, start + self.step_s, loop.time() if reason else None)
            text = prompt if isinstance(prompt, str) else None
            yield RequestOutput(
                request_id,
                text,
                token_ids,
                completions,
                reason is not None,
                RequestMetrics(*times, num_cached_tokens=NUM_CACHED),
            )
            if reason is not None:
                return

    def _completion(
        self, index: int, prompt: Sequence[int], count: int, params: SamplingParams
    ) -> CompletionOutput:
        answer = self._answer or letters(prompt, count, index).encode()
        token_ids = list(answer[:count])
        logprobs = None
        if params.logprobs is not None:
            logprobs = [
                {7: Logprob(-3.0, 2, "x"), token_id: Logprob(-0.5, 1, chr(token_id))}
                for token_id in token_ids
            ]
        return CompletionOutput(index, bytes(token_ids).decode(errors="ignore"), token_ids, logprobs)
