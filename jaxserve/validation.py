"""The one validator: Python, command line and gRPC all pass through these functions.

Device code never sees an unchecked number: JAX clamps out-of-range gathers and drops out-of-range scatters
silently, so every id is bounded here, on the host, by the width of the logits.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
import re
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, cast

from jaxserve.errors import CapacityError, ValidationError

if TYPE_CHECKING:
    from jaxserve.request import SamplingParams

MAX_N = 128
MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS_ENTRIES = 320
MAX_LOGIT_BIAS = 100.0
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**32 - 1
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MIN_REPETITION_PENALTY = 0.01
MAX_PROMPT_CHARS = 16 * 2**20
# Of calls that only tokenise: no context length bounds them, and everybody else waits meanwhile.
MAX_TOKENIZED_CHARS = 2**20
MAX_DETOKENIZED_IDS = 2**18
MAX_MESSAGES = 4096
MAX_CACHE_SALT_CHARS = 256
_PROMPT_FORMS = "must be a string, a list of token ids, {'prompt': text} or {'prompt_token_ids': [...]}"
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")


@dataclasses.dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one engine can take; filled from the model and the resolved configuration.

    Attributes:
        vocab_size: width of the logits; token ids must be below it.
        max_model_len: prompt plus output tokens of one request.
        num_cache_tokens: tokens that fit in all KV pages together.
    """

    vocab_size: int
    max_model_len: int
    num_cache_tokens: int

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt, which leaves room for one of output."""
        return min(self.max_model_len, self.num_cache_tokens) - 1


def check_sampling_params(params: SamplingParams) -> None:
    """Checks everything that does not depend on the model. Raises ValidationError."""
    _check_int("n", params.n, 1, MAX_N)
    _check_float("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _check_float("top_p", params.top_p, 0.0, 1.0, above_low=True)
    _check_int("top_k", params.top_k, -1, MAX_TOKENS)
    _check_float("min_p", params.min_p, 0.0, 1.0)
    _check_float(
        "repetition_penalty", params.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    )
    _check_float("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_float("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if params.seed is not None:
        _check_int("seed", params.seed, 0, MAX_SEED)
    if params.logprobs is not None:
        _check_int("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if params.max_tokens is not None:
        _check_int("max_tokens", params.max_tokens, 1, MAX_TOKENS)
    _check_int("min_tokens", params.min_tokens, 0, MAX_TOKENS)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValidationError(
            "min_tokens", params.min_tokens, f"must not exceed max_tokens={params.max_tokens}"
        )
    _check_logit_bias(params.logit_bias)
    _check_stop_strings(params.stop)
    _check_sequence("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKEN_IDS)
    check_token_ids("stop_token_ids", params.stop_token_ids)
    for field in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
        _check_bool(field, getattr(params, field))


def check_request_id(request_id: object) -> str:
    """Returns the id if it is one. Raises ValidationError."""
    if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
        raise ValidationError("request_id", request_id, "must be 1 to 128 characters of A-Z a-z 0-9 _ . : -")
    return request_id


def check_prompt(prompt: object) -> str | Sequence[int]:
    """Returns a prompt's text, checked, or its token ids, not checked yet. Raises ValidationError."""
    inner = prompt
    if isinstance(prompt, Mapping):
        name = next(iter(prompt)) if len(prompt) == 1 else None
        if name not in ("prompt", "prompt_token_ids"):
            raise ValidationError("prompt", dict(prompt), _PROMPT_FORMS)
        inner = prompt[name]
        if isinstance(inner, str) != (name == "prompt"):
            raise ValidationError(name, inner, _PROMPT_FORMS)
    if isinstance(inner, str):
        return check_prompt_text(inner)
    if (
        isinstance(inner, bytes | bytearray | memoryview | Mapping | Set)
        or not hasattr(inner, "__len__")
        or not hasattr(inner, "__getitem__")
    ):
        raise ValidationError("prompt", inner, _PROMPT_FORMS)
    return cast(Sequence[int], inner)


def check_prompt_text(text: object) -> str:
    """Returns the text if it can be tokenised. Raises ValidationError."""
    if not isinstance(text, str):
        raise ValidationError("prompt", text, _PROMPT_FORMS)
    if not text:
        raise ValidationError("prompt", text, "must not be empty")
    if len(text) > MAX_PROMPT_CHARS:
        raise ValidationError(
            "prompt", f"<{len(text)} characters>", f"must have at most {MAX_PROMPT_CHARS} characters"
        )
    check_unicode("prompt", text)
    return text


def check_tokenized_chars(field: str, text: str) -> None:
    """Bounds a text that is tokenised for its own sake. Raises ValidationError."""
    if len(text) > MAX_TOKENIZED_CHARS:
        raise ValidationError(
            field, f"<{len(text)} characters>", f"must have at most {MAX_TOKENIZED_CHARS} characters"
        )


def check_detokenized_ids(token_ids: Sequence[int], limits: RequestLimits) -> None:
    """Checks ids that are to become text. Raises ValidationError."""
    _check_sequence("token_ids", token_ids, MAX_DETOKENIZED_IDS)
    check_token_ids("token_ids", token_ids, limits.vocab_size)


def check_num_messages(count: int) -> None:
    """Bounds a conversation before anything is made of it. Raises ValidationError."""
    if not 1 <= count <= MAX_MESSAGES:
        raise ValidationError("messages", f"{count} messages", f"must be 1 to {MAX_MESSAGES}")


def check_unicode(field: str, text: str) -> None:
    """Refuses lone surrogates, which no encoder takes: Python makes them of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationError(
            field, text, f"must be valid Unicode without lone surrogates ({error.reason})"
        ) from None


def check_fewest_tokens(field: str, text: str, fewest: int, limits: RequestLimits) -> None:
    """Refuses a text that cannot fit before it is tokenised. Raises CapacityError.

    Args:
        field: ``prompt`` or ``messages``.
        text: what is to be tokenised.
        fewest: lower bound of the number of its tokens.
        limits: of the engine.
    """
    longest = limits.max_prompt_tokens
    if fewest > longest:
        raise CapacityError(
            field,
            f"<{len(text)} characters>",
            f"must have at most {longest} tokens here, and has at least {fewest}",
        )


def check_prompt_token_ids(token_ids: Sequence[int], limits: RequestLimits) -> None:
    """Checks a prompt against the model. Raises ValidationError, or CapacityError if it is too long."""
    if len(token_ids) == 0:
        raise ValidationError("prompt_token_ids", [], "must hold at least one token")
    longest = limits.max_prompt_tokens
    if len(token_ids) > longest:
        raise CapacityError(
            "prompt_token_ids", f"<{len(token_ids)} tokens>", f"must have at most {longest} tokens here"
        )
    check_token_ids("prompt_token_ids", token_ids, limits.vocab_size)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int = MAX_TOKENS + 1) -> None:
    """Checks ids against the width of the logits. Raises ValidationError."""
    for token_id in token_ids:
        _check_int(field, token_id, 0, vocab_size - 1)


def check_params_against_model(params: SamplingParams, limits: RequestLimits) -> None:
    """Checks token ids in the parameters against the width of the logits. Raises ValidationError."""
    check_token_ids("stop_token_ids", params.stop_token_ids, limits.vocab_size)
    check_token_ids("logit_bias", tuple(params.logit_bias or ()), limits.vocab_size)


def check_priority(priority: object) -> None:
    """Priorities are small integers. Raises ValidationError."""
    _check_int("priority", priority, -(2**31), 2**31 - 1)


def check_client(client: object) -> None:
    """A client is an opaque id, or empty for nobody in particular. Raises ValidationError."""
    if not isinstance(client, str) or (client and not REQUEST_ID.fullmatch(client)):
        raise ValidationError("client", client, "must be empty or 1 to 128 characters of A-Z a-z 0-9 _ . : -")


def check_cache_salt(cache_salt: object) -> None:
    """A salt is a text that is not long, or empty for prefixes that all share. Raises ValidationError."""
    if not isinstance(cache_salt, str) or len(cache_salt) > MAX_CACHE_SALT_CHARS:
        raise ValidationError(
            "cache_salt", cache_salt, f"must be a text of at most {MAX_CACHE_SALT_CHARS} characters"
        )
    check_unicode("cache_salt", cache_salt)


def check_timeout(timeout_s: object) -> None:
    """A timeout is a positive, finite number of seconds, or None. Raises ValidationError."""
    if timeout_s is not None:
        _check_float("timeout_s", timeout_s, 0.0, float(MAX_TOKENS))


def _check_int(field: str, value: object, low: int, high: int) -> None:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # among others numpy's bool and its arrays, which have an `__index__` that refuses
        number = low - 1
    if not low <= number <= high:
        raise ValidationError(field, value, f"must be an integer in [{low}, {high}]")


def _check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValidationError(field, value, "must be True or False")


def _check_float(field: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # numpy's too
    # Comparing also refuses NaN; `math.isfinite` would overflow on a huge integer.
    if not is_number or not low <= cast(float, value) <= high or (above_low and value == low):
        bracket = "(" if above_low else "["
        raise ValidationError(field, value, f"must be a finite number in {bracket}{low:g}, {high:g}]")


def _check_sequence(field: str, value: object, longest: int) -> None:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValidationError(field, value, "must be a list")
    if len(value) > longest:
        raise ValidationError(field, f"<{len(value)} entries>", f"must have at most {longest} entries")


def _check_stop_strings(stop: object) -> None:
    strings = (stop,) if isinstance(stop, str) else stop
    _check_sequence("stop", strings, MAX_STOP_STRINGS)
    assert isinstance(strings, Sequence)
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise ValidationError("stop", text, f"must be strings of 1 to {MAX_STOP_STRING_CHARS} characters")
        check_unicode("stop", text)


def _check_logit_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ValidationError("logit_bias", bias, "must map token ids to numbers")
    if len(bias) > MAX_LOGIT_BIAS_ENTRIES:
        raise ValidationError(
            "logit_bias", f"<{len(bias)} entries>", f"must have at most {MAX_LOGIT_BIAS_ENTRIES} entries"
        )
    for token_id, value in bias.items():
        _check_int("logit_bias", token_id, 0, MAX_TOKENS)
        _check_float("logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
