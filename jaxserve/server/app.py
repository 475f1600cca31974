"""The server process: binds, loads, serves, drains.

The port is bound before the model is loaded, so that a port in use is known at once and probes get an answer:
health says NOT_SERVING and calls end in UNAVAILABLE until the engine has warmed up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.engine_api import EngineApi
from jaxserve.server.security import interceptors, server_credentials
from jaxserve.server.service import SERVICE, InferenceService, rpc_handlers

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 2**20  # a million token ids are 3 to 5 MB
_MAX_METADATA_BYTES = 16 * 2**10
_MANY = 2**31 - 1
_HEALTH_PERIOD_S = 0.25
_FLUSH_S = 2.0  # for the last messages of requests that have just ended
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Calls that arrive faster than they are taken wait. By default gRPC ends some of them, from 1,000 on,
    # with CANCELLED, as if their clients had; past `max_concurrent_rpcs` they get RESOURCE_EXHAUSTED.
    ("grpc.server.max_pending_requests", _MANY),
    ("grpc.server.max_pending_requests_hard_limit", _MANY),
    ("grpc.so_reuseport", 0),  # otherwise a second server binds the same port and takes half of the calls
)


class Server:
    """One listening gRPC server: starts without an engine, gets one with `attach`, ends with `stop`.

    Raises:
        ConfigError: for certificates, keys or a token that cannot be read or do not fit.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._credentials = server_credentials(config)
        self._service = InferenceService()
        self._health = cast(Any, health).aio.HealthServicer()  # the package's type stubs lack it
        self._engine: EngineApi | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=interceptors(config),
            options=_CHANNEL_OPTIONS,
            maximum_concurrent_rpcs=config.max_concurrent_rpcs,
        )
        self._server.add_generic_rpc_handlers([rpc_handlers(self._service)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.serves_reflection:
            names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Binds and listens; returns ``host:port``. Raises ConfigError if the address cannot be had."""
        _check_address_is_free(self._config)
        address = self._config.address(self._config.port)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None
        if self._config.auth_token_file is not None and self._credentials is None:
            _log.warning("without TLS, whoever sees the traffic sees the token")
        await self._set_health(is_ready=False)
        await self._server.start()
        return self._config.address(port)

    async def attach(self, engine: EngineApi) -> None:
        """Serves this engine; health follows its `is_ready` from now on."""
        self._engine = engine
        self._service.attach(engine)
        await self._set_health(is_ready=engine.is_ready)
        self._health_task = asyncio.create_task(self._follow_health(engine))

    async def stop(self, force: asyncio.Event | None = None) -> None:
        """NOT_SERVING, refuse new calls, let the running ones finish, abort the rest, close the engine.

        Args:
            force: when set, what is still running is aborted at once.
        """
        self._service.refuse()
        if self._health_task is not None:
            self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        if self._engine is not None:
            await _until(self._engine.drain(self._config.drain_timeout), force)
            await self._service.abort_running()
        await self._server.stop(_FLUSH_S)
        if self._engine is not None:
            await self._engine.close()

    async def _follow_health(self, engine: EngineApi) -> None:
        was_ready = engine.is_ready
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            if engine.is_ready != was_ready:
                was_ready = not was_ready
                await self._set_health(is_ready=was_ready)
                _log.warning("the engine is %s", "ready again" if was_ready else "not ready")

    async def _set_health(self, *, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING" if is_ready else "NOT_SERVING")
        for name in ("", SERVICE.full_name):
            await self._health.set(name, status)


async def serve(
    config: ServerConfig, make_engine: Callable[[], EngineApi], announce: Callable[[str], None]
) -> bool:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the draining.

    Args:
        config: where to listen.
        make_engine: loads and warms up an engine; runs in a thread of its own.
        announce: told, in one line each, what has been reached.

    Returns:
        Whether `make_engine` has returned: not if a signal came before, and its thread cannot be stopped.

    Raises:
        ConfigError: if the address cannot be had.
        Exception: whatever `make_engine` raised.
    """
    stop, force = asyncio.Event(), asyncio.Event()
    with _signals(stop, force):
        server = Server(config)
        address = await server.start()
        announce(f"listening on {address}, loading the model")
        loading, stopping = _in_thread(make_engine), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                engine = loading.result()
                await server.attach(engine)
                announce(f"serving {engine.model_name} on {address}")
                await stopping
                wait = f"up to {config.drain_timeout:g} s for running requests"
                announce(f"shutting down: {wait}; a second signal ends them")
            return loading.done()
        finally:
            stopping.cancel()
            await server.stop(force)


@contextlib.contextmanager
def _signals(stop: asyncio.Event, force: asyncio.Event):
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (force if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _in_thread[T](work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of `work`, done in a daemon thread: unlike the loop's own, it does not hold up the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - raised again on the loop, by the future
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load-engine", daemon=True).start()
    return future


async def _until(work: object, force: asyncio.Event | None) -> None:
    """Awaits `work`, but no longer than until `force` is set."""
    task = asyncio.ensure_future(work)  # type: ignore[arg-type]
    forced = asyncio.ensure_future((force or asyncio.Event()).wait())
    await asyncio.wait({task, forced}, return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()
    if not task.done():
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _check_address_is_free(config: ServerConfig) -> None:
    """Asks the system itself, whose words name the cause; gRPC says only that binding failed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.address(config.port)}: {error.strerror}") from None
