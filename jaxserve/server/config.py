"""The server's own options; `jaxserve serve` flags are the fields of `ServerConfig`."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any

from jaxserve.errors import ConfigError

_MAX_PORT = 65_535
_MAX_SECONDS = 86_400.0
_REACHABLE = (
    "other hosts could use this engine, and there is no TLS and no authentication yet; "
    "add --insecure-bind if that is meant"
)


def _option(default: Any, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where and how the server listens. Raises ConfigError for a value that cannot work."""

    host: str = _option(
        "127.0.0.1", "address to listen on; one that other hosts can reach needs --insecure-bind"
    )
    port: int = _option(50051, "port to listen on; 0 takes a free one and prints it")
    insecure_bind: bool = _option(
        False, "allow an address that other hosts can reach, without TLS or authentication"
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
        _require(self.is_loopback or self.insecure_bind, "host", self.host, _REACHABLE)

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


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r}: {allowed}")
