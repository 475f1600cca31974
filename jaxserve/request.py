"""What a caller asks for (`SamplingParams`) and what the scheduler tracks (`Request`).

A request has no phase. Its ``num_computed_tokens`` chases its ``num_tokens``: a long prompt is a large
distance, a decode is a distance of one, and a resumed request is a large distance again.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence

from jaxserve import validation
from jaxserve.errors import ValidationError


class RequestStatus(enum.Enum):
    """Where a request stands; each change is one transition of the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request finished."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen; names, defaults and meaning follow vLLM's.

    Attributes:
        n: number of completions of one prompt; the i-th uses ``seed + i``.
        temperature: 0 is greedy. Must be finite and within [0, 100].
        top_p: nucleus mass in (0, 1]; applied after ``top_k``.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than ``min_p`` times the most probable one; [0, 1].
        repetition_penalty: > 0; divides positive (multiplies negative) logits of tokens seen in the
            prompt or the output (CTRL, Keskar et al. 2019, section 4.1).
        presence_penalty: [-2, 2]; subtracted once from tokens seen in the output.
        frequency_penalty: [-2, 2]; subtracted once per occurrence in the output.
        logit_bias: token id -> bias in [-100, 100], added to the logits.
        seed: unsigned 32-bit; sampled tokens depend on (seed, position) only. None draws one.
        logprobs: None for none; k in [0, 20] returns the chosen token's log-probability and the k best
            alternatives, both of the model's own distribution (before penalties and temperature).
        max_tokens: upper bound on output tokens; None means all that the context length allows.
        min_tokens: end and stop tokens are masked, and stop strings are ignored, until this many tokens were
            output.
        stop: strings that end the output; the string itself is cut off.
        stop_token_ids: token ids that end the output, besides the model's own end tokens.
        ignore_eos: do not stop at the model's own end tokens.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        validation.check_sampling_params(self)
        # Copies: what the engine's thread reads later must be what was checked.
        if not isinstance(self.stop, str):
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties is in force."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def checked_params(params: object) -> SamplingParams:
    """Returns the parameters if they are any. Raises ValidationError."""
    if not isinstance(params, SamplingParams):
        raise ValidationError("sampling_params", params, "must be SamplingParams")
    return params


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated: the scheduler's unit.

    Invariants: ``num_computed_tokens <= num_tokens``; every position below ``num_computed_tokens`` has its
    key and value in ``page_ids`` (or will have, once the steps in flight have run).
    """

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_time: float
    max_tokens: int  # resolved: never None, prompt + max_tokens <= context length
    seed: int  # resolved: never None
    stop_token_ids: frozenset[int] = frozenset()  # the model's end tokens included unless ignore_eos
    priority: int = 0  # lower runs earlier
    deadline: float | None = None  # on the engine's clock
    client: str = ""  # whose it is, for fair orderings; an opaque id
    cache_salt: str = ""  # shares cached prefixes with requests of the same salt only

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string
    error: str | None = None
    output_token_ids: list[int] = dataclasses.field(default_factory=list[int])
    num_computed_tokens: int = 0
    num_tokens: int = dataclasses.field(init=False)  # those being sampled by steps in flight included
    max_num_tokens: int = dataclasses.field(init=False)  # prompt + max_tokens
    slot: int | None = None
    page_ids: list[int] = dataclasses.field(default_factory=list[int])
    predicted_output_tokens: float | None = None  # the median guess
    predicted_output_upper: float = math.inf  # exceeded by one in ten
    next_limit: float = dataclasses.field(init=False)  # output tokens at which something must be looked at
    num_cached_tokens: int = 0  # found in the prefix cache when it first ran
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_token_ids)
        self.max_num_tokens = self.num_tokens + self.max_tokens
        self.note_limit()

    def note_limit(self) -> None:
        """Sets the output length at which the request begins, ends or outgrows its prediction."""
        is_first = self.first_token_time is None
        self.next_limit = 1 if is_first else min(self.max_tokens, self.predicted_output_upper + 1)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens whose values the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens being sampled by steps in flight: their values are not yet known."""
        return self.num_tokens - self.num_known_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def known_token_ids(self) -> Sequence[int]:
        """Prompt and output token ids; those of a request without output are its prompt's own."""
        return (
            (*self.prompt_token_ids, *self.output_token_ids)
            if self.output_token_ids
            else self.prompt_token_ids
        )
