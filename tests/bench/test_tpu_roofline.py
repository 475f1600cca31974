from __future__ import annotations

import pytest

from bench.shapes import MODELS
from bench.tpu_roofline import Bound, Cost, Step, attention_cost, bound, combine, link_bytes, weight_bytes
from jaxserve.core.plan import Bucket
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import CHIPS
from jaxserve.runner.ahead_of_time import Collective, StepReport, plan_model


def planned(model: str):
    import jax

    return plan_model(find_family(MODELS[model]).config_from_hf(MODELS[model]), "bfloat16", jax.devices(), 1)


def test_layers_beyond_the_second_cost_what_it_adds() -> None:
    assert combine(Cost(10.0, 5.0, 1.0), Cost(13.0, 7.0, 1.0), 4) == Cost(19.0, 11.0, 1.0)


def test_the_8b_model_has_the_bytes_that_it_should() -> None:
    """Counted by hand: 32 layers of 218,112,000 weights, the head, norms; the other table is not read."""
    layer = 4096 * (32 + 2 * 8 + 32) * 128 + 3 * 4096 * 14336 + 2 * 4096
    assert weight_bytes(planned("llama-3.1-8b")) == 2 * (32 * layer + 4096 + 128256 * 4096)


def test_tied_tables_are_read() -> None:
    model = planned("llama-3.2-1b")
    assert weight_bytes(model) == model.bytes_per_device


def test_attention_reads_each_key_and_value_once() -> None:
    cost = attention_cost(planned("llama-3.1-8b"), Step(3, 3, 1000))
    assert cost == Cost(4 * 3 * 1000 * 32 * 128, 2 * 3 * 1000 * 8 * 128 * 2, 0.0)


def test_a_chunk_sees_itself_causally() -> None:
    cost = attention_cost(planned("llama-3.1-8b"), Step(tokens=4, rows=1, context=10))
    assert cost == Cost(4 * (7 + 8 + 9 + 10) * 32 * 128, 2 * 10 * 8 * 128 * 2, 0.0)


def test_memory_and_arithmetic_overlap_and_links_do_not() -> None:
    chip = CHIPS["v5e"]
    times = bound(Cost(197e12, 0.41e12, 100e9), chip)
    assert (times.compute_s, times.memory_s, times.link_s) == (1.0, 0.5, 0.5)
    assert (times.least_s, times.expected_s) == (1.0, 1.5)
    assert times.name == "matrix units"
    assert Bound(2.0, 1.0, 0.5).name == "memory"


def test_a_ring_passes_an_all_reduce_twice() -> None:
    report = StepReport(
        bucket=Bucket(8, 8),
        compile_s=0.0,
        argument_bytes=0,
        temporary_bytes=0,
        aliased_bytes=0,
        lost_donations=0,
        collectives={Collective("all-reduce", 800): 2, Collective("all-gather", 80): 1},
        cache_copies=0,
        host_transfers=0,
        custom_calls={},
    )
    assert link_bytes(report, 8) == pytest.approx(2 * 2 * 800 * 7 / 8 + 80 * 7 / 8)
