"""Host processors: for trying out, for tests, and for small models in earnest."""

from __future__ import annotations

from typing import final

import jax
import psutil

from jaxserve.pallas_kernels.layout import KVLayout

# JAX writes the whole cache once at start; more than this makes small machines wait for pages they never use.
_MOST_CACHE_BYTES = 2**30


@final
class Cpu:
    """XLA:CPU. Memory is the host's; a third of what is free is ours at most."""

    name = "cpu"
    default_dtype = "float32"
    default_max_num_seqs = 16
    default_token_budget = 256
    default_page_size = 16
    slow_first_run = False
    smallest_rows = 1
    pairs_single_rows = True
    branches_on_host = False

    def order_kv(self, layout: KVLayout) -> KVLayout:
        return layout

    def cache_bytes(self, memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
        free = int(psutil.virtual_memory().available * memory_fraction / 3) - reserve_bytes
        return min(free, _MOST_CACHE_BYTES)
