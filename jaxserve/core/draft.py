"""A plan in the making."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

from jaxserve.core.buckets import BucketLadder
from jaxserve.core.kv_cache_manager import KVCacheManager
from jaxserve.core.plan import Admission, Bucket, PageCopy, PageUpdate, StepPlan, StepRows
from jaxserve.request import Request


class StepInFlight(NamedTuple):
    """A plan whose result has not been read.

    Attributes:
        owners: the requests of its rows.
        num_finished: of all requests, when it was planned.
    """

    plan: StepPlan
    owners: list[Request]
    num_finished: int


@dataclasses.dataclass(slots=True)
class Draft:
    """A plan being made. Counts of the requests in it have advanced already.

    Attributes:
        budget: tokens that the step can still hold.
        page_size: tokens in a KV page.
        owners: the requests of the rows, in their order: decodes first.
        starts: of the rows.
        chunks: number of tokens, and whether it samples, of each row that is no decode.
        page_ends: requests whose next token is the first of a page.
        loop_tokens: of each row, if the plan is a decode loop; else empty.
    """

    budget: int
    page_size: int
    owners: list[Request] = dataclasses.field(default_factory=list[Request])
    starts: list[int] = dataclasses.field(default_factory=list[int])
    chunks: list[tuple[int, bool]] = dataclasses.field(default_factory=list[tuple[int, bool]])
    admissions: list[Admission] = dataclasses.field(default_factory=list[Admission])
    page_updates: list[PageUpdate] = dataclasses.field(default_factory=list[PageUpdate])
    preempted_ids: list[str] = dataclasses.field(default_factory=list[str])
    saves: list[PageCopy] = dataclasses.field(default_factory=list[PageCopy])
    loads: list[PageCopy] = dataclasses.field(default_factory=list[PageCopy])
    landings: list[int] = dataclasses.field(default_factory=list[int])
    num_tokens: int = 0
    page_ends: list[Request] = dataclasses.field(default_factory=list[Request])
    loop_tokens: list[int] = dataclasses.field(default_factory=list[int])

    def plan_decodes(self, running: list[Request]) -> list[Request]:
        """One token for each request that lacks one; returns those that lack more: prompts in part computed.

        The hottest loop of the scheduler: a row a token that the engine makes.
        """
        owners, starts, page_size = self.owners, self.starts, self.page_size
        prefills: list[Request] = []
        for request in running:
            end = request.num_tokens
            start = request.num_computed_tokens
            if end - start != 1:
                prefills.append(request)
            elif end < request.max_num_tokens:  # else the last token is being sampled
                owners.append(request)
                starts.append(start)
                request.num_computed_tokens = end
                request.num_tokens = end + 1
                if end % page_size == 0:
                    self.page_ends.append(request)
        self.num_tokens = len(owners)
        self.budget -= len(owners)
        return prefills

    def grow(self, request: Request, num_tokens: int, kv: KVCacheManager) -> None:
        """Gives a running request the one page more that so many tokens need; there must be one."""
        kv.grow(request, num_tokens)
        column = len(request.page_ids) - 1
        self.page_updates.append(PageUpdate(cast(int, request.slot), column, request.page_ids[-1]))

    def lengthen_decodes(self, steps: list[int], kv: KVCacheManager) -> None:
        """Makes a loop of a plan that only decodes: so many tokens a row, fewer where no page is left.

        No row takes more than one page, as ``steps`` do not exceed the page size.
        """
        page_size = self.page_size
        self.page_ends = []
        for request, start, wanted in zip(self.owners, self.starts, steps, strict=True):
            end, paged = start + wanted, len(request.page_ids) * page_size
            if end > paged and kv.num_available > 0:
                self.grow(request, end, kv)
            elif end > paged:
                end = paged
            self.loop_tokens.append(end - start)
            request.num_computed_tokens = end
            request.num_tokens = end + 1
            if end % page_size == 0:
                self.page_ends.append(request)
        self.num_tokens = sum(self.loop_tokens)

    def plan_chunk(self, request: Request, num_tokens: int) -> None:
        """The next ``num_tokens`` of a prompt."""
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        self.owners.append(request)
        self.starts.append(start)
        self.chunks.append((num_tokens, samples))
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
                token_ids=request.known_token_ids(),
                page_ids=tuple(request.page_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                params=request.params,
                seed=request.seed,
                stop_token_ids=tuple(sorted(request.stop_token_ids)),
            )
        )

    def rows(self) -> StepRows:
        """The rows so far."""
        decodes = len(self.owners) - len(self.chunks)
        return StepRows(
            tuple([request.id for request in self.owners]),
            cast(tuple[int, ...], tuple([request.slot for request in self.owners])),
            tuple(self.starts),
            tuple(self.loop_tokens) or (1,) * decodes + tuple([num_tokens for num_tokens, _ in self.chunks]),
            (True,) * decodes + tuple([samples for _, samples in self.chunks]),
        )

    def drop_pages(self, request: Request) -> None:
        """Forgets the entries of a request that loses its slot."""
        self.page_updates = [update for update in self.page_updates if update.slot != request.slot]

    def finish(self, step: int, ladder: BucketLadder, num_held_slots: int) -> StepPlan:
        """The plan, frozen, in the smallest shape that holds it and the slots that are held."""
        return StepPlan(
            step=step,
            rows=self.rows(),
            bucket=self._bucket(ladder, num_held_slots),
            admissions=tuple(self.admissions),
            page_updates=tuple(self.page_updates),
            preempted_ids=tuple(self.preempted_ids),
            saves=tuple(self.saves),
            loads=tuple(self.loads),
            landings=tuple(self.landings),
            num_held_slots=num_held_slots,
        )

    def _bucket(self, ladder: BucketLadder, num_held_slots: int) -> Bucket:
        num_rows, is_loop = len(self.owners), bool(self.loop_tokens)
        if is_loop or self.num_tokens == num_rows:
            return ladder.choose_decode(num_rows + num_held_slots, is_loop=is_loop)
        return ladder.choose_mixed(self.num_tokens)
