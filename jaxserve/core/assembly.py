"""Puts a scheduler together; the one place where engine, simulator, benches and tests do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.config import SchedulerConfig
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.kv_cache_manager import KVCacheManager
from jaxserve.core.page_pool import PagePool
from jaxserve.core.plan import Bucket
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
        host: memory for the pages of preempted requests.
    """

    scheduler: SchedulerConfig
    ladder: BucketLadder
    num_slots: int
    num_pages: int
    page_size: int
    watermark_pages: int
    max_queued_requests: int
    prefix_caching: bool
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
    pool = PagePool(assembly.num_pages)
    cache = PrefixCache(pool, assembly.page_size, _chunk_seconds(assembly.ladder, costs))
    kv = KVCacheManager(pool, assembly.page_size, cache if assembly.prefix_caching else None)
    ladder, host = assembly.ladder, assembly.host
    resume = ResumeCosts(costs, ladder.token_budget, ladder.mixed_rows, assembly.page_size, host)
    context = PolicyContext(
        config=assembly.scheduler,
        num_slots=assembly.num_slots,
        token_budget=ladder.token_budget,
        chunk_sizes=ladder.mixed_tokens,
        costs=costs,
        resume=resume,
        page_size=assembly.page_size,
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
        swap=SwapSpace(host, assembly.page_size, resume),
        decision_log=decision_log,
    )


def _chunk_seconds(ladder: BucketLadder, costs: CostModel) -> Callable[[int], float]:
    """Seconds of a step that computes the largest chunk of a prompt, by the tokens of context before it."""
    bucket = Bucket(ladder.token_budget, ladder.mixed_rows)
    nothing = StepFeatures(0, 0, 0.0, 0)
    return lambda context: costs.predict(bucket, nothing.with_prefill(ladder.token_budget, context))
