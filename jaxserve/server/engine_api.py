"""What the server needs of an engine: `jaxserve.AsyncLLM` has it, and so has the fake engine of the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.validation import RequestLimits


class TokenizerApi(Protocol):
    """Text to token ids and back; called from worker threads."""

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens spelled in it stay text unless ``parse_special``."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation under the model's template, special tokens spelled out. Raises ValidationError."""
        ...


class EngineApi(Protocol):
    """One model being served. Every method is called on the event loop's thread."""

    @property
    def model_name(self) -> str:
        """What requests may call the model."""
        ...

    @property
    def tokenizer(self) -> TokenizerApi:
        """The model's tokenizer."""
        ...

    @property
    def limits(self) -> RequestLimits:
        """What one request may ask for."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether it is warmed up and stepping: what the health service reports."""
        ...

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        /,
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Cumulative outputs, the last with ``finished``; closing the generator early aborts the request.

        A reader that falls behind gets the newest output, not a backlog. Text only ever grows.

        Raises:
            ValidationError: at the call or at the first output.
            QueueFullError, EngineClosedError: likewise.
        """
        ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        /,
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, for a conversation under the model's chat template."""
        ...

    async def abort(self, request_id: str) -> None:
        """Ends a request if it is alive; its generator yields a last output with finish reason ``abort``."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones; returns whether all finished in time."""
        ...

    async def close(self) -> None:
        """Aborts what is left and frees the device; may be called twice."""
        ...
