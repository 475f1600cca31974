"""Cloud TPUs."""

from __future__ import annotations

from typing import final

import jax

from jaxserve.platforms.gpu import device_memory_left


@final
class Tpu:
    """TPU chips through libtpu."""

    name = "tpu"
    default_dtype = "bfloat16"
    default_max_num_seqs = 128
    default_token_budget = 2048
    slow_first_run = True
    smallest_rows = 8  # the sublanes of a vector register: fewer rows cost the same
    pairs_single_rows = False

    def cache_bytes(self, memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
        return device_memory_left(memory_fraction, device, reserve_bytes)
