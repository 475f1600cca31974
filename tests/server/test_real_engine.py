"""The server over a real engine: whoever leaves gives back the pages at once, and nobody else notices.

gRPC, step loop, scheduler and pages are the real ones; only the device is faked. The test lets its steps
through one by one, so that "within one step" is counted, not timed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from jaxserve import AsyncLLM
from jaxserve.engine.input_processor import RequestGroup
from jaxserve.errors import CapacityError
from jaxserve.request import FinishReason, SamplingParams
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import DeadlineError
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine

ROOT = Path(__file__).resolve().parents[2]
PROMPT, OTHER_PROMPT = [7] * 30, [5, 6]
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
OTHER = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)


class Served:
    """A server over a real engine whose device waits for the test."""

    def __init__(self, pipeline_depth: int, num_slots: int) -> None:
        engine, self._executor = make_engine(pipeline_depth=pipeline_depth, num_slots=num_slots)
        self._gate = self._executor.gate = threading.Semaphore(0)
        self.loop = engine.loop
        self.llm = AsyncLLM.from_engine(engine)
        self.server = Server(ServerConfig(port=0, drain_timeout=0.0))
        self.aborted: list[str] = []
        abort = engine.loop.abort

        def recorded(group_id: str, *, only: RequestGroup | None = None) -> None:
            abort(group_id, only=only)
            self.aborted.append(group_id)

        engine.loop.abort = recorded

    async def start(self) -> str:
        target = await self.server.start()
        await self.server.attach(self.llm)
        return target

    async def step(self) -> set[str]:
        """Lets the device finish one step; returns who has a row in the one that was planned thereupon."""
        await until(lambda: self._executor.is_waiting)
        num_planned = len(self._executor.batches)
        self._gate.release()
        await until(lambda: self._executor.is_waiting and len(self._executor.batches) > num_planned)
        (batch,) = self._executor.batches[num_planned:]
        return {row.request_id for row in batch.plan.rows}

    async def first[T](self, answer: Awaitable[T], num_alive: int) -> T:
        """What a new request's first token brings about, which is due two steps after it has arrived."""
        task = asyncio.ensure_future(answer)
        await until(lambda: self.loop.num_alive == num_alive)
        for _ in range(3):
            await self.step()
        return await task

    def run_freely(self) -> None:
        self._executor.gate = None
        self._gate.release(100)

    def pages_of(self, request_id: str) -> int:
        request = self.loop.core.scheduler.get(request_id)
        return 0 if request is None else len(request.page_ids)

    def used_pages(self) -> int:
        return self.llm.stats()["num_used_pages"]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("waited 10 s in vain")


@pytest.fixture(params=[0, 1], ids=lambda depth: f"depth={depth}")
def pipeline_depth(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def num_slots() -> int:
    return 4


@pytest.fixture
async def served(pipeline_depth: int, num_slots: int) -> AsyncGenerator[Served]:
    served = Served(pipeline_depth, num_slots)
    yield served
    served.run_freely()
    await served.server.stop()


# Ways to leave: each gets its first token, yields, leaves, and yields again.


async def cancel(target: str) -> AsyncGenerator[None]:
    async with AsyncClient(target) as client:
        stream = client.stream(PROMPT, LONG, request_id="leaver")
        await anext(stream)
        yield
        await stream.aclose()
        yield


async def close_the_channel(target: str) -> AsyncGenerator[None]:
    client = AsyncClient(target)
    stream = client.stream(PROMPT, LONG, request_id="leaver")
    await anext(stream)
    yield
    await client.close()
    yield
    await stream.aclose()


async def be_killed(target: str) -> AsyncGenerator[None]:
    program = (
        "import sys; from jaxserve import Client, SamplingParams\n"
        "params = SamplingParams(max_tokens=400, ignore_eos=True)\n"
        "for output in Client(sys.argv[1]).stream([7] * 30, params, request_id='leaver'):\n"
        "    print(output.outputs[0].token_ids, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, target], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert (await asyncio.to_thread(process.stdout.readline)).startswith(b"[")
        yield
        process.kill()
        yield


async def let_the_deadline_pass(target: str) -> AsyncGenerator[None]:
    async with AsyncClient(target) as client:
        stream = client.stream(PROMPT, LONG, request_id="leaver", timeout_s=2.0)
        await anext(stream)
        yield
        with pytest.raises(DeadlineError):
            async for _ in stream:
                pass
        yield


@pytest.mark.parametrize("leave", [cancel, close_the_channel, be_killed, let_the_deadline_pass])
async def test_pages_are_free_within_a_step_and_nobody_else_notices(
    served: Served, leave: Callable[[str], AsyncGenerator[None]]
) -> None:
    target = await served.start()
    async with AsyncClient(target) as client:
        other = asyncio.create_task(client.generate(OTHER_PROMPT, OTHER, request_id="other"))
        leaver = leave(target)
        await until(lambda: served.pages_of("other") > 0)
        await served.first(anext(leaver), num_alive=2)
        assert await served.step() == {"other", "leaver"}
        assert served.pages_of("leaver") >= 8, "30 tokens in pages of 4"
        assert served.used_pages() == served.pages_of("leaver") + served.pages_of("other")
        await anext(leaver)
        await until(lambda: served.aborted == ["leaver"])
        assert served.pages_of("leaver") >= 8, "the step under way still writes them"
        assert await served.step() == {"other"}
        assert served.pages_of("leaver") == 0
        assert served.used_pages() == served.pages_of("other") > 0
        served.loop.core.scheduler.check_integrity()
        served.run_freely()
        assert (await other).outputs[0].token_ids == expected_tokens(OTHER_PROMPT, 3, 60, 256)
        await leaver.aclose()
    finished = served.llm.stats()["finished"]
    assert finished in ({"length": 1, "abort": 1}, {"length": 1, "deadline": 1})
    assert served.used_pages() == 0


async def test_the_engine_itself_ends_a_request_whose_deadline_has_passed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await served.start()
    async with AsyncClient(target) as client:
        other = asyncio.create_task(client.generate(OTHER_PROMPT, OTHER, request_id="other"))
        await until(lambda: served.pages_of("other") > 0)
        monkeypatch.setattr("jaxserve.server.service._timeout_s", lambda context: 1.0)
        stream = client.stream(PROMPT, LONG, request_id="late")
        output = await served.first(anext(stream), num_alive=2)
        assert await served.step() == {"other", "late"}
        await asyncio.sleep(1.0)
        assert await served.step() == {"other"}
        assert served.used_pages() == served.pages_of("other") > 0
        await served.step()  # it is told when the step in which it was ended is over
        with pytest.raises(DeadlineError):
            async for output in stream:  # noqa: B007
                pass
        assert (output.finished, output.outputs[0].finish_reason) == (True, FinishReason.DEADLINE)
        served.run_freely()
        assert (await other).outputs[0].token_ids == expected_tokens(OTHER_PROMPT, 3, 60, 256)
    assert served.llm.stats()["finished"] == {"deadline": 1, "length": 1}


@pytest.mark.parametrize("num_slots", [1])
async def test_a_request_that_waits_for_a_slot_leaves_the_queue(served: Served) -> None:
    target = await served.start()
    async with AsyncClient(target) as client:
        other = asyncio.create_task(client.generate(OTHER_PROMPT, OTHER, request_id="other"))
        await until(lambda: served.pages_of("other") > 0)
        waiting = asyncio.create_task(client.generate(PROMPT, LONG, request_id="waiting"))
        await until(lambda: served.loop.num_alive == 2)
        assert await served.step() == {"other"}
        assert served.llm.stats()["num_waiting"] == 1
        waiting.cancel()
        await until(lambda: served.aborted == ["waiting"])
        assert await served.step() == {"other"}
        assert (served.llm.stats()["num_waiting"], served.loop.core.scheduler.get("waiting")) == (0, None)
        served.run_freely()
        assert (await other).outputs[0].token_ids == expected_tokens(OTHER_PROMPT, 3, 60, 256)


@pytest.mark.parametrize("pipeline_depth", [1])
async def test_text_that_cannot_fit_is_refused_untokenised(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = await served.start()
    monkeypatch.setattr(served.llm.tokenizer, "encode", None)
    async with AsyncClient(target) as client, grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(
            CapacityError, match=r"^prompt='<15000000 characters>': must have at most 511 tokens"
        ):
            await client.generate("x" * 15_000_000)
        with pytest.raises(
            CapacityError, match=r"^messages='<\d+ characters>': must have at most 511 tokens"
        ):
            await client.chat([{"role": "user", "content": "x" * 4_000_000}])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceStub(channel).Generate(pb.GenerateRequest(text="x" * 1_000_000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
