"""NVIDIA GPUs."""

from __future__ import annotations

from typing import final

import jax

from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.layout import KVLayout


@final
class Gpu:
    """CUDA devices. JAX's allocator owns a share of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION)."""

    name = "gpu"
    default_dtype = "bfloat16"
    default_max_num_seqs = 256
    default_token_budget = 2048
    default_page_size = 64  # one copy a page for each tile of the attention kernels
    slow_first_run = True
    smallest_rows = 1
    pairs_single_rows = False
    branches_on_host = True

    def order_kv(self, layout: KVLayout) -> KVLayout:
        return layout

    def cache_bytes(self, memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
        return device_memory_left(memory_fraction, device, reserve_bytes)


def device_memory_left(memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
    """Bytes that are free for us on an accelerator, by its allocator's own count.

    Raises:
        ConfigError: if the device does not say.
    """
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ConfigError(f"num_pages=None: {device.device_kind} does not report its memory; give num_pages")
    return int(stats["bytes_limit"] * memory_fraction) - stats["bytes_in_use"] - reserve_bytes
