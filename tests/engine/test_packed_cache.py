"""A packed or folded KV cache, as TPUs have them, gives the same tokens as one in plain order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.pallas_kernels.layout import KVLayout
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


@pytest.mark.slow
@pytest.mark.parametrize("folds", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_tokens_do_not_depend_on_the_caches_order(
    folds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    want = answers(checkpoint, 2)
    asked: list[tuple[int, int]] = []

    def order(self, layout: KVLayout) -> KVLayout:
        asked.append((layout.num_kv_heads, layout.head_dim))
        return dataclasses.replace(layout, is_packed=True, folds=folds)

    monkeypatch.setattr(Cpu, "order_kv", order)
    assert answers(checkpoint, 2) == want
    assert asked == [(4 // 2, 16)]
