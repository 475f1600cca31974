"""Fills in every ``auto`` of a configuration, once the model and the device are known."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.core.buckets import (
    BucketLadder,
    check_decode_steps,
    default_decode_rows,
    default_mixed_tokens,
)
from jaxserve.core.resume_costs import pages_of_a_block
from jaxserve.errors import ConfigError
from jaxserve.models.config import DecoderConfig
from jaxserve.pallas_kernels.layout import KVLayout
from jaxserve.platforms import Platform
from jaxserve.runner.slots import slot_bytes

_LOG = logging.getLogger(__name__)

# ``kv_cache_dtype`` -> dtype; all else is the model's.
KV_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """What the engine is really built from; nothing in it is open.

    Attributes:
        dtype: of weights and activations.
        max_model_len: prompt plus output tokens of one request.
        num_slots: requests that run at once.
        num_pages: KV pages, the null page included.
        layout: of a page.
        ladder: shapes to compile.
        watermark_pages: pages that admission leaves free.
        host_blocks: blocks of host memory for the pages of preempted requests.
        block_pages: pages of a block.
    """

    dtype: str
    max_model_len: int
    num_slots: int
    num_pages: int
    layout: KVLayout
    ladder: BucketLadder
    watermark_pages: int
    host_blocks: int = 0
    block_pages: int = 1

    @property
    def num_cache_tokens(self) -> int:
        """Tokens that all pages hold together."""
        return (self.num_pages - 1) * self.layout.page_size


def resolve_dtype(config: EngineConfig, platform: Platform) -> str:
    """The precision of weights and activations."""
    return platform.default_dtype if config.model.dtype == "auto" else config.model.dtype


def resolve(config: EngineConfig, platform: Platform, model: DecoderConfig, mesh: Mesh) -> ResolvedConfig:
    """Chooses sizes for this model on this device; call it when the weights are loaded.

    Raises:
        ConfigError: for sizes that contradict each other, or do not fit in memory.
    """
    dtype = resolve_dtype(config, platform)
    kv_dtype = KV_DTYPES.get(config.cache.kv_cache_dtype, dtype)
    num_slots = config.scheduler.max_num_seqs or platform.default_max_num_seqs
    ladder = _ladder(config, platform, num_slots)
    layout = KVLayout(
        config.cache.page_size or platform.default_page_size,
        model.num_kv_heads // mesh.size,
        model.head_dim,
        jnp.dtype(kv_dtype),
    )
    check_decode_steps(ladder.decode_steps, layout.page_size)
    layout = dataclasses.replace(platform.order_kv(layout), num_kv_heads=model.num_kv_heads)
    wanted_len = config.model.max_model_len or model.max_position_embeddings
    if wanted_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={wanted_len}: the model was made for {model.max_position_embeddings}"
        )
    page_bytes = layout.bytes_per_page() * model.num_layers // mesh.size
    num_pages = config.cache.num_pages or _affordable_pages(
        config, platform, model, mesh, ladder, layout, page_bytes, num_slots, wanted_len
    )
    max_model_len = min(wanted_len, (num_pages - 1) * layout.page_size)
    if config.model.max_model_len is not None and max_model_len < wanted_len:
        raise ConfigError(
            f"max_model_len={wanted_len}: {num_pages} KV pages hold {max_model_len} tokens; "
            "give at most that, or more num_pages or memory_fraction"
        )
    if max_model_len < min(wanted_len, layout.page_size):
        if config.cache.num_pages is not None:
            raise ConfigError(f"num_pages={num_pages}: must be at least 2, the null page and one more")
        raise ConfigError(
            f"memory_fraction={config.cache.memory_fraction}: no room for KV pages beside the weights"
        )
    all_bytes = layout.bytes_per_page() * model.num_layers
    block_pages = pages_of_a_block(all_bytes)
    host_blocks = config.cache.host_kv_bytes // (block_pages * all_bytes)
    if config.cache.host_kv_bytes and not host_blocks:
        raise ConfigError(
            f"host_kv_bytes={config.cache.host_kv_bytes}: must be 0, or at least "
            f"{block_pages * all_bytes}, a block of {block_pages} pages"
        )
    resolved = ResolvedConfig(
        dtype=dtype,
        max_model_len=max_model_len,
        num_slots=num_slots,
        num_pages=num_pages,
        layout=layout,
        ladder=ladder,
        watermark_pages=int(config.cache.watermark * num_pages),
        host_blocks=host_blocks,
        block_pages=block_pages,
    )
    _LOG.info(
        "%s on %s x %d: %d slots, %d %s pages of %d tokens (%.2f GiB), context %d, rows %s, mixed tokens %s",
        dtype,
        platform.name,
        mesh.size,
        num_slots,
        num_pages,
        layout.dtype,
        layout.page_size,
        num_pages * page_bytes * mesh.size / 2**30,
        max_model_len,
        ladder.decode_rows,
        ladder.mixed_tokens,
    )
    return resolved


def _ladder(config: EngineConfig, platform: Platform, num_slots: int) -> BucketLadder:
    runner = config.runner
    budget = config.scheduler.max_num_batched_tokens or max(platform.default_token_budget, 2 * num_slots)
    if budget <= num_slots:
        raise ConfigError(f"max_num_batched_tokens={budget}: must exceed max_num_seqs={num_slots}")
    rows = runner.row_buckets or default_decode_rows(num_slots, platform.smallest_rows)
    if rows[-1] < num_slots:
        raise ConfigError(f"row_buckets={rows}: the last must be at least max_num_seqs={num_slots}")
    tokens = runner.token_buckets or default_mixed_tokens(budget, rows[-1])
    if tokens[0] <= rows[-1]:
        raise ConfigError(f"token_buckets={tokens}: each must exceed the {rows[-1]} rows of a mixed step")
    return BucketLadder(
        decode_rows=rows,
        mixed_tokens=tokens,
        mixed_rows=rows[-1],
        decode_steps=config.scheduler.max_decode_steps,
    )


def _affordable_pages(
    config: EngineConfig,
    platform: Platform,
    model: DecoderConfig,
    mesh: Mesh,
    ladder: BucketLadder,
    layout: KVLayout,
    page_bytes: int,
    num_slots: int,
    wanted_len: int,
) -> int:
    """As many pages as fit beside everything else, or as all slots could use, and the null page."""
    device: jax.Device = mesh.devices.flat[0]
    reserve = _temporary_bytes(model, ladder, mesh.size) + num_slots * slot_bytes(0, layout.page_size)
    room = platform.cache_bytes(config.cache.memory_fraction, device, reserve)
    wanted = -(-wanted_len // layout.page_size)
    # No request has more pages than there are: with so many, slots and pages fill the room.
    history_bytes = _history_bytes(ladder, num_slots, layout.page_size)
    longest = min(wanted, max(room, 0) // (page_bytes + history_bytes))
    return max(min((room - longest * history_bytes) // page_bytes, num_slots * wanted + 1), 2)


def _temporary_bytes(model: DecoderConfig, ladder: BucketLadder, num_devices: int) -> int:
    """Upper estimate of a step's temporaries: logits, a layer's activations.

    Penalties count tokens and change logits in nine arrays of their size, as XLA:TPU compiles them.
    """
    logits = 9 * 4 * ladder.mixed_rows * model.vocab_size
    widest = (
        model.hidden_size * 6
        + (model.intermediate_size * 3 + model.num_heads * model.head_dim * 4) // num_devices
    )
    return logits + 4 * ladder.token_budget * widest


def _history_bytes(ladder: BucketLadder, num_slots: int, page_size: int) -> int:
    """What a page of context takes beside keys and values: in slots, and in two copies of a step's rows.

    Penalties want the copies.
    """
    in_a_slot = slot_bytes(page_size, page_size) - slot_bytes(0, page_size)
    return num_slots * in_a_slot + 2 * 4 * ladder.mixed_rows * page_size
