"""Half of all callers leave at any time: nothing of them stays, and the others get their answers."""

from __future__ import annotations

import asyncio
import random
import threading

import grpc
import pytest

from jaxserve import AsyncLLM, SamplingParams
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.config import ServerConfig
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine

NUM_REQUESTS = 300


async def until_quiet(num_tasks: int) -> None:
    for _ in range(2000):
        if len(asyncio.all_tasks()) <= num_tasks:
            return
        await asyncio.sleep(0.002)
    pytest.fail(f"{len(asyncio.all_tasks())} tasks, {num_tasks} before: {asyncio.all_tasks()}")


@pytest.mark.parametrize("pipeline_depth", [0, 1])
async def test_a_storm_of_cancellations(pipeline_depth: int) -> None:
    rng = random.Random(pipeline_depth)
    # So few pages that requests are preempted, so few slots that most of them wait.
    engine, executor = make_engine(num_slots=12, num_pages=90, pipeline_depth=pipeline_depth, delay_s=0.001)
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    target = await server.start()
    await server.attach(AsyncLLM.from_engine(engine))
    async with AsyncClient(target) as client:
        prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(NUM_REQUESTS)]
        params = [
            SamplingParams(max_tokens=rng.randint(1, 30), seed=seed, ignore_eos=True)
            for seed in range(NUM_REQUESTS)
        ]
        assert (await client.generate([1], SamplingParams(max_tokens=1))).finished  # all is connected
        num_tasks, num_threads = len(asyncio.all_tasks()), threading.active_count()

        async def whole(index: int) -> list[int]:
            return (await client.generate(prompts[index], params[index])).outputs[0].token_ids

        async def streamed(index: int) -> list[int]:
            token_ids: list[int] = []
            async for output in client.stream(prompts[index], params[index]):
                token_ids = output.outputs[0].token_ids
            return token_ids

        async def leaving(task: asyncio.Task[list[int]], after_s: float) -> None:
            await asyncio.sleep(after_s)
            task.cancel()

        tasks = [asyncio.create_task((whole, streamed)[index % 2](index)) for index in range(NUM_REQUESTS)]
        leavers = rng.sample(range(NUM_REQUESTS), NUM_REQUESTS // 2)
        await asyncio.gather(*(leaving(tasks[index], rng.uniform(0.0, 0.7)) for index in leavers))
        answers = await asyncio.gather(*tasks, return_exceptions=True)

        num_cancelled = 0
        for index, answer in enumerate(answers):
            if isinstance(answer, asyncio.CancelledError):
                assert index in leavers
                num_cancelled += 1
            else:
                want = expected_tokens(prompts[index], index, params[index].max_tokens or 0, 256)
                assert answer == want, (index, answer)
        assert num_cancelled > NUM_REQUESTS // 10, "too few left in time: this tests nothing"
        await until_quiet(num_tasks)
        for _ in range(1000):
            if not engine.loop.core.has_work:
                break
            await asyncio.sleep(0.002)
        stats = engine.stats()
        assert (stats["num_used_pages"], stats["num_running"], stats["num_waiting"]) == (0, 0, 0)
        assert engine.loop.num_alive == 0
        engine.loop.core.scheduler.check_integrity()
        assert sum(stats["finished"].values()) <= NUM_REQUESTS + 1
        assert threading.active_count() <= num_threads + 32, "the pool that tokenises, and no more"
        assert stats["finished"].get("error") is None
        executor.delay_s = 0.0
        again = await client.generate([7], SamplingParams(max_tokens=5, seed=2, ignore_eos=True))
        assert again.outputs[0].token_ids == expected_tokens([7], 2, 5, 256)
    await server.stop()


async def test_cancelled_before_it_was_read(capfd: pytest.CaptureFixture[str]) -> None:
    """A hundred calls that are gone when the server comes to them leave nothing behind."""
    engine, _ = make_engine()
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    target = await server.start()
    await server.attach(AsyncLLM.from_engine(engine))
    async with AsyncClient(target) as client:
        for _ in range(100):
            task = asyncio.create_task(client.generate([1], SamplingParams(max_tokens=400)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
                await task
        assert (await client.generate([1], SamplingParams(max_tokens=1))).finished
        for _ in range(1000):
            if engine.loop.num_alive == 0 and not engine.loop.core.has_work:
                break
            await asyncio.sleep(0.002)
        assert engine.stats()["num_used_pages"] == 0
    await server.stop()
    assert "Traceback" not in capfd.readouterr().err
