"""How many pages an engine gets, of a device whose memory is made up."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import Tpu
from jaxserve.runner.ahead_of_time import plan_engine
from jaxserve.runner.resolve import ResolvedConfig
from jaxserve.runner.slots import empty_slots
from tests.support.tiny_checkpoint import TINY_CONFIG

MIB = 2**20


def resolved_with(memory: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ResolvedConfig:
    monkeypatch.setattr(Tpu, "cache_bytes", lambda self, fraction, device, reserve: memory - reserve)
    hf = TINY_CONFIG | {"max_position_embeddings": 131072}
    config = EngineConfig.from_flat({"max_num_seqs": 256, "page_size": 16, **options})
    return plan_engine(config, find_family(hf).config_from_hf(hf), jax.devices(), Tpu)[1]


def test_slots_take_their_memory_from_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 1000 * MIB
    short, long = (resolved_with(memory, monkeypatch, max_model_len=n) for n in (8192, 65536))
    assert long.max_model_len == 65536, "slots could use more pages than there are"

    def of_slots(each: ResolvedConfig) -> int:
        slots = empty_slots(each.num_slots, each.max_model_len, each.layout.page_size)
        return sum(array.nbytes for array in jax.tree.leaves(slots))

    def of_pages(each: ResolvedConfig) -> int:
        return each.num_pages * each.layout.bytes_per_page() * TINY_CONFIG["num_hidden_layers"]

    histories = 2 * 4 * 256 * (65536 - 8192)  # of a step's rows, twice
    lost = of_slots(long) - of_slots(short) + histories
    assert of_pages(short) - of_pages(long) == pytest.approx(lost, abs=0.1 * MIB)


def test_a_small_memory_need_not_hold_slots_of_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which alone would take 384 MiB: requests can be no longer than all pages."""
    resolved = resolved_with(128 * MIB, monkeypatch)
    assert 1000 < resolved.max_model_len == (resolved.num_pages - 1) * 16 < 131072
