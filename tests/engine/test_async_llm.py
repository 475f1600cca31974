"""`AsyncLLM` over an executor whose tokens are known."""

from __future__ import annotations

import asyncio
import time

import pytest

from jaxserve import AsyncLLM, SamplingParams
from jaxserve.errors import DuplicateRequestError, EngineClosedError, ValidationError
from jaxserve.outputs import RequestOutput
from jaxserve.request import FinishReason
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine


async def last_of(stream: object) -> RequestOutput:
    last = None
    async for last in stream:  # type: ignore[attr-defined] # noqa: B007
        pass
    assert last is not None
    return last


async def test_many_streams_none_lost() -> None:
    engine, _ = make_engine(num_slots=32, num_pages=2000)
    async with AsyncLLM.from_engine(engine) as llm:
        params = [SamplingParams(max_tokens=5 + i % 7, seed=i, ignore_eos=True) for i in range(300)]
        outputs = await asyncio.gather(
            *(last_of(llm.generate([i % 100 + 1], p)) for i, p in enumerate(params))
        )
        for index, (p, output) in enumerate(zip(params, outputs, strict=True)):
            want = expected_tokens([index % 100 + 1], p.seed or 0, p.max_tokens or 0, 256)
            assert output.outputs[0].token_ids == want


async def test_outputs_grow_and_the_last_is_finished() -> None:
    engine, _ = make_engine(delay_s=0.003)
    async with AsyncLLM.from_engine(engine) as llm:
        seen = [o async for o in llm.generate([1], SamplingParams(max_tokens=6, seed=0, ignore_eos=True))]
        lengths = [len(o.outputs[0].token_ids) for o in seen]
        assert lengths == sorted(set(lengths))
        assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]


async def test_closing_a_stream_frees_its_pages() -> None:
    engine, _ = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        stream = llm.generate([1] * 20, SamplingParams(max_tokens=400))
        await anext(stream)
        assert llm.stats()["num_used_pages"] > 0
        start = time.monotonic()
        await stream.aclose()
        while llm.stats()["num_used_pages"]:
            await asyncio.sleep(0.001)
            assert time.monotonic() - start < 0.2, "pages must be free within a step"
        assert llm.stats()["finished"].get("abort") == 1 or llm.stats()["num_finished"] == 1


async def test_cancelled_task_aborts() -> None:
    engine, _ = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        task = asyncio.create_task(last_of(llm.generate([1], SamplingParams(max_tokens=400))))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert llm.stats()["num_running"] == 0


async def test_abort_by_id_and_reuse_of_the_id() -> None:
    engine, _ = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        stream = llm.generate([1], SamplingParams(max_tokens=400), request_id="mine")
        await anext(stream)
        with pytest.raises(DuplicateRequestError):
            await last_of(llm.generate([1], request_id="mine"))
        await llm.abort("mine")
        assert (await last_of(stream)).outputs[0].finish_reason is FinishReason.ABORT
        again = await last_of(llm.generate([2], SamplingParams(max_tokens=3, seed=4), request_id="mine"))
        assert again.outputs[0].token_ids == expected_tokens([2], 4, 3, 256)


async def test_an_id_used_again_while_its_last_output_is_unread() -> None:
    """The slow reader gets its own end, and leaving does not end the newcomer."""
    engine, executor = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        params = [SamplingParams(max_tokens=n, seed=n, ignore_eos=True) for n in (5, 60)]
        slow, left, new = (llm.generate([i + 1], params[i > 1], request_id="mine") for i in range(3))
        await anext(slow)
        await until_idle(llm)
        await anext(left)
        await until_idle(llm)
        await anext(new)
        await left.aclose()
        assert (await last_of(slow)).outputs[0].token_ids == expected_tokens([1], 5, 5, 256)
        executor.delay_s = 0.0
        assert (await last_of(new)).outputs[0].token_ids == expected_tokens([3], 60, 60, 256)


async def until_idle(llm: AsyncLLM) -> None:
    while llm.engine.loop.num_alive:
        await asyncio.sleep(0.002)


async def test_no_id_is_that_of_a_completion() -> None:
    engine, _ = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        several = llm.generate([1], SamplingParams(n=2, max_tokens=100), request_id="a")
        await anext(several)
        for name in ("a.0", "a.1", "a:0", "a-0", "a_0"):
            assert (await last_of(llm.generate([1], request_id=name))).finished
        assert (await last_of(several)).finished


async def test_deadline_ends_a_request() -> None:
    engine, _ = make_engine(delay_s=0.005)
    async with AsyncLLM.from_engine(engine) as llm:
        output = await last_of(llm.generate([1], SamplingParams(max_tokens=500), timeout_s=0.05))
        assert output.outputs[0].finish_reason is FinishReason.DEADLINE
        assert 0 < len(output.outputs[0].token_ids) < 100


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "../etc", 7])
async def test_bad_request_ids(request_id: object) -> None:
    engine, _ = make_engine()
    async with AsyncLLM.from_engine(engine) as llm:
        with pytest.raises(ValidationError, match="request_id"):
            await last_of(llm.generate([1], request_id=request_id))  # type: ignore[arg-type]


async def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    engine, _ = make_engine(delay_s=0.002)
    async with AsyncLLM.from_engine(engine) as llm:
        running = asyncio.create_task(
            last_of(llm.generate([1], SamplingParams(max_tokens=30, ignore_eos=True)))
        )
        await asyncio.sleep(0.02)
        draining = asyncio.create_task(llm.drain(5.0))
        await asyncio.sleep(0.01)
        assert not llm.is_ready
        with pytest.raises(EngineClosedError):
            await last_of(llm.generate([1]))
        assert await draining
        assert len((await running).outputs[0].token_ids) == 30


def test_one_engine_serves_several_event_loops() -> None:
    engine, _ = make_engine()
    llm = AsyncLLM.from_engine(engine)
    for seed in range(3):
        output = asyncio.run(last_of(llm.generate([5], SamplingParams(max_tokens=4, seed=seed))))
        assert output.outputs[0].token_ids == expected_tokens([5], seed, 4, 256)
    asyncio.run(llm.close())
