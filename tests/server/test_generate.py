from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest

from jaxserve.errors import DuplicateRequestError, QueueFullError
from jaxserve.request import FinishReason, SamplingParams
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.errors import DeadlineError, RequestAbortedError, RequestFailedError
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.protos.jaxserve.v1.inference_pb2_grpc import InferenceStub
from tests.support.fake_engine import NUM_CACHED, FakeEngine, chat_token_ids, letters

PROMPT = [3, 5, 7]  # sums to 15: the first letter of the answer is "p"


async def until(condition) -> float:
    """Waits for the condition; seconds it took."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    while not condition():
        assert loop.time() - start < 5, "waited 5 s in vain"
        await asyncio.sleep(0.001)
    return loop.time() - start


async def test_generate_returns_the_whole_answer(client: AsyncClient) -> None:
    output = await client.generate(PROMPT, SamplingParams(max_tokens=5), request_id="one")
    assert (output.request_id, output.finished, output.prompt, output.prompt_token_ids) == (
        "one",
        True,
        None,
        PROMPT,
    )
    (completion,) = output.outputs
    assert completion.text == "pqrst"
    assert completion.token_ids == [112, 113, 114, 115, 116]
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.stop_reason is None
    assert completion.logprobs is None
    assert output.metrics.ttft_s is not None
    assert output.metrics.e2e_s is not None
    assert output.metrics.num_cached_tokens == NUM_CACHED


async def test_text_and_chat_prompts(client: AsyncClient, engine: FakeEngine) -> None:
    text_ids = engine.tokenizer.encode("héllo")
    output = await client.generate("héllo", SamplingParams(max_tokens=3))
    assert (output.prompt, list(output.prompt_token_ids)) == ("héllo", text_ids)
    assert output.outputs[0].text == letters(text_ids, 3)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat_ids = chat_token_ids(messages)
    output = await client.chat(messages, SamplingParams(max_tokens=4))
    assert (output.prompt, list(output.prompt_token_ids)) == (None, chat_ids)
    assert output.outputs[0].text == letters(chat_ids, 4)


async def test_stream_gives_growing_outputs_in_order(client: AsyncClient) -> None:
    outputs = [output async for output in client.stream(PROMPT, SamplingParams(max_tokens=4, n=2))]
    texts = [[completion.text for completion in output.outputs] for output in outputs]
    assert texts == [["p", "q"], ["pq", "qr"], ["pqr", "qrs"], ["pqrs", "qrst"]]
    assert [output.finished for output in outputs] == [False, False, False, True]
    assert outputs[0].outputs[1].token_ids == [113], "earlier outputs must not change when later ones come"
    assert {completion.finish_reason for completion in outputs[-1].outputs} == {FinishReason.LENGTH}


async def test_messages_on_the_wire_hold_only_what_is_new(target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), request_id="wire")
        request.stopping.max_tokens = 3
        request.response.logprobs = 1
        messages = [message async for message in InferenceStub(channel).GenerateStream(request)]
        request.response.output_text = False
        request.response.token_ids = True
        request.response.ClearField("logprobs")
        silent = [message async for message in InferenceStub(channel).GenerateStream(request)]
    assert [message.outputs[0].text for message in messages] == ["p", "q", "r"]
    assert [len(message.outputs[0].logprobs) for message in messages] == [1, 1, 1]
    first = messages[1].outputs[0].logprobs[0].candidates
    assert [(c.token_id, c.logprob, c.rank, c.token) for c in first] == [
        (113, -0.5, 1, "q"),
        (7, -3.0, 2, "x"),
    ]
    assert [list(message.outputs[0].token_ids) for message in messages] == [[], [], []]
    assert [message.HasField("prompt") for message in messages] == [True, False, False]
    assert (messages[0].prompt.request_id, messages[0].prompt.model, messages[0].prompt.num_tokens) == (
        "wire",
        "fake",
        3,
    )
    assert [message.HasField("usage") for message in messages] == [False, False, True]
    assert (messages[-1].usage.prompt_tokens, messages[-1].usage.completion_tokens) == (3, 3)
    assert messages[-1].usage.cached_tokens == NUM_CACHED
    assert messages[-1].timings.finish_s >= messages[-1].timings.first_token_s >= 0
    assert messages[-1].outputs[0].finish.reason == pb.FINISH_REASON_LENGTH
    assert [(m.outputs[0].text, list(m.outputs[0].token_ids)) for m in silent] == [
        ("", [112]),
        ("", [113]),
        ("", [114]),
    ]


async def test_logprobs_arrive_as_the_engine_gave_them(client: AsyncClient) -> None:
    (completion,) = (await client.generate(PROMPT, SamplingParams(max_tokens=2, logprobs=1))).outputs
    assert completion.logprobs is not None
    assert [list(step) for step in completion.logprobs] == [[112, 7], [113, 7]]
    assert (completion.logprobs[1][113].logprob, completion.logprobs[1][113].decoded_token) == (-0.5, "q")
    assert completion.cumulative_logprob == -1.0


@pytest.mark.parametrize("engine", [FakeEngine(answer="a 👍🏽 naïve\r\n\0 end")])
async def test_characters_of_several_tokens_stream_whole(client: AsyncClient, engine: FakeEngine) -> None:
    texts = [output.outputs[0].text async for output in client.stream("x", SamplingParams(max_tokens=None))]
    assert texts[-1] == "a 👍🏽 naïve\r\n\0 end"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert not any("\ufffd" in text for text in texts)


async def test_every_parameter_reaches_the_engine(client: AsyncClient, engine: FakeEngine) -> None:
    params = SamplingParams(
        n=2,
        temperature=0.0,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={17: -1.5, 3: 99.5},
        seed=2**32 - 1,
        logprobs=0,
        max_tokens=None,
        min_tokens=1,
        stop=["\n\n", "End"],
        stop_token_ids=[4, 9],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    # gRPC counts deadlines on the wall clock: months, so that a machine that sets its clock fails no test.
    timeout_s = 1e7
    stream = client.stream(
        PROMPT, params, priority=-7, client="team-a", cache_salt="tenant", timeout_s=timeout_s
    )
    await anext(stream)
    await stream.aclose()
    assert engine.params == params
    assert engine.options["priority"] == -7
    assert engine.options["client"] == "team-a"
    assert engine.options["cache_salt"] == "tenant"
    assert engine.options["timeout_s"] == pytest.approx(timeout_s, rel=0.5)


async def test_unset_fields_mean_the_defaults(target: str, engine: FakeEngine) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        await InferenceStub(channel).Generate(pb.GenerateRequest(text="x"))
    assert engine.params == SamplingParams()
    assert engine.options["timeout_s"] is None


async def test_cancel_aborts_within_a_step(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    stream = client.stream(PROMPT, SamplingParams(max_tokens=1000), request_id="cancelled")
    assert (await anext(stream)).outputs[0].text == "p"
    await stream.aclose()
    assert await until(lambda: not engine.live) < 0.2
    assert engine.aborted == ["cancelled"]


async def test_cancel_before_the_first_token(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 60.0
    waiting = asyncio.create_task(client.generate(PROMPT, request_id="queued"))
    await until(lambda: engine.live == {"queued"})
    waiting.cancel()
    assert await until(lambda: not engine.live) < 0.2
    assert engine.aborted == ["queued"]


async def test_disconnect_aborts(target: str, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    client = AsyncClient(target)
    streams = [client.stream(PROMPT, SamplingParams(max_tokens=1000), request_id=f"r{i}") for i in range(5)]
    for stream in streams:
        await anext(stream)
    assert len(engine.live) == 5
    await client.close()
    assert await until(lambda: not engine.live) < 0.5
    assert sorted(engine.aborted) == ["r0", "r1", "r2", "r3", "r4"]
    for stream in streams:
        await stream.aclose()


async def test_deadline_of_one_millisecond(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.05
    with pytest.raises(DeadlineError):
        await client.generate(PROMPT, timeout_s=0.001)
    await until(lambda: not engine.live)
    assert (await client.generate(PROMPT, SamplingParams(max_tokens=1))).outputs[0].text == "p"


async def test_deadline_in_mid_decode(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.02
    texts = []
    with pytest.raises(DeadlineError, match="deadline passed"):
        async for output in client.stream(PROMPT, SamplingParams(max_tokens=1000), timeout_s=0.3):
            texts.append(output.outputs[0].text)
    assert 3 <= len(texts) <= 16
    assert texts[2] == "pqr"
    assert await until(lambda: not engine.live) < 0.2


async def test_deadline_that_the_engine_notices_first(
    client: AsyncClient, engine: FakeEngine, monkeypatch
) -> None:
    monkeypatch.setattr("jaxserve.server.service._timeout_s", lambda context: 0.05)
    engine.step_s = 0.02
    last = None
    with pytest.raises(DeadlineError):
        async for output in client.stream(PROMPT, SamplingParams(max_tokens=1000), timeout_s=60):
            last = output
    assert last is not None
    assert last.finished
    assert last.outputs[0].finish_reason is FinishReason.DEADLINE
    with pytest.raises(DeadlineError):
        await client.generate(PROMPT, SamplingParams(max_tokens=1000), timeout_s=60)


async def test_duplicate_live_id_is_refused_and_free_again_afterwards(
    client: AsyncClient, engine: FakeEngine
) -> None:
    engine.step_s = 0.02
    stream = client.stream(PROMPT, SamplingParams(max_tokens=1000), request_id="same")
    await anext(stream)
    with pytest.raises(DuplicateRequestError, match=r"^request_id='same': must not be"):
        await client.generate(PROMPT, request_id="same")
    assert engine.live == {"same"}, "the first one goes on"
    await stream.aclose()
    await until(lambda: not engine.live)
    assert (await client.generate(PROMPT, SamplingParams(max_tokens=1), request_id="same")).finished


async def test_queue_full_says_when_to_come_back(client: AsyncClient, engine: FakeEngine) -> None:
    engine.max_live = 0
    with pytest.raises(QueueFullError, match="too many requests wait") as caught:
        await client.generate(PROMPT)
    assert caught.value.retry_after_s == 2.5


async def test_abort_by_the_server_is_no_success(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    stream = client.stream(PROMPT, SamplingParams(max_tokens=1000), request_id="ended")
    last = await anext(stream)
    await engine.abort("ended")
    with pytest.raises(RequestAbortedError, match="was aborted"):
        async for output in stream:
            last = output
    assert (last.finished, last.outputs[0].finish_reason) == (True, FinishReason.ABORT)


async def test_request_that_the_engine_fails(client: AsyncClient, engine: FakeEngine) -> None:
    engine.error = "the logits were not finite"
    texts = []
    with pytest.raises(RequestFailedError, match=r"^the request failed: the logits were not finite$"):
        async for output in client.stream(PROMPT):
            texts.append((output.outputs[0].text, output.outputs[0].error))
    assert texts == [("p", None), ("pq", "the logits were not finite")]
    with pytest.raises(RequestFailedError):
        await client.generate(PROMPT)


async def test_500_streams_at_once_lose_nothing(client: AsyncClient, engine: FakeEngine) -> None:
    engine.step_s = 0.001

    async def run(number: int) -> tuple[list[int], str]:
        outputs = [
            o
            async for o in client.stream(
                [number % 200, 1], SamplingParams(max_tokens=8), request_id=f"s{number}"
            )
        ]
        assert outputs[-1].request_id == f"s{number}"
        return outputs[-1].outputs[0].token_ids, outputs[-1].outputs[0].text

    answers = await asyncio.gather(*(run(number) for number in range(500)))
    expected = [letters([number % 200, 1], 8) for number in range(500)]
    assert [text for _, text in answers] == expected
    assert [bytes(token_ids).decode() for token_ids, _ in answers] == expected
    assert not engine.live
    assert not engine.aborted


async def test_a_slow_reader_does_not_hold_up_others(client: AsyncClient, engine: FakeEngine) -> None:
    slow = client.stream(PROMPT, SamplingParams(max_tokens=3000), request_id="slow")
    await anext(slow)
    fast = await asyncio.wait_for(client.generate(PROMPT, SamplingParams(max_tokens=50)), timeout=5)
    assert fast.outputs[0].text == letters(PROMPT, 50)
    *_, last = [output async for output in slow]
    assert last.outputs[0].text == letters(PROMPT, 3000)


async def test_the_blocking_client(target: str) -> None:
    def use() -> None:
        with Client(target, model="fake") as client:
            assert client.list_models() == ["fake"]
            assert client.tokenize("hé") == [0, 104, 195, 169]
            assert client.detokenize([104, 195, 169]) == "hé"
            assert client.generate(PROMPT, SamplingParams(max_tokens=2)).outputs[0].text == "pq"
            texts = [output.outputs[0].text for output in client.stream(PROMPT, SamplingParams(max_tokens=3))]
            assert texts == ["p", "pq", "pqr"]
            assert client.chat([{"role": "user", "content": "x"}], SamplingParams(max_tokens=2)).finished
            streamed = list(
                client.stream_chat([{"role": "user", "content": "x"}], SamplingParams(max_tokens=2))
            )
            assert len(streamed) == 2
            stream = client.stream(PROMPT, SamplingParams(max_tokens=4000))
            next(stream)
            stream.close()

    await asyncio.to_thread(use)


async def test_tokenize_detokenize_and_models(client: AsyncClient, engine: FakeEngine) -> None:
    assert await client.tokenize("hi") == [0, 104, 105]
    assert await client.tokenize("hi", add_special_tokens=False) == [104, 105]
    messages = [{"role": "user", "content": "hi"}]
    assert await client.tokenize(messages) == chat_token_ids(messages)
    assert await client.detokenize([0, 104, 105]) == "hi"
    assert await client.detokenize([0, 104, 105], skip_special_tokens=False) == "\0hi"
    assert await client.detokenize([]) == ""
    assert await client.list_models() == ["fake"]
