"""Whole engine steps through the real TPU compiler, on one chip and cut over several."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.core.plan import Bucket
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import CHIPS, Tpu, TpuChip
from jaxserve.runner.ahead_of_time import (
    Collective,
    PlannedModel,
    StepReport,
    compile_steps,
    plan_engine,
    report_step,
)
from jaxserve.runner.resolve import ResolvedConfig
from tests.support.tpu_compiler import devices, needs_libtpu

pytestmark = [needs_libtpu, pytest.mark.timeout(600)]

# Two layers with a small vocabulary compile in seconds; everything else has the size that is served.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MODELS = {"8b": LLAMA_8B, "1b": LLAMA_1B}
NUM_LAYERS = 2
ROWS = 64
SIZES: dict[str, Any] = {"max_num_seqs": ROWS, "row_buckets": (ROWS,), "token_buckets": (512,)}
MEMORY_FRACTION = EngineConfig().cache.memory_fraction
BUCKETS = {"decode": Bucket(ROWS, ROWS), "loop": Bucket(ROWS, ROWS, 8), "mixed": Bucket(512, ROWS)}
TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4"},
    "tpu7x": {1: "tpu7x:2x2x1", 4: "tpu7x:2x2x1", 8: "tpu7x:2x2x1"},  # two devices a chip
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of an engine on some devices of a generation."""

    model: str
    generation: str
    num_devices: int
    step: str
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        return f"{self.model}-{self.num_devices}x{self.generation}-{self.step}-{self.kv_cache_dtype}"

    @property
    def bucket(self) -> Bucket:
        return BUCKETS[self.step]

    @property
    def chip(self) -> TpuChip:
        return CHIPS[self.generation]


IN_CI = [
    Case("8b", "v6e", 1, "mixed"),
    Case("8b", "v6e", 1, "loop"),
    Case("1b", "v6e", 1, "mixed"),
    Case("1b", "v6e", 1, "loop"),
    Case("8b", "v6e", 8, "mixed"),
    Case("8b", "v6e", 8, "loop"),
    Case("1b", "v6e", 8, "mixed"),
    Case("1b", "v6e", 8, "loop"),
    Case("8b", "v6e", 8, "decode", "int8"),  # one head a device: folded pages
]
EVERY = [
    Case(model, generation, num_devices, step)
    for model, generation, num_devices, step in itertools.product(MODELS, TOPOLOGIES, (1, 4, 8), BUCKETS)
    if (model, generation, num_devices) != ("8b", "v5e", 1)  # all its layers do not fit
]
CASES = [
    *(pytest.param(case, id=str(case)) for case in IN_CI),
    *(pytest.param(case, id=str(case), marks=pytest.mark.nightly) for case in EVERY if case not in IN_CI),
]


class Compiled(NamedTuple):
    """A step, and what was planned for it."""

    report: StepReport
    planned: PlannedModel
    resolved: ResolvedConfig


@functools.cache
def compiled(case: Case, num_pages: int | None = None) -> Compiled:
    """With the pages that the engine chooses, or others."""
    options = SIZES | {
        "attention": "mosaic_tpu",
        "tensor_parallel_size": case.num_devices,
        "kv_cache_dtype": case.kv_cache_dtype,
        "max_decode_steps": BUCKETS["loop"].decode_steps,
        "num_pages": num_pages,
    }
    topology = TOPOLOGIES[case.generation][case.num_devices]
    return compile_one(MODELS[case.model], topology, case.bucket, options)


def compile_one(hf: dict[str, Any], topology: str, bucket: Bucket, options: dict[str, Any]) -> Compiled:
    """One step of an engine with some options."""
    config = EngineConfig.from_flat(options)
    planned, resolved = plan_engine(config, find_family(hf).config_from_hf(hf), list(devices(topology)), Tpu)
    programs = compile_steps(config, planned, resolved, [bucket])
    return Compiled(report_step(bucket, programs.step(bucket), planned, resolved, 0.0), planned, resolved)


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_sound(case: Case) -> None:
    """All that is claimed of a step, in one test: compiling it takes much longer than looking at it."""
    step = compiled(case)
    # A loop has the kernels of one step: its body is compiled once.
    assert step.report.custom_calls["tpu_custom_call"] == NUM_LAYERS
    assert step.report.host_transfers == 0
    check_in_place(step, case)
    assert step.report.collectives == expected_collectives(case)
    check_memory(step, case)


def check_in_place(step: Compiled, case: Case) -> None:
    """Each donated array, of caches and slots, is written over; no layer's cache is copied or gathered."""
    report, _, resolved = step
    assert report.lost_donations == 0
    assert report.cache_copies == 0
    token_ids = 4 * ROWS * (resolved.max_model_len + 1)  # the largest array of the slots
    assert report.aliased_bytes >= cache_bytes(step, case) + token_ids


def cache_bytes(step: Compiled, case: Case) -> int:
    """Of all pages, on one device."""
    return NUM_LAYERS * step.resolved.num_pages * step.resolved.layout.bytes_per_page() // case.num_devices


def expected_collectives(case: Case) -> collections.Counter[Collective]:
    """All that devices say to each other in a step, by the bytes of a result; a loop's body counts once.

    The vocabulary is cut over devices, so the sampler talks of each row; some of it in branches that a step
    takes only if a row wants it.
    """
    if case.num_devices == 1:
        return collections.Counter()
    activations = case.bucket.tokens * MODELS[case.model]["hidden_size"] * 2
    row, of_each_device = 4 * ROWS, 4 * ROWS * case.num_devices
    reports = case.bucket.decode_steps == 1  # log-probabilities: a loop has none
    return collections.Counter(
        {
            # After attention and after the feed-forward layer, and for the embedding.
            Collective("all-reduce", activations): 2 * NUM_LAYERS + 1,
            # Each device's best, and which that is.
            Collective("all-gather", of_each_device): 10,
            # The block of 128 logits that has the best.
            Collective("all-reduce", 128 * row): 3,
            # One number a row, and two.
            Collective("all-reduce", row): 4 if reports else 2,
            Collective("all-reduce", 2 * row): 2 if reports else 1,
        }
        # Each device's best 20, and which those are.
        | ({Collective("all-gather", 20 * of_each_device): 2} if reports else {})
    )


def check_memory(step: Compiled, case: Case) -> None:
    """It keeps to the share that was planned; where memory limited the pages, twice as many would not fit."""
    report, planned, resolved = step
    needed = report.argument_bytes + report.temporary_bytes
    assert report.argument_bytes >= cache_bytes(step, case) + planned.bytes_per_device
    assert needed <= MEMORY_FRACTION * case.chip.hbm_bytes
    if is_limited_by_memory(resolved):
        assert needed + cache_bytes(step, case) > case.chip.hbm_bytes
    else:
        assert case.num_devices > 1 or case.generation in ("v5p", "tpu7x"), "these have room for all"


def is_limited_by_memory(resolved: ResolvedConfig) -> bool:
    """Whether there are fewer pages than all slots could use together, and the null page."""
    return resolved.num_pages < ROWS * (LLAMA_8B["max_position_embeddings"] // resolved.layout.page_size) + 1


def test_the_plan_counts_slots_and_what_the_sampler_needs() -> None:
    """Long histories and logits of a whole vocabulary weigh more than a decode step's layers."""
    hf = LLAMA_8B | {"vocab_size": 128256}
    rows = 128
    options = {"max_num_seqs": rows, "row_buckets": (rows,), "token_buckets": (2 * rows,)}
    report, planned, resolved = compile_one(hf, "v6e:2x2", Bucket(rows, rows), options)
    assert resolved.max_model_len == hf["max_position_embeddings"]
    pages = NUM_LAYERS * resolved.num_pages * resolved.layout.bytes_per_page()
    beside = report.argument_bytes + report.temporary_bytes - planned.bytes_per_device - pages
    assert beside > 600 * 2**20
    assert report.argument_bytes + report.temporary_bytes <= MEMORY_FRACTION * CHIPS["v6e"].hbm_bytes


def test_xla_attention_needs_no_copies_either() -> None:
    """What `auto` falls back to fits beside the pages that the engine chooses."""
    report, _, resolved = compile_one(LLAMA_8B, "v6e:2x2", BUCKETS["mixed"], SIZES | {"attention": "xla"})
    assert is_limited_by_memory(resolved)
    assert report.custom_calls["tpu_custom_call"] == 0
    assert (report.cache_copies, report.lost_donations, report.host_transfers) == (0, 0, 0)
    assert report.argument_bytes + report.temporary_bytes <= MEMORY_FRACTION * CHIPS["v6e"].hbm_bytes


@pytest.mark.nightly
def test_the_compiler_refuses_twice_the_pages() -> None:
    """What `check_memory` adds up is what the compiler finds."""
    case = Case("8b", "v6e", 1, "decode")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled(case, 2 * compiled(case).resolved.num_pages)
