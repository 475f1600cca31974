"""A packed KV cache, as TPUs have it for heads of 64, gives the same tokens as one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.platforms.cpu import Cpu
from tests.support.tiny_checkpoint import write_tiny_checkpoint


def answers(checkpoint: Path, tensor_parallel_size: int) -> list[list[int]]:
    options = {"dtype": "float32", "max_num_seqs": 3, "row_buckets": (3,), "token_buckets": (16,)}
    with LLM(
        str(checkpoint),
        **options,
        max_num_batched_tokens=16,
        num_pages=40,
        max_model_len=64,
        tensor_parallel_size=tensor_parallel_size,
        compile_cache=False,
        use_tqdm=False,
    ) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(["ab", "x" * 30, "q"], params)]


@pytest.mark.parametrize("tensor_parallel_size", [2])
def test_tokens_do_not_depend_on_packing(
    tensor_parallel_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    want = answers(checkpoint, tensor_parallel_size)
    asked: list[tuple[int, int]] = []

    def packs(self, num_kv_heads, head_dim, dtype) -> bool:
        asked.append((num_kv_heads, head_dim))
        return True

    monkeypatch.setattr(Cpu, "packs_kv", packs)
    assert answers(checkpoint, tensor_parallel_size) == want
    assert asked == [(4 // tensor_parallel_size, 16)]
