from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.config import ServerConfig
from tests.support.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def target(engine: FakeEngine) -> AsyncGenerator[str]:
    """A server with the fake engine; what the test left running is aborted at the end."""
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    address = await server.start()
    await server.attach(engine)
    yield address
    await server.stop()
    assert not engine.live
    assert engine.is_closed


@pytest.fixture
async def client(target: str) -> AsyncGenerator[AsyncClient]:
    async with AsyncClient(target) as connected:
        yield connected
