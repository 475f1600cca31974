"""What a caller gets back."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from jaxserve.request import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token under the model's own distribution, and its rank (1 is the best)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One completion. In a stream, ``text`` and ``token_ids`` hold everything generated so far.

    Attributes:
        index: which of the ``n`` completions this is.
        text: the decoded text, stop string cut off unless it was asked for.
        token_ids: the generated ids, a final stop token included.
        logprobs: one mapping token id -> `Logprob` per generated token, or None if not asked for.
        finish_reason: None while running; ``stop``, ``length``, ``abort``, ``deadline`` or ``error``.
        stop_reason: the stop string or stop token id that ended it, if any.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list[int])
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' log-probabilities, or None if they were not asked for."""
        if self.logprobs is None:
            return None
        return sum(step[token].logprob for step, token in zip(self.logprobs, self.token_ids, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times on the engine's clock, in seconds; None where the event has not happened.

    ``num_cached_tokens`` of the prompt were found in the prefix cache (by the first completion).
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: first token - arrival."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2e_s(self) -> float | None:
        """End-to-end latency: last token - arrival."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """The state of one prompt's completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    def __repr__(self) -> str:
        texts = ", ".join(
            f"{o.text[:60]!r} ({len(o.token_ids)} tokens, {o.finish_reason})" for o in self.outputs
        )
        return f"RequestOutput({self.request_id}: {texts})"

    def _repr_markdown_(self) -> str:
        """Rich display in notebooks."""
        lines = [f"**prompt** {html.escape((self.prompt or '').strip())}"]
        lines += [
            f"**[{o.index}]** {html.escape(o.text.strip())} *({len(o.token_ids)} tokens, {o.finish_reason})*"
            for o in self.outputs
        ]
        return "\n\n".join(lines)
