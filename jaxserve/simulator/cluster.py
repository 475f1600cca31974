"""What is simulated: devices, a model on them, and the engines that this makes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxserve.config import SchedulerConfig
from jaxserve.core.assembly import Assembly
from jaxserve.core.buckets import (
    BucketLadder,
    check_decode_steps,
    default_decode_rows,
    default_mixed_tokens,
)
from jaxserve.core.cost_model import StepCost
from jaxserve.core.resume_costs import HostTier, pages_of_a_block
from jaxserve.core.roofline import DeviceProfile, ModelShape, Roofline, model_shape
from jaxserve.errors import ConfigError
from jaxserve.simulator.executor import StepTimes
from jaxserve.simulator.profiles import load_profile

_CLUSTER = re.compile(r"(?:(\d+)x)?([\w.-]+)")
_MEMORY_SHARE = 0.9
_STEP_BYTES = 2e9  # a device's room for activations
_WEIGHT_SHARE = 0.5  # most of a device's memory that weights may take where it is left open


def _option(default: Any, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": description})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The machine; every field is a flag of `jaxserve simulate`."""

    cluster: str = _option(
        "1xH100", "devices, e.g. 4xH200 (H100, H200, TPU-v5e, TPU-v6e, or a calibrated profile)"
    )
    profiles: Path | None = _option(None, "folder with calibrated profiles (bench/calibrate.py)")
    model: str = _option("llama-3-8b", "shape on them (llama-3-8b, llama-3-70b, llama-3.2-1b, smollm2-135m)")
    tensor_parallel_size: int | None = _option(
        None, "devices of one engine; default: as few as leave half of their memory to KV"
    )
    page_size: int = _option(16, "tokens in a KV page")
    num_pages: int | None = _option(None, "KV pages of one engine; default: as many as fit")
    row_buckets: tuple[int, ...] | None = _option(None, "row counts compiled for pure decode steps")
    token_buckets: tuple[int, ...] | None = _option(None, "token counts compiled for steps with prefill")
    watermark: float = _option(0.01, "share of the pages that admission leaves to running requests")
    host_kv_bytes: int = _option(
        0, "bytes of host memory for KV pages of preempted requests and cold prefixes, an engine"
    )
    enable_prefix_caching: bool = _option(
        True, "keep the pages of finished requests; hits need a trace with block hashes"
    )
    enable_prefix_preloading: bool = _option(
        False,
        "keep what conversations leave, and load it from the host, for as long as the next turn is likely",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """Equal engines, each on devices of its own.

    Attributes:
        assembly: of each engine's scheduler.
        prior: of the cost model that its policies look at.
        times: of its steps.
        label: what the numbers of this cluster are, in words.
    """

    num_engines: int
    assembly: Assembly
    prior: StepCost
    times: StepTimes
    label: str


def make_cluster(config: ClusterConfig, scheduler: SchedulerConfig) -> Cluster:
    """Sizes the engines. Raises ConfigError for what does not exist or does not fit."""
    match = _CLUSTER.fullmatch(config.cluster)
    if match is None:
        raise ConfigError(f"cluster={config.cluster!r}: must look like 4xH200")
    count, known = int(match[1] or 1), load_profile(match[2], config.profiles)
    profile = known.device
    shape = model_shape(config.model)
    each = config.tensor_parallel_size or _fewest_devices(profile, shape)
    if each < 1 or count < 1 or count % each:
        raise ConfigError(f"cluster={config.cluster!r}: {count} devices are not engines of {each}")
    slots = scheduler.max_num_seqs or 256
    budget = scheduler.max_num_batched_tokens or max(2048, 2 * slots)
    if budget <= slots:
        raise ConfigError(f"max_num_batched_tokens={budget}: must exceed max_num_seqs={slots}")
    num_pages = config.num_pages or _pages(profile, shape, each, config.page_size)
    ladder = BucketLadder(
        config.row_buckets or default_decode_rows(slots, 1),
        config.token_buckets or default_mixed_tokens(budget, slots),
        slots,
        scheduler.max_decode_steps,
    )
    check_decode_steps(ladder.decode_steps, config.page_size)
    if ladder.decode_rows[-1] < slots or ladder.mixed_tokens[0] <= slots:
        raise ConfigError(f"row_buckets must reach max_num_seqs={slots}, and token_buckets exceed it")
    assembly = Assembly(
        scheduler=scheduler,
        ladder=ladder,
        num_slots=slots,
        num_pages=num_pages,
        page_size=config.page_size,
        watermark_pages=int(config.watermark * num_pages),
        max_queued_requests=2**31,
        prefix_caching=config.enable_prefix_caching,
        prefix_preloading=config.enable_prefix_preloading,
        host=_host_tier(config, profile, shape, each),
    )
    roofline = Roofline(profile, shape, each)
    times, evidence = known.step_times(roofline)
    label = f"simulated ({evidence}): {shape.name} on {count // each} x TP{each} {profile.name}"
    return Cluster(count // each, assembly, roofline, times, label)


def _fewest_devices(profile: DeviceProfile, shape: ModelShape) -> int:
    each = 1
    while shape.weight_bytes / each > _WEIGHT_SHARE * profile.memory_bytes:
        each *= 2
    return each


def _pages(profile: DeviceProfile, shape: ModelShape, each: int, page_size: int) -> int:
    usable = each * (_MEMORY_SHARE * profile.memory_bytes - _STEP_BYTES) - shape.weight_bytes
    pages = int(usable // (page_size * shape.kv_bytes_per_token))
    if pages < 2:
        raise ConfigError(f"model={shape.name!r}: does not fit on {each} x {profile.name}")
    return pages


def _host_tier(config: ClusterConfig, profile: DeviceProfile, shape: ModelShape, each: int) -> HostTier:
    """Every device copies its own heads."""
    page_bytes = int(config.page_size * shape.kv_bytes_per_token)
    pages = pages_of_a_block(page_bytes)
    num_blocks = config.host_kv_bytes // (pages * page_bytes)
    return HostTier(num_blocks, pages, pages * page_bytes, each * profile.host_bytes_s)
