"""Victim ``most_remaining``: the largest predicted remaining work per page held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxserve.request import Request


@final
class MostRemainingVictim:
    """Who would keep its pages longest, for what recomputing them costs.

    The one with the smallest value is never chosen while another runs, and its value only falls: somebody
    always finishes.
    """

    def choose(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=_value)


def _value(request: Request) -> float:
    predicted = request.predicted_output_tokens
    expected = float(request.max_tokens) if predicted is None else predicted
    remaining = max(1.0, expected - len(request.output_token_ids))
    return remaining / max(1, len(request.page_ids))
