"""Block sizes of the TPU kernel, from `tuned/tpu.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.pallas_kernels.ragged_paged_attention.metadata import AttentionMetadata

# What the compiler may use for the kernel: three quarters of the vector memory of the smallest chip.
VMEM_LIMIT_BYTES = 48 * 2**20
_MOST_SLOTS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """The kernel's block sizes.

    Attributes:
        kv_pages: pages of a KV block.
        q_tokens: tokens of a query block; 1 in a pure decode step.
        depth: slots of the ring, at least 2.
        cores: that work as one device: 2 on v5p, where they share memory.
    """

    kv_pages: int
    q_tokens: int
    depth: int
    cores: int = 1


def choose_blocks(layout: KVLayout, group: int, metadata: AttentionMetadata) -> Blocks:
    """Sizes for the chip that the kernel is compiled for.

    Args:
        layout: of the cache; heads are those of one device.
        group: query rows that a key/value head has per token.
        metadata: the step's; decode steps (``max_q_len == 1``) have sizes of their own.
    """
    is_decode = metadata.max_q_len == 1
    sizes = _sizes(_chip(), "decode" if is_decode else "mixed")
    page_bytes = layout.bytes_per_page()
    wanted = min(sizes["kv_block_bytes"] // page_bytes, sizes["max_kv_tokens"] // layout.page_size)
    kv_pages = max(1, min(wanted, metadata.page_table.shape[1]))
    depth = 1 - (-sizes["bytes_in_flight"] // (kv_pages * page_bytes))
    q_tokens = 1 if is_decode else min(max(sizes["query_rows"] // group, 8), metadata.max_q_len)
    return Blocks(kv_pages, q_tokens, max(3, min(depth, _MOST_SLOTS)), _cores())


def _cores() -> int:
    return pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1


def _chip() -> str:
    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else "default"


def _sizes(chip: str, step: str) -> dict[str, int]:
    chips = _tuned()["chips"]
    return chips.get(chip, chips["default"])[step]


@functools.cache
def _tuned() -> Any:
    file = resources.files("jaxserve.pallas_kernels.ragged_paged_attention") / "tuned" / "tpu.json"
    return json.loads(file.read_text())
