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
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import LANES

# What the compiler may use for the kernel: three quarters of the vector memory of the smallest chip. What the
# kernel asks for by name may be three quarters of that; the rest is for the compiler's own temporaries.
VMEM_LIMIT_BYTES = 48 * 2**20
_MOST_SCRATCH_BYTES = 36 * 2**20
_MOST_SLOTS = 8
_FEWEST_QUERY_TOKENS = 8


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


def choose_blocks(layout: KVLayout, group: int, q_bytes: int, metadata: AttentionMetadata) -> Blocks:
    """Sizes for the chip that the kernel is compiled for, query blocks halved until all scratch fits.

    Args:
        layout: of the cache; heads are those of one device.
        group: query rows that a key/value head has per token.
        q_bytes: of an element of the queries.
        metadata: the step's; decode steps (``max_q_len == 1``) have sizes of their own.

    Raises:
        NotImplementedError: if even small blocks do not fit in vector memory.
    """
    is_decode = metadata.max_q_len == 1
    sizes = _sizes(_chip(), "decode" if is_decode else "mixed")
    page_bytes = layout.bytes_per_page()
    wanted = min(sizes["kv_block_bytes"] // page_bytes, sizes["max_kv_tokens"] // layout.page_size)
    kv_pages = max(1, min(wanted, metadata.page_table.shape[1]))
    depth = 1 - (-sizes["bytes_in_flight"] // (kv_pages * page_bytes))
    q_tokens = max(sizes["query_rows"] // group, 1 if is_decode else _FEWEST_QUERY_TOKENS)
    blocks = Blocks(kv_pages, min(q_tokens, metadata.max_q_len), max(3, min(depth, _MOST_SLOTS)), _cores())
    while (needed := scratch_bytes(layout, group, q_bytes, blocks)) > _MOST_SCRATCH_BYTES:
        if blocks.q_tokens <= _FEWEST_QUERY_TOKENS:
            raise NotImplementedError(
                f"{layout.num_kv_heads} kv heads of {layout.head_dim} {layout.dtype}, pages of "
                f"{layout.page_size} tokens: the smallest blocks need {needed} bytes of vector memory, there "
                f"are {_MOST_SCRATCH_BYTES}"
            )
        blocks = dataclasses.replace(blocks, q_tokens=blocks.q_tokens // 2)
    return blocks


def scratch_bytes(layout: KVLayout, group: int, q_bytes: int, blocks: Blocks) -> int:
    """Vector memory that the kernel's buffers take with these blocks; rows are filled up to whole lanes."""
    lanes = -(-layout.head_dim // LANES) * LANES
    heads, kv_tokens = layout.num_kv_heads, blocks.kv_pages * layout.page_size
    rows = heads * max(blocks.q_tokens * group, 8)
    kv_rows = 2 * heads * kv_tokens * lanes
    kv_ring = blocks.depth * kv_rows * layout.dtype.itemsize
    page_lanes = -(-layout.page_size // LANES) * LANES
    scale_ring = (
        4 * blocks.depth * blocks.kv_pages * max(2 * heads, 8) * page_lanes if layout.has_scales else 0
    )
    queries_and_outputs = (blocks.depth + 2) * rows * lanes * q_bytes
    keys_and_values = kv_rows * max(q_bytes, layout.dtype.itemsize)
    accumulators = rows * (2 * LANES + lanes) * 4
    return kv_ring + scale_ring + queries_and_outputs + keys_and_values + accumulators


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
