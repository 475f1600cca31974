"""What a step's result changed, for those who tell callers, count and learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import repeat

from jaxserve.core.plan import TopLogprobs
from jaxserve.request import Request


@dataclasses.dataclass(slots=True)
class StepUpdates:
    """New tokens as columns, and ends.

    Attributes:
        requests, token_ids: who got which token, in row order; the lists may belong to a plan or result.
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

    def tokens(self) -> Iterable[tuple[Request, int, TopLogprobs | None]]:
        """The new tokens one by one."""
        logprobs = repeat(None) if self.logprobs is None else self.logprobs
        return zip(self.requests, self.token_ids, logprobs, strict=False)
