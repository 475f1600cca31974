"""The whole engine on a tiny model: what a request gets depends on nothing but itself."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError, ValidationError
from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.platforms.cpu import Cpu
from jaxserve.runner.compile_counter import compile_counter
from jaxserve.runner.programs import Programs
from jaxserve.runner.sampler import SamplingKind, kind_of
from tests.support.byte_tokenizer import END_ID
from tests.support.small_engine import SMALL_ENGINE

OPTIONS: dict[str, Any] = SMALL_ENGINE | {"row_buckets": (1, 3, 6), "token_buckets": (12, 32)}

# Fewer programs, for tests in which other sizes matter; a pool so small that requests are preempted.
PLAIN = SMALL_ENGINE
TIGHT: dict[str, Any] = {"num_pages": 20, "max_model_len": 128}
slow = pytest.mark.nightly


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **OPTIONS) as llm:
        yield llm


def work() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts from 1 token to three times the budget; greedy and sampled, with every parameter somewhere."""
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (1, 2, 7, 8, 9, 31, 32, 33, 64, 97)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=1.0, seed=1, max_tokens=20),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2, max_tokens=20),
        SamplingParams(temperature=1.3, top_k=5, seed=3, max_tokens=20),
        SamplingParams(temperature=1.0, min_p=0.05, seed=4, max_tokens=20),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=20),
        SamplingParams(temperature=0.9, presence_penalty=1.0, frequency_penalty=0.5, seed=5, max_tokens=20),
        SamplingParams(temperature=0.0, logit_bias={65: 100.0, 66: -100.0}, max_tokens=20),
        SamplingParams(temperature=1.0, seed=6, max_tokens=20, logprobs=3),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.8, seed=7, max_tokens=20),
    ]
    return prompts, params


def answers(llm: LLM) -> list[list[int]]:
    prompts, params = work()
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    prompts, params = work()
    return [
        llm.generate([prompt], p, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, p in zip(prompts, params, strict=True)
    ]


def test_alone_and_in_a_batch(llm: LLM, alone: list[list[int]]) -> None:
    assert answers(llm) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert alone[7] == [65] * 20, "a bias of 100 decides"


def test_steps_may_have_programs_without_branches(
    checkpoint: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[SamplingKind, Any] = {}
    step_of = Programs.step

    def spy(self: Programs, bucket: Bucket, kind: SamplingKind = SamplingKind.ANY) -> Any:
        used[kind] = step_of(self, bucket, kind)
        return used[kind]

    monkeypatch.setattr(Cpu, "branches_on_host", True)
    monkeypatch.setattr(Programs, "step", spy)
    prompts, params = work()
    with LLM(str(checkpoint), **PLAIN) as llm:
        compiles = compile_counter().count
        programs = {}
        for kind in SamplingKind:
            mine = [i for i, each in enumerate(params) if kind_of(each) == kind]
            used.clear()
            outputs = llm.generate([prompts[i] for i in mine], [params[i] for i in mine], use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == [alone[i] for i in mine]
            assert set(used) == {kind}
            programs |= used
        assert answers(llm) == alone
        assert compile_counter().count == compiles
    branches = {kind: " conditional(" in program.as_text() for kind, program in programs.items()}
    assert branches == {SamplingKind.GREEDY: False, SamplingKind.DRAWN: False, SamplingKind.ANY: True}


def test_neighbours_change_nothing(llm: LLM, alone: list[list[int]]) -> None:
    prompts, params = work()
    rng = random.Random(1)
    for _ in range(3):
        order = list(range(len(prompts)))
        rng.shuffle(order)
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order], use_tqdm=False)
        assert {i: o.outputs[0].token_ids for i, o in zip(order, outputs, strict=True)} == dict(
            enumerate(alone)
        )


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline_depth": 0},
        {"pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 8, "token_buckets": (8,)},
        pytest.param({"max_num_batched_tokens": 128, "token_buckets": (128,)}, marks=slow),
        pytest.param({"page_size": 32, "num_pages": 60}, marks=slow),
        TIGHT,
        {"attention": "reference"},
        {"batching": "static", "batch_window_s": 0.01},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},
    ],
    ids=lambda change: ",".join(f"{key}={value}" for key, value in change.items()),
)
def test_configuration_changes_no_token(
    change: dict[str, Any], checkpoint: Path, alone: list[list[int]]
) -> None:
    options: dict[str, Any] = PLAIN | change
    with LLM(str(checkpoint), **options) as llm:
        assert answers(llm) == alone
        if change.get("num_pages") == 20:
            assert llm.stats()["num_preemptions"] > 0, "this pool is meant to be too small"
        if "tensor_parallel_size" in change:
            assert len(llm.engine.description["device"]) > 0
            runner: Any = llm.engine.loop.core._executor
            cache = runner._caches[0].data
            assert len(cache.sharding.device_set) == change["tensor_parallel_size"]
            assert (
                cache.sharding.shard_shape(cache.shape)[2] == cache.shape[2] // change["tensor_parallel_size"]
            )


@pytest.fixture(scope="module", params=["int8", pytest.param("fp8", marks=slow)])
def eight_bit(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **(PLAIN | {"kv_cache_dtype": request.param})) as llm:
        yield llm


def test_an_8_bit_cache_gives_nearly_the_same_logprobs(eight_bit: LLM, llm: LLM) -> None:
    """Of the likely tokens; measured at most 0.14 with int8 and 0.70 with fp8."""
    prompts, _ = work()
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    layout = eight_bit_layout(eight_bit)
    assert layout.bytes_per_page() == 8 * 8 * (16 + 4), (
        "8 tokens, 4 keys and 4 values of 16 bytes and a scale"
    )
    most = 0.0
    runs = (each.generate(prompts, params, use_tqdm=False) for each in (eight_bit, llm))
    for got, want in zip(*runs, strict=True):
        ours, theirs = (output.outputs[0].logprobs[0] for output in (got, want))
        shared = ours.keys() & theirs.keys()
        assert len(shared) >= 10, "of the 20 likeliest of each"
        most = max(most, *(abs(ours[token].logprob - theirs[token].logprob) for token in shared))
    assert 0.001 < most < {"int8": 0.3, "float8_e4m3fn": 1.4}[str(layout.dtype)]


def test_with_an_8_bit_cache_a_request_depends_on_nothing_but_itself(
    eight_bit: LLM, checkpoint: Path
) -> None:
    """What is stored once is never rounded again: alone, in a batch, in other chunks, and preempted."""
    prompts, params = work()
    together = answers(eight_bit)
    for prompt, p, want in zip(prompts, params, together, strict=True):
        assert eight_bit.generate([prompt], p, use_tqdm=False)[0].outputs[0].token_ids == want
    layout = eight_bit_layout(eight_bit)
    change: dict[str, Any] = {
        "kv_cache_dtype": "int8" if str(layout.dtype) == "int8" else "fp8",
        **TIGHT,
    }
    with LLM(str(checkpoint), **(PLAIN | change)) as tight:
        assert answers(tight) == together
        assert tight.stats()["num_preemptions"] > 0, "this pool is meant to be too small"


def eight_bit_layout(llm: LLM) -> KVLayout:
    runner: Any = llm.engine.loop.core._executor
    return runner._caches[0].layout


def test_nothing_compiles_after_warmup(llm: LLM) -> None:
    prompts, params = work()
    before, before_here = compile_counter().count, llm.stats()["compiles_after_warmup"]
    rng = random.Random(9)
    for _ in range(6):
        count = rng.randint(1, len(prompts))
        llm.generate(prompts[:count], params[:count], use_tqdm=False)
    llm.generate(["héllo 😀"], SamplingParams(max_tokens=4, stop="zz", n=3), use_tqdm=False)
    # Other tests' engines compile in this process, too: what counts is that these requests compile nothing.
    assert llm.stats()["compiles_after_warmup"] == before_here
    assert compile_counter().count == before
    jax.jit(lambda x: x * 3 + 1)(np.arange(7)).block_until_ready()
    assert compile_counter().count > before, "the counter does count"


def test_caches_stay_where_they_are(llm: LLM) -> None:
    runner: Any = llm.engine.loop.core._executor
    before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner._caches)]
    llm.generate([[1] * 50, [2] * 3], SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner._caches)] == before


def test_preempted_requests_continue_as_if_nothing_was(checkpoint: Path, llm: LLM) -> None:
    prompts = [[i] * 20 for i in range(6)]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=60, ignore_eos=True) for i in range(6)]
    want = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    with LLM(str(checkpoint), **(PLAIN | TIGHT)) as tight:
        got = [output.outputs[0].token_ids for output in tight.generate(prompts, params, use_tqdm=False)]
        assert tight.stats()["num_preemptions"] >= 2
    assert got == want


@pytest.mark.parametrize("how", ["close", "drop"])
def test_an_engine_that_is_gone_holds_no_device_memory(how: str, checkpoint: Path) -> None:
    def live_bytes() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = live_bytes()
    llm = LLM(str(checkpoint), **PLAIN)
    llm.generate([[1, 2]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert live_bytes() > before + 2**20, "weights and pages are somewhere"
    if how == "close":
        llm.close()
    else:
        del llm
    assert live_bytes() <= before


def test_min_tokens_masks_the_end(llm: LLM) -> None:
    bias = {END_ID: 100.0}
    ends = llm.generate("x", SamplingParams(logit_bias=bias, max_tokens=9), use_tqdm=False)[0].outputs[0]
    assert ends.token_ids == [END_ID]
    assert (ends.finish_reason, ends.stop_reason, ends.text) == ("stop", END_ID, "")
    later = llm.generate("x", SamplingParams(logit_bias=bias, max_tokens=9, min_tokens=4), use_tqdm=False)[0]
    assert later.outputs[0].token_ids.index(END_ID) == 4
    ignoring = SamplingParams(logit_bias=bias, max_tokens=9, ignore_eos=True)
    assert llm.generate("x", ignoring, use_tqdm=False)[0].outputs[0].token_ids == [END_ID] * 9


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, top_k=3, seed=1, logprobs=4, max_tokens=6, ignore_eos=True)
    output = llm.generate([3, 1, 4], params, use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == 6
    for token_id, step in zip(output.token_ids, output.logprobs, strict=True):
        assert token_id in step
        ranked = sorted(step.values(), key=lambda entry: entry.rank or 0)
        assert [entry.logprob for entry in ranked] == sorted((e.logprob for e in step.values()), reverse=True)
        assert sum(np.exp(entry.logprob) for entry in step.values()) <= 1.0 + 1e-5
        assert (step[token_id].rank or 99) <= 3, "top_k=3 draws among the best three"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1024}, "max_model_len=1024: the model was made for 512"),
        ({"num_pages": 5}, "max_model_len=256"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3"),
        ({"tensor_parallel_size": 9}, "tensor_parallel_size=9"),
        ({"max_num_batched_tokens": 4, "token_buckets": None}, "max_num_batched_tokens=4: must exceed"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"page_size": 48}, "page_size=48"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4': must be one of auto, int8, fp8"),
        ({"memory_fraction": "0.5"}, "memory_fraction='0.5'"),
        ({"token_buckets": 5}, "token_buckets=5"),
        ({"watermark": float("nan")}, "watermark=nan"),
        ({"capacity": "greedy"}, "capacity='greedy': must be one of watermark, predicted"),
        ({"preempted_target": 0.0}, "preempted_target=0.0: must be a number in (0, 1]"),
        ({"demand_quantile": 1.0}, "demand_quantile=1.0: must be a number in (0, 1)"),
        (
            {"max_num_batched_tokens": 64},
            "token_buckets=(12, 32): the last must be max_num_batched_tokens=64, or one of the two be left",
        ),
        (
            {"max_num_batched_tokens": 16},
            "token_buckets=(12, 32): the last must be max_num_batched_tokens=16",
        ),
        (
            {"max_num_batched_tokens": None, "token_buckets": (6, 32)},
            "token_buckets=(6, 32): each must exceed",
        ),
    ],
)
def test_bad_configurations_say_what_is_wrong(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(checkpoint), **(OPTIONS | options))
    assert message in str(caught.value)


def test_clients_are_served_fairly_and_ids_are_checked(checkpoint: Path) -> None:
    """Twenty requests of one client wait when the other's come; in turns, those are not the last to start."""
    options: dict[str, Any] = PLAIN | {"max_num_seqs": 1, "row_buckets": (1,), "ordering": "fair"}
    with LLM(str(checkpoint), **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        make = llm.engine.inputs.from_prompt
        groups = [make([7, index], params, client="many") for index in range(20)]
        groups += [make([8, index], params, client="few") for index in range(4)]
        outputs = llm._run(groups, use_tqdm=False)
        starts = [output.metrics.first_scheduled_time or 0.0 for output in outputs]
        assert max(starts[20:]) < sorted(starts)[12]
        with pytest.raises(ValidationError, match="client="):
            llm.generate([1, 2], params, use_tqdm=False, client="a b")
