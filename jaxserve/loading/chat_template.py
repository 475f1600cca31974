"""Chat templates: Jinja without Python underneath, bounded in steps, template size and output size.

A template is part of a model: it can read nothing but the messages and it always ends. What it cannot be
kept from is building one huge string by doubling it, so templates deserve as much trust as the weights beside
them; messages need none.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import minijinja

from jaxserve.errors import ValidationError
from jaxserve.validation import check_num_messages, check_unicode

ROLES = ("system", "user", "assistant", "tool", "developer")
# Llama 3.1's template with tools needs about 2,000 steps and 100 a message; a runaway loop stops in 0.1 s.
_FUEL_PER_MESSAGE = 2_000
_BASE_FUEL = 100_000
_MAX_TEMPLATE_CHARS = 65_536
_MAX_CONTENT_CHARS = 4 * 2**20
_MAX_OUTPUT_CHARS = 8 * 2**20
# Noncharacters, which no text has: what is between them stays text, whatever it spells.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_QUOTED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_QUOTE = re.compile(f"[{_OPEN}{_CLOSE}]")
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks training targets; prints nothing


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    quote: Callable[[str], str] = str,
) -> str:
    """The prompt of a conversation, as `transformers` renders it.

    Args:
        template: the model's, Jinja source.
        messages: each with ``role`` and ``content``, both strings; other keys are handed to the template.
        add_generation_prompt: end with the opening of the assistant's answer.
        tools: JSON schemas of functions, for templates that know them.
        special_tokens: ``bos_token``, ``eos_token``, ... for the template.
        quote: is given every text of messages and tools, and returns what the template sees.

    Raises:
        ValidationError: for bad messages, and for a template that is broken, refuses them or runs too long.
    """
    if len(template) > _MAX_TEMPLATE_CHARS:
        raise ValidationError(
            "chat_template", f"{len(template)} characters", f"at most {_MAX_TEMPLATE_CHARS}"
        )
    checked = check_messages(messages)
    environment = minijinja.Environment(
        pycompat=True,
        trim_blocks=True,
        lstrip_blocks=True,
        fuel=_BASE_FUEL + _FUEL_PER_MESSAGE * len(checked),
        filters={"tojson": _to_json},
        globals={"raise_exception": _raise_exception, "strftime_now": time.strftime},
    )
    try:
        text = environment.render_str(
            _GENERATION_TAG.sub("", template),
            messages=_with_quotes(checked, quote),
            add_generation_prompt=add_generation_prompt,
            tools=_with_quotes(tools, quote),
            **(special_tokens or {}),
        )
    except _RefusedError as error:
        raise ValidationError("messages", _roles(checked), f"the chat template says: {error}") from None
    except (minijinja.TemplateError, ValueError, TypeError, MemoryError) as error:
        raise ValidationError(
            "chat_template", template, f"cannot be rendered: {_first_line(error)}"
        ) from error
    if len(text) > _MAX_OUTPUT_CHARS:
        raise ValidationError(
            "chat_template", f"{len(text)} characters of output", f"at most {_MAX_OUTPUT_CHARS}"
        )
    return text


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages as dicts.

    Raises:
        ValidationError: naming the first message that is not allowed.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValidationError("messages", messages, "must be a list of {'role': ..., 'content': ...}")
    check_num_messages(len(messages))
    checked: list[dict[str, Any]] = []
    total = 0
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValidationError("messages", message, "each must be a mapping with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise ValidationError("messages", message, f"'role' must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValidationError("messages", message, "'content' must be a string")
        texts = [value for value in message.values() if isinstance(value, str)]
        total += sum(map(len, texts))
        if total > _MAX_CONTENT_CHARS:
            raise ValidationError(
                "messages", f"over {total} characters", f"at most {_MAX_CONTENT_CHARS} together"
            )
        for text in texts:
            check_unicode("messages", text)
        checked.append({str(key): value for key, value in message.items()})
    return checked


def quoted(text: str, pattern: re.Pattern[str] | None) -> str:
    """A text with what the pattern finds in it between quotes. Quotes of its own become U+FFFD."""
    text = _QUOTE.sub("\ufffd", text)
    return text if pattern is None else pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)


def has_quotes(text: str) -> bool:
    """Whether anything in a rendered prompt is between quotes."""
    return _OPEN in text


def split_at_quotes(text: str) -> list[str]:
    """The parts of a rendered prompt; every second one was between quotes."""
    return _QUOTED.split(text)


def unquoted(text: str) -> str:
    """A rendered prompt without its quotes."""
    return _QUOTE.sub("", text)


def _with_quotes(value: Any, quote: Callable[[str], str]) -> Any:
    """A value with every text in it quoted, but not the keys of mappings."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Mapping):
        return {key: _with_quotes(inner, quote) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_with_quotes(inner, quote) for inner in value]
    return value


class _RefusedError(Exception):
    """A template called raise_exception."""


def _raise_exception(message: object = "refused") -> None:
    raise _RefusedError(str(message)[:500])


def _to_json(value: Any, indent: int | None = None) -> str:
    """Like `transformers`' tojson: plain JSON, nothing escaped for HTML."""
    return minijinja.safe(json.dumps(value, ensure_ascii=False, indent=indent))


def _roles(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [message["role"] for message in messages]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
