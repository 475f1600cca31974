"""A plan in the making."""

from __future__ import annotations

import dataclasses
import functools
from typing import Final, cast

from jaxserve.core.plan import Admission, Bucket, PageCopy, PageUpdate, ScheduledRow, StepPlan
from jaxserve.request import Request

# A third of the time of the named constructor, in a loop that runs for every token.
_make_row: Final = functools.partial(tuple.__new__, ScheduledRow)


@dataclasses.dataclass(slots=True)
class Draft:
    """A plan being made. Counts of the requests in it have advanced already.

    Attributes:
        budget: tokens that the step can still hold.
        page_size: tokens in a KV page.
        owners: the requests of the rows, in their order.
        page_ends: requests whose next token is the first of a page.
    """

    budget: int
    page_size: int
    rows: list[ScheduledRow] = dataclasses.field(default_factory=list[ScheduledRow])
    owners: list[Request] = dataclasses.field(default_factory=list[Request])
    admissions: list[Admission] = dataclasses.field(default_factory=list[Admission])
    page_updates: list[PageUpdate] = dataclasses.field(default_factory=list[PageUpdate])
    preempted_ids: list[str] = dataclasses.field(default_factory=list[str])
    saves: list[PageCopy] = dataclasses.field(default_factory=list[PageCopy])
    loads: list[PageCopy] = dataclasses.field(default_factory=list[PageCopy])
    landings: list[int] = dataclasses.field(default_factory=list[int])
    num_tokens: int = 0
    page_ends: list[Request] = dataclasses.field(default_factory=list[Request])

    def plan_decodes(self, running: list[Request]) -> list[Request]:
        """One token for each request that lacks one; returns those that lack more: prompts in part computed.

        The hottest loop of the scheduler: a row a token that the engine makes.
        """
        rows, owners, page_size, make_row = self.rows, self.owners, self.page_size, _make_row
        prefills: list[Request] = []
        for request in running:
            end = request.num_tokens
            start = request.num_computed_tokens
            if end - start != 1:
                prefills.append(request)
            elif end < request.max_num_tokens:  # else the last token is being sampled
                rows.append(make_row((request.id, request.slot, start, 1, True)))
                owners.append(request)
                request.num_computed_tokens = end
                request.num_tokens = end + 1
                if end % page_size == 0:
                    self.page_ends.append(request)
        self.num_tokens = len(rows)
        self.budget -= len(rows)
        return prefills

    def plan_chunk(self, request: Request, num_tokens: int) -> None:
        """The next ``num_tokens`` of a prompt."""
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        self.rows.append(ScheduledRow(request.id, cast(int, request.slot), start, num_tokens, samples))
        self.owners.append(request)
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        request.num_computed_tokens = end
        if samples:
            request.num_tokens += 1
            if end % self.page_size == 0:
                self.page_ends.append(request)

    def admit(self, request: Request) -> None:
        """Tells the device all about a request that has a slot and pages."""
        self.admissions.append(
            Admission(
                request_id=request.id,
                slot=cast(int, request.slot),
                token_ids=tuple(request.known_token_ids()),
                page_ids=tuple(request.page_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                params=request.params,
                seed=request.seed,
                stop_token_ids=tuple(sorted(request.stop_token_ids)),
            )
        )

    def drop_pages(self, request: Request) -> None:
        """Forgets the entries of a request that loses its slot."""
        self.page_updates = [update for update in self.page_updates if update.slot != request.slot]

    def finish(self, step: int, bucket: Bucket, num_held_slots: int) -> StepPlan:
        """The plan, frozen."""
        return StepPlan(
            step=step,
            rows=tuple(self.rows),
            bucket=bucket,
            admissions=tuple(self.admissions),
            page_updates=tuple(self.page_updates),
            preempted_ids=tuple(self.preempted_ids),
            saves=tuple(self.saves),
            loads=tuple(self.loads),
            landings=tuple(self.landings),
            num_held_slots=num_held_slots,
        )
