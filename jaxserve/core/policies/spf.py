"""Ordering ``spf``: shortest prefill first, with age (Nexus, arXiv 2507.06608, section 5)."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import SortKey
from jaxserve.request import Request

TOKENS_PER_SECOND_OF_AGE = 15.0


@final
class ShortestPrefillFirst:
    """Ascending ``remaining prompt tokens - gamma * age``.

    Age grows alike for everybody, so the order of two requests never changes: the key needs no clock. A
    prompt is overtaken only by those that arrive within ``(its length - theirs) / gamma`` seconds. A prompt
    that is partly computed gives its turn, not its pages, to a shorter one.

    Args:
        gamma: prompt tokens that a second of waiting is worth.
    """

    def __init__(self, gamma: float = TOKENS_PER_SECOND_OF_AGE) -> None:
        self._gamma = gamma

    def key(self, request: Request, now: float) -> SortKey:
        return (self.rank(request),)

    def rank(self, request: Request) -> float:
        remaining = request.num_tokens - request.num_computed_tokens
        return remaining + self._gamma * request.arrival_time
