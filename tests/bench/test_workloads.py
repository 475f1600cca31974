from __future__ import annotations

from pathlib import Path

import pytest

from bench.workloads import (
    DEFAULT_TRACES,
    PromptSource,
    at_once,
    conversation_workload,
    find_traces,
    read_prompts,
    scaled,
    stretched,
    synthetic_trace,
    uniform_lengths,
    uniform_workload,
    with_poisson_arrivals,
)
from jaxserve.errors import ConfigError
from jaxserve.simulator.trace import TraceRequest, read_trace


class Letters:
    """One token a character."""

    vocab_size = 300

    def encode(self, text: str, /) -> list[int]:
        return [ord(letter) for letter in text]


def test_scaling_has_a_floor() -> None:
    assert [scaled(n, 16) for n in (0, 1, 8, 16, 100)] == [1, 1, 1, 1, 6]


def test_uniform_lengths_reach_both_ends_and_repeat() -> None:
    lengths = uniform_lengths(10, 20, 500, seed=1)
    assert (min(lengths), max(lengths)) == (10, 20)
    assert lengths == uniform_lengths(10, 20, 500, seed=1) != uniform_lengths(10, 20, 500, seed=2)


def test_files_are_read(traces: Path) -> None:
    trace = read_trace(traces / "azure2023_conv.csv.gz")
    assert trace[:2] == [TraceRequest(0.0, 300, 90), TraceRequest(0.5, 4, 700)]
    assert len(trace) == 4
    assert len(read_trace(traces / "azure2023_conv.csv.gz", 3)) == 3
    prompts = read_prompts(traces / "prompts" / "gpteacher.jsonl.gz")
    assert prompts == [f"hello world number {i}" for i in range(3)]


def test_conversation_keeps_the_traces_lengths_and_pattern(traces: Path) -> None:
    prompts = PromptSource(Letters(), traces, seed=0)
    workload = conversation_workload(prompts, traces, 4, 0, prompt_scale=20, output_scale=10)
    assert workload.name == "azure-conv"
    assert [len(item.prompt_token_ids) for item in workload.items] == [15, 1, 40, 4]
    assert [item.output_tokens for item in workload.items] == [9, 70, 1, 1]
    assert (workload.longest, workload.output_tokens) == (71, 81)
    assert bytes(workload.items[0].prompt_token_ids).startswith(b"hello world num")
    faster = stretched(workload, rate=3.0)
    assert [item.arrival_s for item in faster.items] == pytest.approx([0.0, 0.125, 0.625, 1.0])
    assert {item.arrival_s for item in at_once(faster).items} == {0.0}


def test_uniform_prompts_are_real_texts_cut(traces: Path) -> None:
    workload = uniform_workload(PromptSource(Letters(), traces, 0), (2, 5), 20, 0, most_prompt_tokens=7)
    assert workload.name == "uniform-2-5"
    assert {bytes(item.prompt_token_ids) for item in workload.items} == {b"hello w"}
    assert {item.output_tokens for item in workload.items} == {2, 3, 4, 5}


def test_without_files_everything_is_synthetic_and_says_so() -> None:
    prompts = PromptSource(Letters(), None, seed=0)
    uniform = uniform_workload(prompts, (2, 5), 20, 0, most_prompt_tokens=7)
    assert uniform.name == "uniform-2-5-synthetic"
    assert len({tuple(item.prompt_token_ids) for item in uniform.items}) == 20
    assert all(1 <= len(item.prompt_token_ids) <= 7 for item in uniform.items)
    conversation = conversation_workload(prompts, None, 50, 0, prompt_scale=8, output_scale=8)
    assert conversation.name == "azure-conv-synthetic"
    assert max(max(item.prompt_token_ids) for item in conversation.items) < Letters.vocab_size


def test_synthetic_trace_resembles_the_real_one() -> None:
    trace = synthetic_trace(4000, seed=0)
    outputs = sorted(row.output_tokens for row in trace)
    assert outputs[2000] == pytest.approx(115, rel=0.1)
    assert trace[-1].arrival_s / 4000 == pytest.approx(1 / 5.89, rel=0.1)
    assert trace == synthetic_trace(4000, seed=0)


def test_poisson_arrivals_have_the_rate() -> None:
    workload = uniform_workload(PromptSource(Letters(), None, 0), (1, 2), 2000, 0, most_prompt_tokens=2)
    arrivals = [item.arrival_s for item in with_poisson_arrivals(workload, 4.0, seed=5).items]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0
    assert arrivals[-1] == pytest.approx(500.0, rel=0.1)


def test_a_missing_folder_is_an_error_only_if_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        find_traces(tmp_path / "nowhere")
    assert find_traces(tmp_path) == tmp_path
    assert find_traces(None) in (DEFAULT_TRACES, None)
