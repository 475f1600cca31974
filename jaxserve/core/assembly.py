"""Puts a scheduler together; the one place where engine, simulator, benches and tests do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.config import SchedulerConfig
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cold_prefixes import HostSide
from jaxserve.core.copy_queue import CopyQueue
from jaxserve.core.cost_model import CostModel
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.host_blocks import HostBlocks
from jaxserve.core.host_traffic import HostTraffic
from jaxserve.core.kv_cache_manager import KVCacheManager
from jaxserve.core.page_pool import PagePool
from jaxserve.core.policies.switch import PolicySwitch
from jaxserve.core.policy import PolicyContext
from jaxserve.core.prefix_cache import PrefixCache
from jaxserve.core.resume_costs import NO_HOST, HostTier, ResumeCosts
from jaxserve.core.scheduler import Scheduler
from jaxserve.core.swap import SwapSpace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a scheduler is put together from; plain values, so that a recording can hold them.

    Attributes:
        scheduler: the policies and their options.
        ladder: compiled shapes.
        num_slots: requests that run at once.
        num_pages: KV pages, the null page included.
        page_size: tokens in a page.
        watermark_pages: pages that admission leaves free.
        max_queued_requests: waiting requests beyond which new ones are refused.
        prefix_caching: whether requests with the same beginning share its pages.
        prefix_preloading: whether what conversations leave is kept and loaded for their next turn.
        host: memory for the pages of preempted requests, and for prefixes.
    """

    scheduler: SchedulerConfig
    ladder: BucketLadder
    num_slots: int
    num_pages: int
    page_size: int
    watermark_pages: int
    max_queued_requests: int
    prefix_caching: bool
    prefix_preloading: bool
    host: HostTier = NO_HOST

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Assembly:
        """The inverse of `to_json`, tuples having become lists."""
        fields: dict[str, Any] = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        ladder = fields["ladder"]
        fields["ladder"] = BucketLadder(
            tuple(ladder["decode_rows"]),
            tuple(ladder["mixed_tokens"]),
            ladder["mixed_rows"],
            ladder["decode_steps"],
        )
        fields["scheduler"] = SchedulerConfig(**fields["scheduler"])
        fields["host"] = HostTier(**fields["host"])
        return cls(**fields)


def assemble(assembly: Assembly, costs: CostModel, decision_log: DecisionLog | None = None) -> Scheduler:
    """The scheduler that an assembly describes; its policies look at ``costs``."""
    ladder, tier, page_size = assembly.ladder, assembly.host, assembly.page_size
    resume = ResumeCosts(costs, ladder.token_budget, ladder.mixed_rows, page_size, tier)
    pool, blocks, copies = PagePool(assembly.num_pages), HostBlocks(tier), CopyQueue()
    cache = None
    if assembly.prefix_caching:
        side = HostSide(tier, blocks, copies, resume) if tier.num_blocks else None
        preloads = resume if assembly.prefix_preloading else None
        cache = PrefixCache(pool, page_size, resume.chunk_s, host=side, preloads=preloads)
    kv = KVCacheManager(pool, page_size, cache)
    context = PolicyContext(
        config=assembly.scheduler,
        num_slots=assembly.num_slots,
        token_budget=ladder.token_budget,
        chunk_sizes=ladder.mixed_tokens,
        costs=costs,
        resume=resume,
        page_size=page_size,
        matched_tokens=kv.matched_tokens,
        page_occupancy=lambda: kv.occupancy,
    )
    return Scheduler(
        switch=PolicySwitch(context),
        kv=kv,
        ladder=ladder,
        num_slots=assembly.num_slots,
        watermark_pages=assembly.watermark_pages,
        max_queued_requests=assembly.max_queued_requests,
        host=HostTraffic(blocks, copies, SwapSpace(tier, page_size, resume, blocks, copies), kv.cold),
        decision_log=decision_log,
    )
