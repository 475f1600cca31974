"""Cloud TPUs: the facts of each generation, and defaults."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax

from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu import best_order
from jaxserve.platforms.gpu import device_memory_left

_GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpuChip:
    """One generation, counted per JAX device (a chip; on tpu7x one of a chip's two cores).

    Attributes:
        name: as topologies are named: ``v6e`` in ``v6e:2x4``.
        device_kind: as JAX names it.
        hbm_bytes: memory for programs, by the compiler's own message; what is printed on the chip is more.
        hbm_bandwidth: bytes per second.
        bf16_flops: per second.
        int8_ops: per second; 0 where the matrix units have none.
        vmem_bytes: vector memory of one core.
        cores: that share the device's memory.
        link_bandwidth: bytes per second out of a device over all its links to other chips.
        host_topology: the smallest that one host has; topologies come in whole hosts.
    """

    name: str
    device_kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    int8_ops: float
    vmem_bytes: int
    cores: int
    link_bandwidth: float
    host_topology: str


# HBM: the compiler's message for a program that does not fit. Speeds and VMEM: `jax.experimental.pallas.tpu`
# `get_tpu_info`. Links: Google's system architecture pages (total interconnect bandwidth of a chip).
CHIPS = {
    chip.name: chip
    for chip in (
        TpuChip(
            name="v5e",
            device_kind="TPU v5 lite",
            hbm_bytes=int(15.75 * _GIB),
            hbm_bandwidth=0.82e12,
            bf16_flops=197e12,
            int8_ops=394e12,
            vmem_bytes=128 * 2**20,
            cores=1,
            link_bandwidth=200e9,
            host_topology="2x2",
        ),
        TpuChip(
            name="v5p",
            device_kind="TPU v5",
            hbm_bytes=int(95.73 * _GIB),
            hbm_bandwidth=2.46e12,
            bf16_flops=459e12,
            int8_ops=918e12,
            vmem_bytes=64 * 2**20,
            cores=2,
            link_bandwidth=600e9,
            host_topology="2x2x1",
        ),
        TpuChip(
            name="v6e",
            device_kind="TPU v6 lite",
            hbm_bytes=int(31.24 * _GIB),
            hbm_bandwidth=1.64e12,
            bf16_flops=920e12,
            int8_ops=1840e12,
            vmem_bytes=128 * 2**20,
            cores=1,
            link_bandwidth=400e9,
            host_topology="2x2",
        ),
        TpuChip(
            name="tpu7x",
            device_kind="TPU7x",
            hbm_bytes=int(94.74 * _GIB),
            hbm_bandwidth=3.7e12,
            bf16_flops=1155e12,
            int8_ops=0.0,
            vmem_bytes=64 * 2**20,
            cores=1,
            link_bandwidth=600e9,
            host_topology="2x2x1",
        ),
    )
}


@final
class Tpu:
    """TPU chips through libtpu.

    Args:
        planned_bytes: bytes that the weights take on one device, for a plan that is made without the device;
            None asks the device what is free.
    """

    name = "tpu"
    default_dtype = "bfloat16"
    default_max_num_seqs = 128
    default_token_budget = 2048
    default_page_size = 128  # one copy a page: large ones, and few of them in scalar memory
    slow_first_run = True
    smallest_rows = 8  # the sublanes of a vector register: fewer rows cost the same
    pairs_single_rows = False
    branches_on_host = False

    def __init__(self, planned_bytes: int | None = None) -> None:
        self._planned_bytes = planned_bytes

    def order_kv(self, layout: KVLayout) -> KVLayout:
        try:
            return best_order(layout)
        except ValueError:
            return layout  # the kernel refuses it and says why; XLA takes any order

    def cache_bytes(self, memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
        if self._planned_bytes is None:
            return device_memory_left(memory_fraction, device, reserve_bytes)
        limit = chip_of(device).hbm_bytes
        return int(limit * memory_fraction) - self._planned_bytes - reserve_bytes


def chip_of(device: Any) -> TpuChip:
    """The generation of a device, or of one of a topology.

    Raises:
        ConfigError: if it is none that is known.
    """
    for chip in CHIPS.values():
        if chip.device_kind == device.device_kind:
            return chip
    known = ", ".join(chip.device_kind for chip in CHIPS.values())
    raise ConfigError(f"device_kind={device.device_kind!r}: must be one of {known}")


def topology_devices(topology: str) -> list[Any]:
    """The devices of a topology such as ``v6e:2x4``, for compiling without having them; needs libtpu.

    Raises:
        ConfigError: for an unknown generation, a topology that is not of whole hosts, or without libtpu.
    """
    from jax.experimental import topologies

    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"topology={topology!r}: must begin with one of {', '.join(CHIPS)}")
    shape = shape or CHIPS[name].host_topology
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}")
    except Exception as error:  # noqa: BLE001 -- libtpu raises whatever it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"topology={topology!r}: libtpu does not take it ({reason}); whole hosts only, such as "
            + ", ".join(f"{chip.name}:{chip.host_topology}" for chip in CHIPS.values())
        ) from None
    return list(found.devices)
