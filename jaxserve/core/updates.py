"""What a step's result changed, for those who tell callers, count and learn; and snapshots of the queues."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

from jaxserve.core.plan import StepRows, TopLogprobs
from jaxserve.request import FinishReason, Request, RequestStatus


@dataclasses.dataclass(slots=True)
class StepUpdates:
    """New tokens as columns, and ends.

    Attributes:
        requests, token_ids: who got which token, in row order, and one decode step of a loop after the other;
            the lists may belong to a plan or result.
        logprobs: aligned with them, None where not asked for; None altogether if nobody asked.
        stopped: requests whose last token was one of their stop tokens.
        ended: requests that are done, in the step or outside of it, with or without a token in it. One that
            holds its slot until its batch is done (static batching) is among them when that is.
    """

    requests: list[Request] = dataclasses.field(default_factory=list[Request])
    token_ids: list[int] = dataclasses.field(default_factory=list[int])
    logprobs: list[TopLogprobs | None] | None = None
    stopped: list[Request] = dataclasses.field(default_factory=list[Request])
    ended: list[Request] = dataclasses.field(default_factory=list[Request])

    def extend(self, requests: list[Request], token_ids: list[int]) -> None:
        """Appends the tokens of a decode step."""
        is_first = not self.requests
        self.requests = requests if is_first else self.requests + requests
        self.token_ids = token_ids if is_first else self.token_ids + token_ids

    def tokens(self) -> Iterable[tuple[Request, int, TopLogprobs | None]]:
        """The new tokens one by one."""
        logprobs = repeat(None) if self.logprobs is None else self.logprobs
        return zip(self.requests, self.token_ids, logprobs, strict=False)


class SchedulerStats(NamedTuple):
    """A snapshot of the queues and pages."""

    num_waiting: int
    num_running: int
    num_held: int
    num_used_pages: int  # by running requests
    num_cached_pages: int  # by the prefix cache alone
    num_usable_pages: int
    num_preemptions: int
    num_lost_tokens: int  # computed, lost to preemption, and not found or loaded again
    num_finished: int


def live_rows(rows: StepRows, owners: Iterable[Request], decode_step: int) -> list[bool]:
    """Which rows have a token in a decode step, from 0: they sample, go so far, and are not finished."""
    finished = RequestStatus.FINISHED
    if decode_step:
        return [
            length > decode_step and request.status is not finished
            for length, request in zip(rows.num_tokens, owners, strict=True)
        ]
    return [
        samples and request.status is not finished
        for samples, request in zip(rows.samples, owners, strict=True)
    ]


def finish_reason(request: Request, token_id: int) -> FinishReason | None:
    """Whether a request's newest token is its last, and why; rows of a decode loop stop by the same rule."""
    num_output = len(request.output_token_ids)
    if token_id in request.stop_token_ids and num_output > request.params.min_tokens:
        return FinishReason.STOP
    if num_output >= request.max_tokens:
        return FinishReason.LENGTH
    return None
