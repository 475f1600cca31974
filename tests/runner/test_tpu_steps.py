"""Whole engine steps through the real TPU compiler, on one chip and cut over several."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.core.plan import Bucket
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import CHIPS, Tpu
from jaxserve.runner.ahead_of_time import (
    Collective,
    compile_steps,
    plan_engine,
    report_step,
)
from tests.support.tpu_compiler import devices, needs_libtpu

pytestmark = needs_libtpu

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
    "max_position_embeddings": 8192,
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
NUM_LAYERS = 2


@functools.cache
def compiled(
    model: str,
    topology: str,
    tensor_parallel_size: int,
    tokens: int,
    kv_cache_dtype: str,
    decode_steps: int = 1,
):
    """A step of 64 slots: its report, and what was planned."""
    hf: Any = {"8b": LLAMA_8B, "1b": LLAMA_1B}[model]
    config = EngineConfig.from_flat(
        {
            "tensor_parallel_size": tensor_parallel_size,
            "attention": "mosaic_tpu",
            "kv_cache_dtype": kv_cache_dtype,
            "max_num_seqs": 64,
            "row_buckets": (64,),
            "token_buckets": (512,),
            "max_decode_steps": decode_steps,
        }
    )
    planned, resolved = plan_engine(config, find_family(hf).config_from_hf(hf), list(devices(topology)), Tpu)
    bucket = Bucket(tokens, 64, decode_steps)
    programs = compile_steps(config, planned, resolved, [bucket])
    report = report_step(bucket, programs.step(bucket), planned, resolved, 0.0)
    return report, planned, resolved


LOOP = 8
CASES = [
    ("8b", "v6e:2x2", 1, 64, "auto", 1),
    ("8b", "v6e:2x2", 1, 64, "auto", LOOP),
    ("8b", "v6e:2x4", 8, 512, "auto", 1),
    ("8b", "v6e:2x4", 8, 64, "auto", LOOP),
    ("8b", "v6e:2x4", 8, 64, "int8", 1),  # one head a device: folded pages
    ("1b", "v6e:2x2", 1, 512, "auto", 1),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model", "topology", "num_devices", "tokens", "kv_cache_dtype", "decode_steps"), CASES
)
def test_a_step_keeps_its_cache_in_place(
    model: str, topology: str, num_devices: int, tokens: int, kv_cache_dtype: str, decode_steps: int
) -> None:
    """A loop has the kernels of one step: its body is compiled once, and copies nothing either."""
    report, planned, resolved = compiled(model, topology, num_devices, tokens, kv_cache_dtype, decode_steps)
    page_bytes = resolved.layout.bytes_per_page() // num_devices
    caches = NUM_LAYERS * resolved.num_pages * page_bytes
    assert report.custom_calls["tpu_custom_call"] == NUM_LAYERS
    assert report.aliased_bytes >= caches, "every donated cache is written over"
    assert report.cache_copies == 0
    assert report.host_transfers == 0
    assert report.argument_bytes >= caches + planned.bytes_per_device
    chip = CHIPS[topology.partition(":")[0]]
    assert report.argument_bytes + report.temporary_bytes <= chip.hbm_bytes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tokens", [512])
def test_a_sharded_step_talks_twice_a_layer(tokens: int) -> None:
    """After attention and the feed-forward layer, and once for the embedding; the sampler says little."""
    report, _, _ = compiled("8b", "v6e:2x4", 8, tokens, "auto")
    activations = Collective("all-reduce", tokens * LLAMA_8B["hidden_size"] * 2)
    assert report.collectives[activations] == 2 * NUM_LAYERS + 1
    rest = [collective for collective in report.collectives if collective != activations]
    assert {collective.kind for collective in rest} <= {"all-reduce", "all-gather"}
    assert max(collective.num_bytes for collective in rest) <= 64 * 8 * 20 * 4, "20 candidates of each device"


@pytest.mark.timeout(600)
def test_a_step_on_one_chip_talks_to_nobody() -> None:
    assert not compiled("8b", "v6e:2x2", 1, 64, "auto")[0].collectives


def test_pages_are_planned_from_what_is_left() -> None:
    """Memory for programs, less weights, less the step's own estimate, which must not be too small."""
    _, planned, resolved = compiled("8b", "v6e:2x2", 1, 64, "auto")
    assert planned.bytes_per_device == sum(array.size * 2 for array in planned.params.values())
    most_useful = 64 * 8192 // 128 + 1
    assert resolved.num_pages == most_useful
    limit = int(CHIPS["v6e"].hbm_bytes * 0.9)
    platform = Tpu(planned.bytes_per_device)
    left = platform.cache_bytes(0.9, devices("v6e:2x2")[0], reserve_bytes=2**20)
    assert left == limit - planned.bytes_per_device - 2**20
