"""The options of the server and of connections to it; flags of `jaxserve` are the fields of both classes."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError

_MAX_PORT = 65_535
_MAX_SECONDS = 86_400.0
_REACHABLE = (
    "other hosts could use this engine without authentication; give --auth-token-file or --tls-client-ca, "
    "or add --insecure-bind if that is meant"
)


def _option(default: Any, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and how the server listens. Raises ConfigError for a value that cannot work."""

    host: str = _option(
        "127.0.0.1",
        "address to listen on; one that other hosts can reach needs authentication or --insecure-bind",
    )
    port: int = _option(50051, "port to listen on; 0 takes a free one and prints it")
    insecure_bind: bool = _option(
        False, "allow an address that other hosts can reach, without authentication"
    )
    tls_cert: Path | None = _option(None, "serve over TLS with this certificate (chain), a PEM file")
    tls_key: Path | None = _option(None, "the certificate's private key, a PEM file")
    tls_client_ca: Path | None = _option(
        None, "take only clients with a certificate of these authorities, a PEM file"
    )
    auth_token_file: Path | None = _option(
        None, "take only calls that bring the token in this file; health checks need none"
    )
    reflection: bool | None = _option(None, "serve gRPC reflection; default: on loopback addresses only")
    drain_timeout: float = _option(
        30.0, "seconds that running requests may take to finish after SIGTERM or Ctrl-C"
    )
    max_concurrent_rpcs: int = _option(
        8192, "calls at once beyond which gRPC refuses new ones; the engine's queue is the real limit"
    )

    def __post_init__(self) -> None:
        _require(bool(self.host), "host", self.host, "must not be empty")
        _require(0 <= self.port <= _MAX_PORT, "port", self.port, f"must be in [0, {_MAX_PORT}]")
        _require(
            0.0 <= self.drain_timeout <= _MAX_SECONDS,
            "drain_timeout",
            self.drain_timeout,
            f"must be in [0, {_MAX_SECONDS:g}]",
        )
        _require(
            self.max_concurrent_rpcs >= 1,
            "max_concurrent_rpcs",
            self.max_concurrent_rpcs,
            "must be at least 1",
        )
        _check_tls_pair(self.tls_cert, self.tls_key)
        _require(
            self.tls_client_ca is None or self.tls_cert is not None,
            "tls_client_ca",
            str(self.tls_client_ca),
            "needs tls_cert and tls_key",
        )
        is_open = not (self.is_loopback or self.authenticates or self.insecure_bind)
        _require(not is_open, "host", self.host, _REACHABLE)

    @property
    def authenticates(self) -> bool:
        """Whether callers must show who they are."""
        return self.auth_token_file is not None or self.tls_client_ca is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address; of names, localhost alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def serves_reflection(self) -> bool:
        """Whether the service describes itself to tools such as grpcurl."""
        return self.is_loopback if self.reflection is None else self.reflection

    def address(self, port: int) -> str:
        """``host:port`` as gRPC writes it, IPv6 in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """How a client gets into a server. Raises ConfigError for a combination that cannot work."""

    tls: bool = _option(
        False, "connect over TLS, trusting the system's authorities; implied by the files below"
    )
    tls_ca: Path | None = _option(None, "trust servers of these authorities instead, a PEM file")
    tls_cert: Path | None = _option(None, "the client's own certificate, if the server asks for one")
    tls_key: Path | None = _option(None, "the client certificate's private key, a PEM file")
    auth_token_file: Path | None = _option(None, "send the token in this file with every call")

    def __post_init__(self) -> None:
        for name in ("tls_ca", "tls_cert", "tls_key", "auth_token_file"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        _check_tls_pair(self.tls_cert, self.tls_key)

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None


def _check_tls_pair(cert: Path | None, key: Path | None) -> None:
    _require(cert is None or key is not None, "tls_cert", str(cert), "needs its tls_key")
    _require(key is None or cert is not None, "tls_key", str(key), "needs its tls_cert")


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r}: {allowed}")
