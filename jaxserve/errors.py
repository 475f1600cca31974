"""Errors that users meet. Each says which field is wrong, its value, and what is allowed."""

from __future__ import annotations

_SHOWN_VALUE_CHARS = 80


class JaxserveError(Exception):
    """Base of every error raised on purpose by jaxserve."""


class ConfigError(JaxserveError, ValueError):
    """The engine's configuration cannot work; nothing was started."""


class ModelNotFoundError(JaxserveError, LookupError):
    """No model of that name or path; the message holds the command that would fetch it."""


class CheckpointError(JaxserveError, ValueError):
    """A checkpoint's files are corrupt, incomplete or of an unsupported kind."""


class ValidationError(JaxserveError, ValueError):
    """A request's field has a value that is not allowed.

    Attributes:
        field: name of the field as the Python API spells it, e.g. ``temperature``.
        value: the offending value (shortened in the message).
        allowed: what would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field}={_shown(value)}: {allowed}")


class CapacityError(ValidationError):
    """The request is well formed but can never fit this engine (context or KV pages)."""


class DuplicateRequestError(ValidationError):
    """A request with this id is still alive."""


class StorageError(JaxserveError):
    """A file or folder could not be written, for want of room or of permission; no half of it is left.

    Attributes:
        reason: in the system's words.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{path}: cannot be written: {reason}")


class StepFailedError(JaxserveError):
    """An executor could not run a step, and has recovered: it holds nothing of any request any more."""


class QueueFullError(JaxserveError):
    """The waiting queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineClosedError(JaxserveError):
    """The engine was closed, is draining, or has died; it takes no more requests."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE_CHARS else text[: _SHOWN_VALUE_CHARS - 3] + "..."
