"""TLS and bearer tokens, for both ends: gRPC's own credentials, and one interceptor.

A token is sent with every call as ``authorization: Bearer TOKEN`` (RFC 6750, section 2.1). Health stays open,
so that probes need no secret; client certificates (mutual TLS) are asked for below gRPC, and of probes too.
"""

from __future__ import annotations

import hmac
import ssl
import string
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from jaxserve.errors import ConfigError
from jaxserve.server.config import ConnectionConfig, ServerConfig
from jaxserve.server.errors import AuthenticationError, to_status

_OPEN_SERVICE = "/grpc.health.v1.Health/"
_VISIBLE_ASCII = frozenset(string.ascii_letters + string.digits + string.punctuation)
_MIN_TOKEN_CHARS = 16


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through that bring the token, and health; all others end in UNAUTHENTICATED."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        # In constant time, so that answers do not tell how much of a guess was right.
        if handler_call_details.method.startswith(_OPEN_SERVICE) or (
            len(given) == 1 and hmac.compare_digest(given[0].encode(), self._expected)
        ):
            return await continuation(handler_call_details)
        # It reads nothing, so it will do for every kind of call.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(request_iterator: Any, context: Any) -> None:
    error = AuthenticationError("this server needs its token in the metadata 'authorization: Bearer TOKEN'")
    status = to_status(error, {})
    await context.abort(status.code, status.details, status.trailing_metadata)


def interceptors(config: ServerConfig) -> list[grpc.aio.ServerInterceptor]:
    """What the server puts before its services. Raises ConfigError for a token file that has no token."""
    if config.auth_token_file is None:
        return []
    return [TokenInterceptor(_read_token(config.auth_token_file))]


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """The server's TLS, or None without it. Raises ConfigError for files that are missing or do not fit."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    _check_pair(config.tls_cert, config.tls_key)
    client_ca = None if config.tls_client_ca is None else _read_ca("tls_client_ca", config.tls_client_ca)
    pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def open_channel(api: Any, target: str, config: ConnectionConfig, options: Any = None) -> Any:
    """A channel to a server.

    Args:
        api: `grpc`, or `grpc.aio` for the channel of an event loop.
        target: ``host:port``.
        config: how to get in.
        options: gRPC's own.

    Raises:
        ConfigError: for no address, and for files that are missing or do not fit.
    """
    if not target:
        raise ConfigError("server='': must be host:port")
    if not config.uses_tls:
        return api.insecure_channel(target, options=options)
    key = cert = None
    if config.tls_cert is not None and config.tls_key is not None:
        _check_pair(config.tls_cert, config.tls_key)
        key, cert = config.tls_key.read_bytes(), config.tls_cert.read_bytes()
    roots = None if config.tls_ca is None else _read_ca("tls_ca", config.tls_ca)
    return api.secure_channel(target, grpc.ssl_channel_credentials(roots, key, cert), options=options)


def call_metadata(config: ConnectionConfig) -> tuple[tuple[str, str], ...]:
    """What goes with every call. Raises ConfigError for a token file that has no token."""
    if config.auth_token_file is None:
        return ()
    return (("authorization", f"Bearer {_read_token(config.auth_token_file)}"),)


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"auth_token_file={str(path)!r}: cannot be read: {error.strerror}") from None
    # The token itself never appears in a message.
    if len(token) < _MIN_TOKEN_CHARS or not _VISIBLE_ASCII.issuperset(token):
        raise ConfigError(
            f"auth_token_file={str(path)!r}: must hold one token of at least {_MIN_TOKEN_CHARS} "
            "visible ASCII characters"
        )
    return token


def _check_pair(cert: Path, key: Path) -> None:
    """gRPC takes any bytes, and then fails every handshake: so OpenSSL looks at them first."""
    try:
        # An encrypted key is an error: nobody is there to be asked for its password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except OSError as error:  # `ssl.SSLError` is one
        raise ConfigError(
            f"tls_cert={str(cert)!r}, tls_key={str(key)!r}: must be a certificate and its private key, "
            f"unencrypted, in PEM files ({error.strerror or error})"
        ) from None


def _read_ca(name: str, path: Path) -> bytes:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{name}={str(path)!r}: must be a PEM file of certificates ({error.strerror or error})"
        ) from None
