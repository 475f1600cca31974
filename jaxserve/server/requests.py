"""Requests on the wire <-> Python: one mapping, driven by the proto's own field names.

Every field of `SamplingParams` has the same name in one of the groups of `GenerateRequest`, so nothing here
lists them; a test checks that none is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve import validation
from jaxserve.errors import ValidationError
from jaxserve.request import SamplingParams, checked_params
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb

GROUPS = ("sampling", "decoding", "stopping", "response")
_PARAM_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def _names_of(group: str) -> tuple[str, ...]:
    message_type = pb.GenerateRequest.DESCRIPTOR.fields_by_name[group].message_type
    assert message_type is not None
    return tuple(field.name for field in message_type.fields if field.name in _PARAM_NAMES)


_GROUP_PARAMS = {group: _names_of(group) for group in GROUPS}

# Python's names of fields -> paths in GenerateRequest, for BadRequest.FieldViolation.field.
FIELD_PATHS: dict[str, str] = {
    **{name: f"{group}.{name}" for group, names in _GROUP_PARAMS.items() for name in names},
    "prompt_token_ids": "token_ids.ids",
    "messages": "chat.messages",
    "cache_salt": "cache.salt",
}


def params_from_request(request: pb.GenerateRequest) -> SamplingParams:
    """A request's sampling parameters; what it does not set keeps its default. Raises ValidationError."""
    if request.stopping.unlimited and request.stopping.HasField("max_tokens"):
        raise ValidationError(
            "max_tokens", request.stopping.max_tokens, "must not be set together with unlimited"
        )
    options: dict[str, Any] = {"max_tokens": None} if request.stopping.unlimited else {}
    for group, names in _GROUP_PARAMS.items():
        for field, value in getattr(request, group).ListFields():
            if field.name in names:
                options[field.name] = _plain(value)
    return SamplingParams(**options)


def prompt_to_request(prompt: str | Sequence[int] | Mapping[str, Any]) -> pb.GenerateRequest:
    """A request for a text, a list of token ids, or ``{"prompt_token_ids": [...]}`` / ``{"prompt": "..."}``.

    Raises:
        ValidationError: if it is none of these or does not fit the wire's types.
    """
    checked = validation.check_prompt(prompt)
    if isinstance(checked, str):
        return pb.GenerateRequest(text=checked)
    try:
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=checked))
    except (TypeError, ValueError) as error:  # ids beyond 64 bits, not a list of integers
        raise ValidationError("prompt", prompt, f"must be a text or a list of token ids ({error})") from None


def chat_to_proto(messages: Sequence[Mapping[str, Any]]) -> pb.Chat:
    """A conversation, one mapping with ``role`` and ``content`` per message. Raises ValidationError."""
    chat = pb.Chat()
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValidationError("messages", messages, "must be a list of {'role': ..., 'content': ...}")
    for message in messages:
        try:
            chat.messages.add(**message)
        except (TypeError, ValueError) as error:
            raise ValidationError(
                "messages", message, f"must have the texts 'role' and 'content' ({error})"
            ) from None
    return chat


def chat_from_proto(chat: pb.Chat) -> list[dict[str, str]]:
    """The messages of a conversation, as `AsyncLLM.chat` takes them."""
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def set_params(request: pb.GenerateRequest, params: SamplingParams) -> None:
    """Writes every parameter that has a value, defaults included, so that both ends agree on them."""
    checked_params(params)
    request.stopping.unlimited = params.max_tokens is None
    for group, names in _GROUP_PARAMS.items():
        message = getattr(request, group)
        for name in names:
            value = params.stop_strings if name == "stop" else getattr(params, name)
            if isinstance(value, Mapping):
                getattr(message, name).update(value)
            elif isinstance(value, Sequence):
                getattr(message, name).extend(value)
            elif value is not None:
                setattr(message, name, value)


def check_known_fields(message: Message, path: str = "") -> None:
    """Raises ValidationError for a field that this version's proto does not have, at any depth."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        where = f"{path}<field {unknown[0].field_number}>"
        raise ValidationError("request", where, "this server does not know that field, and ignores none")
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts = [value] if isinstance(value, Message) else value
        if field.message_type.name == pb.ChatMessage.DESCRIPTOR.name:
            validation.check_num_messages(len(parts))
        for part in parts:
            check_known_fields(part, f"{path}{field.name}.")


def _plain(value: Any) -> Any:
    if isinstance(value, MutableMapping):
        return dict(value)
    return list(value) if isinstance(value, MutableSequence) else value
