"""The one table between jaxserve's errors and gRPC's status codes, read in both directions.

The server turns an exception into a `google.rpc.Status` (BadRequest, ErrorInfo and RetryInfo as details) and
the client turns it back into the same exception. What is not in the table is our bug: the caller gets
INTERNAL and an id, the log gets the id and the traceback.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from jaxserve.errors import (
    CapacityError,
    DuplicateRequestError,
    EngineClosedError,
    JaxserveError,
    ModelNotFoundError,
    QueueFullError,
    ValidationError,
)

_log = logging.getLogger(__name__)

DOMAIN = "jaxserve"
_RETRY_CLOSED_S = 1.0
_PROMPT_FIELDS = frozenset({"prompt", "prompt_token_ids", "messages"})
# Trailing metadata as a whole must stay below gRPC's 16 KiB.
_MAX_TEXT_CHARS = 1000


class DeadlineError(JaxserveError, TimeoutError):
    """The call's deadline passed before the request was finished."""


class RequestAbortedError(JaxserveError):
    """The request was aborted by the server, not by the caller."""


class RequestFailedError(JaxserveError):
    """The engine could not finish the request; the fault is not the caller's."""


class AuthenticationError(JaxserveError):
    """The call did not bring the token that the server asks for."""


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorRow:
    """One kind of error: its class here, its code on the wire, and its stable reason."""

    error: type[JaxserveError]
    code: grpc.StatusCode
    reason: str


# The first row that fits wins, so subclasses come before their bases.
ERROR_TABLE = (
    ErrorRow(DuplicateRequestError, grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    ErrorRow(CapacityError, grpc.StatusCode.FAILED_PRECONDITION, "CAPACITY"),
    ErrorRow(ValidationError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ErrorRow(AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    ErrorRow(ModelNotFoundError, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    ErrorRow(QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    ErrorRow(EngineClosedError, grpc.StatusCode.UNAVAILABLE, "ENGINE_CLOSED"),
    ErrorRow(DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE"),
    ErrorRow(RequestAbortedError, grpc.StatusCode.ABORTED, "ABORTED"),
    ErrorRow(RequestFailedError, grpc.StatusCode.INTERNAL, "REQUEST_FAILED"),
)


class _Shown:
    """A value known only as it was printed: it prints the same again."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def to_status(error: Exception, field_paths: Mapping[str, str]) -> Any:
    """The status to abort a call with: has ``code``, ``details`` and ``trailing_metadata``.

    Args:
        error: what was raised.
        field_paths: Python names of fields -> where the request's message has them.
    """
    row = next((row for row in ERROR_TABLE if isinstance(error, row.error)), None)
    if row is None:
        return rpc_status.to_status(_internal(error))
    code = row.code
    if isinstance(error, CapacityError) and error.field in _PROMPT_FIELDS:
        code = grpc.StatusCode.INVALID_ARGUMENT  # too long for any server of this model: the request's fault
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)
    details: list[Any] = [info]
    if isinstance(error, ValidationError):
        shown = str(error).removeprefix(f"{error.field}=").removesuffix(f": {error.allowed}")
        info.metadata.update(
            {"field": error.field, "value": shown, "allowed": error.allowed[:_MAX_TEXT_CHARS]}
        )
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field_paths.get(error.field, error.field), description=error.allowed[:_MAX_TEXT_CHARS]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, QueueFullError):
        details.append(_retry_info(error.retry_after_s))
    elif isinstance(error, EngineClosedError):
        details.append(_retry_info(_RETRY_CLOSED_S))
    status = status_pb2.Status(code=code.value[0], message=str(error)[:_MAX_TEXT_CHARS])
    status.details.extend(_packed(detail) for detail in details)
    return rpc_status.to_status(status)


def from_rpc_error(call: Any, target: str) -> Exception:
    """The exception that a failed call stands for: jaxserve's own where the server says so.

    Otherwise TimeoutError for a passed deadline, ConnectionError for a server that cannot be reached, and
    JaxserveError with gRPC's code and words for the rest.

    Args:
        call: the `grpc.RpcError` or `grpc.aio.AioRpcError` that was raised.
        target: the server's address, for the message.
    """
    status = rpc_status.from_call(call)
    if status is not None:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(retry)
        row = next((row for row in ERROR_TABLE if info.domain == DOMAIN and row.reason == info.reason), None)
        if row is not None:
            return _rebuilt(
                row, status.message, dict(info.metadata), retry.retry_delay.ToTimedelta().total_seconds()
            )
    code, words = call.code(), call.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{target}: the deadline passed")
    if code is grpc.StatusCode.UNAVAILABLE:
        return ConnectionError(f"no jaxserve server answers at {target} ({words})")
    return JaxserveError(f"{target}: {code.name}: {words}")


def _rebuilt(row: ErrorRow, message: str, metadata: Mapping[str, str], retry_after_s: float) -> Exception:
    if issubclass(row.error, ValidationError):
        return row.error(metadata["field"], _Shown(metadata["value"]), metadata["allowed"])
    if issubclass(row.error, QueueFullError):
        return row.error(message, retry_after_s)
    return row.error(message)


def _internal(error: Exception) -> status_pb2.Status:
    error_id = uuid.uuid4().hex
    _log.error("internal error %s", error_id, exc_info=error)
    return status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error {error_id}; the server's log has it"
    )


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
