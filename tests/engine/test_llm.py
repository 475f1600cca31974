"""`LLM` over an executor whose tokens are known."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.llm import InterruptedGenerationError
from jaxserve.errors import CapacityError, EngineClosedError, QueueFullError, ValidationError
from jaxserve.request import FinishReason
from tests.support.bad_parameters import SAMPLING, Bad, rows
from tests.support.fake_executor import expected_tokens
from tests.support.fake_llm import make_engine


def test_generate_keeps_order_and_tokens() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        prompts = [[1, 2, 3], [7], list(range(60))]
        params = [SamplingParams(max_tokens=n, seed=s, ignore_eos=True) for n, s in ((5, 1), (9, 2), (2, 3))]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for prompt, p, output in zip(prompts, params, outputs, strict=True):
            assert output.outputs[0].token_ids == expected_tokens(prompt, p.seed or 0, p.max_tokens or 0, 256)
            assert output.finished
            assert output.outputs[0].finish_reason is FinishReason.LENGTH
            assert output.metrics.ttft_s is not None
            assert output.metrics.ttft_s >= 0


def test_prompt_forms_are_the_same_prompt() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(max_tokens=6, seed=5)
        forms = ["Hi", [72, 105], {"prompt": "Hi"}, {"prompt_token_ids": [72, 105]}]
        tokens = [llm.generate(form, params, use_tqdm=False)[0].outputs[0].token_ids for form in forms]  # type: ignore[arg-type]
        assert tokens == [expected_tokens([72, 105], 5, 6, 256)] * 4


def test_chat_uses_the_template() -> None:
    engine, _ = make_engine(script=b"fine")
    with LLM.from_engine(engine) as llm:
        output = llm.chat(
            [{"role": "user", "content": "how are you?"}], SamplingParams(max_tokens=4), use_tqdm=False
        )[0]
        assert output.prompt == "user:how are you?\nassistant:"
        assert list(output.prompt_token_ids) == list(b"user:how are you?\nassistant:")
        assert output.outputs[0].text == "fine"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens_is_cut(depth: int, include: bool) -> None:
    engine, _ = make_engine(script=b"one two STOP three ", pipeline_depth=depth)
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(max_tokens=40, stop=["nope", "STOP"], include_stop_str_in_output=include)
        outputs = list(llm.stream("x", params))
        last = outputs[-1].outputs[0]
        assert last.text == ("one two STOP" if include else "one two ")
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "STOP")
        texts = [output.outputs[0].text for output in outputs]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)), (
            "streamed text only ever grows: what may begin a stop string is held back"
        )
        assert llm.stats()["num_used_pages"] == 0


def test_a_character_split_over_tokens_comes_whole() -> None:
    engine, _ = make_engine(script="a😀b".encode())
    with LLM.from_engine(engine) as llm:
        texts = [o.outputs[0].text for o in llm.stream("x", SamplingParams(max_tokens=6))]
        assert texts[-1] == "a😀b"
        assert all("�" not in text for text in texts)
        cut = llm.generate("x", SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0]
        assert cut.text == "a�", "two bytes of four are no character"


def test_stop_string_completed_by_the_last_bytes() -> None:
    """An answer that ends by length in mid-character must still finish, and once."""
    engine, _ = make_engine(script="xé".encode())
    with LLM.from_engine(engine) as llm:
        output = llm.generate("p", SamplingParams(max_tokens=2, stop="�"), use_tqdm=False)[0].outputs[0]
        assert (output.text, output.finish_reason) == ("x", FinishReason.STOP)


def test_stop_strings_count_after_min_tokens() -> None:
    engine, _ = make_engine(script=b"ab ab ab ab ")
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(max_tokens=12, min_tokens=4, stop="ab")
        output = llm.generate("p", params, use_tqdm=False)[0].outputs[0]
        assert (output.text, len(output.token_ids)) == ("ab ", 5)


def test_numpy_integers_are_integers() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(max_tokens=np.int32(4), seed=np.int32(7), n=np.uint8(2))  # type: ignore[arg-type]
        for prompt in (np.array([1, 2]), list(np.array([1, 2]))):
            (output,) = llm.generate(prompt, params, use_tqdm=False)  # type: ignore[arg-type]
            assert [c.token_ids for c in output.outputs] == [
                expected_tokens([1, 2], 7 + i, 4, 256) for i in range(2)
            ]
        for nothing in (None, 5):
            with pytest.raises(ValidationError, match="prompts="):
                llm.generate(nothing)  # type: ignore[arg-type]
            with pytest.raises(ValidationError, match="messages="):
                llm.chat(nothing)  # type: ignore[arg-type]


def test_n_completions_differ_by_seed() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        output = llm.generate([4, 5, 6], SamplingParams(n=3, max_tokens=8, seed=10), use_tqdm=False)[0]
        assert [c.token_ids for c in output.outputs] == [
            expected_tokens([4, 5, 6], 10 + i, 8, 256) for i in range(3)
        ]
        assert [c.index for c in output.outputs] == [0, 1, 2]


def test_an_empty_list_is_no_prompts_and_one_in_a_list_is_an_empty_prompt() -> None:
    """As in vLLM: who filters a list of prompts, or of conversations, down to nothing gets nothing."""
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        assert llm.generate([], use_tqdm=False) == []
        assert llm.chat([], use_tqdm=False) == []
        with pytest.raises(ValidationError, match=r"^prompt_token_ids=\[\]: must hold at least one token"):
            llm.generate([[]], use_tqdm=False)
        with pytest.raises(ValidationError, match=r"^messages='0 messages': must be 1 to "):
            llm.chat([[]], use_tqdm=False)
        with pytest.raises(ValidationError, match=r"^messages='0 messages': must be 1 to "):
            next(llm.stream_chat([]))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ([], "prompt_token_ids"),
        ([1, -1], "prompt_token_ids"),
        ([1, 257], "prompt_token_ids"),
        ([1, 2**32], "prompt_token_ids"),
        ([1, 2.5], "prompt_token_ids"),
        ([True], "prompt_token_ids"),
        ("bad \ud800 surrogate", "prompt"),
        ({"text": "x"}, "prompt"),
        (b"bytes", "prompt"),
        (None, "prompt"),
        ([np.array([1, 2])], "prompt_token_ids"),
        ([np.bool_(True)], "prompt_token_ids"),
        ([7] * 512, "prompt_token_ids"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids"),
        ({"prompt_token_ids": {5: 1}}, "prompt"),
        ({1, 2}, "prompt"),
        (bytearray(b"ab"), "prompt"),
        (memoryview(b"ab"), "prompt"),
    ],
)
def test_bad_prompts_name_the_field_and_hurt_nobody(prompt: object, field: str) -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        with pytest.raises(ValidationError) as caught:
            llm.generate([prompt], use_tqdm=False)  # type: ignore[list-item]
        assert caught.value.field == field
        good = llm.generate([[1]], SamplingParams(max_tokens=3, seed=0), use_tqdm=False)[0]
        assert good.outputs[0].token_ids == expected_tokens([1], 0, 3, 256)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, 5, "x", SamplingParams, [None]])
def test_what_are_no_parameters_is_refused(params: Any) -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        for call in (
            lambda: llm.generate([[1]], params, use_tqdm=False),
            lambda: next(llm.stream([1], params)),
            lambda: llm.chat([{"role": "user", "content": "x"}], params, use_tqdm=False),
        ):
            with pytest.raises(ValidationError, match=r"^sampling_params=.*: must be SamplingParams$"):
                call()


def test_sets_have_no_order_so_they_are_no_list_of_prompts() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm, pytest.raises(ValidationError, match=r"^prompts=\{'a'\}: must be a"):
        llm.generate({"a"}, use_tqdm=False)  # type: ignore[arg-type]


def test_a_request_that_cannot_be_followed_is_its_callers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made ready on its caller's thread: the engine does not hear of it."""
    engine, _ = make_engine()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no detokenizer")

    with LLM.from_engine(engine) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.tokenizer), "stream", broken)
            with pytest.raises(RuntimeError, match="no detokenizer"):
                llm.generate([[1]], use_tqdm=False)
        good = llm.generate([[1]], SamplingParams(max_tokens=3, seed=0), use_tqdm=False)[0]
        assert good.outputs[0].token_ids == expected_tokens([1], 0, 3, 256)
        assert engine.loop.num_alive == 0


def test_a_prompt_too_long_is_a_capacity_error() -> None:
    engine, _ = make_engine(num_pages=9)
    with LLM.from_engine(engine) as llm:
        with pytest.raises(CapacityError, match="at most 31 tokens"):
            llm.generate([[1] * 32], use_tqdm=False)
        output = llm.generate([[1] * 30], SamplingParams(max_tokens=100), use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 2, "the context is full: finish by length"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        longest = "x" * (511 * len("<end>"))  # no token is longer, and 511 leave room for one more
        with pytest.raises(CapacityError, match=r"^prompt_token_ids='<2555 tokens>': must have at most 511"):
            llm.generate(longest, use_tqdm=False)
        monkeypatch.setattr(engine.tokenizer, "encode", None)
        reason = "must have at most 511 tokens here, and has at least 512"
        with pytest.raises(CapacityError, match=f"^prompt='<2556 characters>': {reason}"):
            llm.generate(longest + "x", use_tqdm=False)
        with pytest.raises(
            CapacityError, match=r"^messages='<\d+ characters>': must have at most 511 tokens"
        ):
            llm.chat([{"role": "user", "content": longest}], use_tqdm=False)


@pytest.mark.parametrize("bad", rows(SAMPLING))
def test_bad_parameters_name_the_field(bad: Bad) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**bad.options)
    assert (str(caught.value), caught.value.field) == (bad.message, bad.field)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": np.bool_(True)}, "top_k"),
        ({"top_k": np.array([1, 2])}, "top_k"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 10**4}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": list(range(10**5))}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output"),
        ({"skip_special_tokens": np.array([1, 2])}, "skip_special_tokens"),
    ],
)
def test_what_only_python_can_say_is_refused_by_name(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}=")


@pytest.mark.parametrize("options", [{"stop_token_ids": [257]}, {"logit_bias": {257: 1.0}}])
def test_ids_are_bounded_by_the_width_of_the_logits(options: dict[str, object]) -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm, pytest.raises(ValidationError, match=r"\[0, 256\]"):
        llm.generate("x", SamplingParams(**options), use_tqdm=False)  # type: ignore[arg-type]


def test_queue_full_leaves_nothing_behind() -> None:
    engine, _ = make_engine(max_alive=4, delay_s=0.005)
    with LLM.from_engine(engine) as llm:
        with pytest.raises(QueueFullError):
            llm.generate([[1]] * 5, SamplingParams(max_tokens=50), use_tqdm=False)
        assert llm.stats()["num_used_pages"] == 0
        assert len(llm.generate([[1]] * 4, SamplingParams(max_tokens=5), use_tqdm=False)) == 4


def test_interrupt_keeps_what_is_done_and_the_engine() -> None:
    engine, executor = make_engine(delay_s=0.002)
    with LLM.from_engine(engine) as llm:
        params = [SamplingParams(max_tokens=n, seed=1, ignore_eos=True) for n in (2, 480)]
        main = threading.get_ident()
        assert main == threading.main_thread().ident, "signals interrupt the main thread only"
        timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        with pytest.raises(InterruptedGenerationError, match="1 of 2 prompts were finished") as caught:
            llm.generate([[1], [2]], params, use_tqdm=False)
        timer.join()
        executor.delay_s = 0.0
        done, aborted = caught.value.partial
        assert done is not None
        assert aborted is not None
        assert done.outputs[0].token_ids == expected_tokens([1], 1, 2, 256)
        assert aborted.outputs[0].finish_reason is FinishReason.ABORT
        assert aborted.outputs[0].token_ids, "what was generated is kept"
        assert llm.stats()["num_used_pages"] == 0
        again = llm.generate([[3]], SamplingParams(max_tokens=4, seed=2), use_tqdm=False)[0]
        assert again.outputs[0].token_ids == expected_tokens([3], 2, 4, 256)


def test_works_under_a_running_event_loop() -> None:
    engine, _ = make_engine()

    async def notebook_cell() -> list[int]:
        with LLM.from_engine(engine) as llm:
            return (
                llm.generate([[1]], SamplingParams(max_tokens=3, seed=0), use_tqdm=False)[0]
                .outputs[0]
                .token_ids
            )

    assert asyncio.run(notebook_cell()) == expected_tokens([1], 0, 3, 256)


def test_close_ends_callers_and_the_thread() -> None:
    engine, _ = make_engine(delay_s=0.002)
    llm = LLM.from_engine(engine)
    stream = llm.stream([1], SamplingParams(max_tokens=400))
    next(stream)
    llm.close()
    last = list(stream)[-1]
    assert last.outputs[0].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineClosedError):
        llm.generate([[1]], use_tqdm=False)
    llm.close()
    assert not any(thread.name == "jaxserve-engine" and thread.is_alive() for thread in threading.enumerate())


def test_a_broken_executor_is_heard_of() -> None:
    engine, _ = make_engine(fails_at=3)
    with LLM.from_engine(engine) as llm:
        output = llm.generate([[1]], SamplingParams(max_tokens=50), use_tqdm=False)[0].outputs[0]
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None
        assert "the device is gone" in output.error
        with pytest.raises(EngineClosedError, match="the device is gone"):
            llm.generate([[1]], use_tqdm=False)


def test_a_broken_scheduler_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(delay_s=0.005)

    def broken(*_: object) -> None:
        raise RuntimeError("lost count")

    with LLM.from_engine(engine) as llm:
        stream = llm.stream([1], SamplingParams(max_tokens=400))
        next(stream)
        monkeypatch.setattr(engine.loop.core, "stop", broken)
        monkeypatch.setattr(engine.loop.core.scheduler, "schedule", broken)
        last = list(stream)[-1].outputs[0]
        assert (last.finish_reason, last.error) == (
            FinishReason.ERROR,
            "the engine failed: RuntimeError: lost count",
        )


def test_an_engine_that_cannot_take_a_request_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()

    def broken(*_: object) -> None:
        raise RuntimeError("lost count")

    with LLM.from_engine(engine) as llm:
        monkeypatch.setattr(engine.loop.core, "add", broken)
        output = llm.generate([[1]], use_tqdm=False)[0].outputs[0]
        assert (output.finish_reason, output.error) == (
            FinishReason.ERROR,
            "the engine failed: RuntimeError: lost count",
        )


def test_what_was_checked_cannot_be_changed() -> None:
    bias, ends = {1: 1.0}, [3]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ends)
    bias[-7] = 1e9
    ends.append(-1)
    assert (params.logit_bias, params.stop_token_ids) == ({1: 1.0}, (3,))


def test_reprs_say_what_it_is() -> None:
    engine, _ = make_engine(script=b"hello")
    with LLM.from_engine(engine) as llm:
        assert repr(llm) == "LLM(model=fake, slots=8)"
        assert "<td>slots</td><td>8</td>" in llm._repr_html_()
        output = llm.generate("x", SamplingParams(max_tokens=5), use_tqdm=False)[0]
        assert "'hello' (5 tokens, length)" in repr(output)
        assert "hello *(5 tokens, length)*" in output._repr_markdown_()


def test_stages_are_timed() -> None:
    engine, _ = make_engine()
    with LLM.from_engine(engine) as llm:
        llm.generate([[1]] * 3, SamplingParams(max_tokens=20, ignore_eos=True), use_tqdm=False)
        stages = llm.stats()["stage_ms_per_step"]
        assert list(stages) == ["predict", "schedule", "prepare", "execute", "post_process", "learn"]
        assert all(stages[stage] > 0 for stage in stages)
