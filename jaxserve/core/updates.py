"""What the scheduler reports: updates of requests, and counts."""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

from jaxserve.core.plan import TopLogprobs
from jaxserve.request import FinishReason, Request


class RequestUpdate(NamedTuple):
    """What changed for one request: a new token, or its end, or both."""

    request: Request
    token_id: int | None
    logprobs: TopLogprobs | None
    finished: bool


# A third of the time of the named constructor, in a loop that runs for every token.
make_update: Final = functools.partial(tuple.__new__, RequestUpdate)


class SchedulerStats(NamedTuple):
    """A snapshot of the queues and pages."""

    num_waiting: int
    num_running: int
    num_held: int
    num_used_pages: int  # by running requests
    num_cached_pages: int  # by the prefix cache alone
    num_usable_pages: int
    num_preemptions: int
    num_finished: int


def finish_reason(request: Request, token_id: int) -> FinishReason | None:
    """Whether a request's newest token is its last, and why; a decode loop's rows stop by the same rule."""
    num_output = len(request.output_token_ids)
    if token_id in request.stop_token_ids and num_output > request.params.min_tokens:
        return FinishReason.STOP
    if num_output >= request.max_tokens:
        return FinishReason.LENGTH
    return None
