"""What is known of TPUs, against JAX's own table of them."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.config import EngineConfig
from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.registry import find_family
from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.platforms.tpu import CHIPS, Tpu, chip_of, topology_devices
from jaxserve.runner.ahead_of_time import compile_steps, plan_engine
from tests.support.tiny_checkpoint import TINY_CONFIG
from tests.support.tpu_compiler import devices, lower_on_one, needs_libtpu
from tests.support.tpu_host import has_tpu

VERSIONS = {"v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}


@pytest.mark.parametrize("name", CHIPS)
def test_facts_agree_with_those_that_jax_has(name: str) -> None:
    chip = CHIPS[name]
    core = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[VERSIONS[name]], chip.cores)
    assert chip.vmem_bytes == core.vmem_capacity_bytes
    assert chip.hbm_bandwidth == pytest.approx(chip.cores * core.mem_bw_bytes_per_second, rel=1e-6)
    assert chip.bf16_flops == pytest.approx(chip.cores * core.bf16_ops_per_second, rel=1e-6)
    assert chip.int8_ops == pytest.approx(chip.cores * core.int8_ops_per_second, rel=1e-6)
    # The compiler keeps some for itself.
    assert 0.97 <= chip.hbm_bytes / (chip.cores * core.hbm_capacity_bytes) <= 1.0


@needs_libtpu
@pytest.mark.parametrize("name", CHIPS)
def test_a_device_has_the_memory_that_the_compiler_gives_a_program(name: str) -> None:
    """On v5p, whose chip is one device of two cores, the memory of both."""
    chip, there = CHIPS[name], devices(f"{name}:{CHIPS[name].host_topology}")
    assert len({tuple(device.coords) for device in there}) == len(there) // (2 if name == "tpu7x" else 1)
    memory = f"{chip.hbm_bytes / 2**30:.2f}G"
    too_large = jax.ShapeDtypeStruct((chip.hbm_bytes // 2,), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"exceeds available HBM \({memory}\)"):
        lower_on_one(name, lambda x: x + 1, too_large, donate=0).compile()


def test_a_chip_is_found_by_its_kind() -> None:
    assert chip_of(types.SimpleNamespace(device_kind="TPU v6 lite")) is CHIPS["v6e"]
    with pytest.raises(ConfigError, match=r"device_kind='TPU v4': must be one of TPU v5 lite, TPU v5, "):
        chip_of(types.SimpleNamespace(device_kind="TPU v4"))
    with pytest.raises(
        ConfigError, match=r"topology='v4:2x2x1': must begin with one of v5e, v5p, v6e, tpu7x"
    ):
        topology_devices("v4:2x2x1")


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "is_packed", "folds"),
    [
        (8, 64, "bfloat16", True, 1),
        (3, 64, "float32", True, 1),
        (8, 128, "bfloat16", False, 1),
        (1, 128, "bfloat16", False, 1),
        (1, 64, "bfloat16", True, 2),
        (8, 128, "int8", False, 1),
        (1, 128, "int8", False, 2),
        (1, 64, "int8", True, 4),
        (3, 64, "float8_e4m3fn", True, 4),
    ],
)
def test_rows_are_whole_and_words_too(
    heads: int, head_dim: int, dtype: str, is_packed: bool, folds: int
) -> None:
    layout = KVLayout(128, heads, head_dim, jnp.dtype(dtype))
    ordered = Tpu().order_kv(layout)
    assert ordered == dataclasses.replace(layout, is_packed=is_packed, folds=folds)
    _, _, rows, width = ordered.shape(1)
    assert width % 128 == 0
    assert rows * ordered.dtype.itemsize % 4 == 0
    assert ordered.bytes_per_page() == layout.bytes_per_page()


TOO_SMALL: dict[str, Any] = {"page_size": 2, "kv_cache_dtype": "int8", "num_pages": 99, "max_num_seqs": 8}


def test_pages_too_small_to_be_folded_are_left_to_xla() -> None:
    layout = KVLayout(2, 1, 64, jnp.dtype("int8"))
    assert Tpu().order_kv(layout) == layout
    config = EngineConfig.from_flat(TOO_SMALL | {"attention": "xla"})
    _, resolved = plan_engine(config, one_head_of_64(), jax.devices(), Tpu)
    assert resolved.layout == layout


def test_a_kernel_that_was_named_refuses_them_and_says_why() -> None:
    config = EngineConfig.from_flat(TOO_SMALL | {"attention": "mosaic_tpu"})
    planned, resolved = plan_engine(config, one_head_of_64(), jax.devices(), Tpu)
    refusal = "attention='mosaic_tpu': 1 kv heads of 64 int8 on a device: folds=4: must divide page_size=2"
    with pytest.raises(ConfigError, match=refusal):
        compile_steps(config, planned, resolved, [Bucket(8, 8)])


def one_head_of_64() -> DecoderConfig:
    hf = TINY_CONFIG | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    return find_family(hf).config_from_hf(hf)


@pytest.mark.parametrize(
    ("nodes", "has"),
    [([], False), (["vfio/vfio", "accel"], False), (["vfio/vfio", "vfio/3"], True), (["accel0"], True)],
)
def test_only_device_nodes_of_tpus_are_a_tpu(nodes: list[str], has: bool, tmp_path: Path) -> None:
    """Tests tell libtpu that there is none only where there is none."""
    for node in nodes:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    assert has_tpu(tmp_path) == has
