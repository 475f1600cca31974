"""What is known of TPUs, against JAX's own table of them."""

from __future__ import annotations

import types

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.errors import ConfigError
from jaxserve.platforms.tpu import CHIPS, Tpu, chip_of, topology_devices

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


def test_a_chip_is_found_by_its_kind() -> None:
    assert chip_of(types.SimpleNamespace(device_kind="TPU v6 lite")) is CHIPS["v6e"]
    with pytest.raises(ConfigError, match=r"device_kind='TPU v4': must be one of TPU v5 lite, TPU v5, "):
        chip_of(types.SimpleNamespace(device_kind="TPU v4"))
    with pytest.raises(
        ConfigError, match=r"topology='v4:2x2x1': must begin with one of v5e, v5p, v6e, tpu7x"
    ):
        topology_devices("v4:2x2x1")


def test_only_heads_that_fill_half_a_row_are_packed() -> None:
    tpu = Tpu()
    assert tpu.packs_kv(8, 64, "bfloat16")
    assert tpu.packs_kv(3, 64, "float32")
    assert not tpu.packs_kv(1, 64, "bfloat16"), "half a word"
    assert not tpu.packs_kv(8, 128, "bfloat16")
