"""How far a decode loop goes: the tokens of each row that are planned at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxserve.request import Request


def loop_steps(decodes: Sequence[Request], most: int, *, is_awaited: bool) -> list[int] | None:
    """Tokens of each row in a loop, at least one each; None if one token at a time is better.

    Some devices always run the whole loop, so more than half of it must be of use.

    Args:
        decodes: the requests of a plan of decodes, whose next token is counted in ``num_tokens`` already.
        most: tokens of a row that the loop can make.
        is_awaited: whether somebody waits for the first of them to end.
    """
    if any(request.params.logprobs is not None for request in decodes):
        return None
    left = [request.max_num_tokens - request.num_tokens + 1 for request in decodes]
    horizon = min([most, *left, *map(_predicted_left, decodes)]) if is_awaited else most
    steps = [min(horizon, each) for each in left]
    return steps if 2 * sum(steps) > most * len(steps) else None


def _predicted_left(request: Request) -> int:
    """Tokens until a request is predicted to end; none that is near if it has outgrown its prediction."""
    if request.predicted_output_tokens is None:
        return request.max_tokens
    num_output = request.num_tokens - 1 - request.num_prompt_tokens
    left = math.ceil(request.predicted_output_tokens) - num_output
    return left if left > 0 else request.max_tokens
