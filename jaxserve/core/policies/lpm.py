"""Ordering ``lpm``: longest prefix match first (SGLang, arXiv 2312.07104, section 4), with a wait cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from jaxserve.core.policies.starvation import NORMAL, PROMOTED, WaitCap
from jaxserve.core.policy import PolicyContext, SortKey
from jaxserve.request import Request

_REFRESH_S = 0.25  # what is cached changes while requests wait


@final
class LongestPrefixMatch:
    """Requests whose prompt is cached the furthest go first: they are the cheapest, and keep the cache warm.

    Args:
        matched_tokens: leading prompt tokens of a request that are in the cache.
        max_wait_s: who has waited so long goes first.
    """

    def __init__(self, matched_tokens: Callable[[Request], int], max_wait_s: float) -> None:
        self._matched_tokens = matched_tokens
        self._cap = WaitCap(max_wait_s)

    @classmethod
    def from_context(cls, context: PolicyContext) -> LongestPrefixMatch:
        return cls(context.matched_tokens, context.config.max_wait_s)

    def key(self, request: Request, now: float) -> SortKey:
        if self._cap.is_promoted(request, now):
            return (PROMOTED, request.arrival_time)
        return (NORMAL, -self._matched_tokens(request), request.arrival_time)

    def key_until(self, request: Request, now: float) -> float:
        if self._cap.is_promoted(request, now):
            return self._cap.until(request, now)
        return min(self._cap.until(request, now), now + _REFRESH_S)
