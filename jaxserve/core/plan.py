"""The two messages between scheduler and executor: a frozen plan, and the result of running it.

A plan is complete when it is built and holds plain values only, so that it can be serialised, replayed and
compared (`docs/structure.md`). Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxserve.request import SamplingParams


class Bucket(NamedTuple):
    """A padded shape that was compiled at start.

    Attributes:
        tokens: length of the flattened token axis.
        rows: number of requests in the step.
        decode_steps: most tokens of a row, made one after the other in a loop on the device; only decode
            buckets have more than one.
    """

    tokens: int
    rows: int
    decode_steps: int = 1

    @property
    def is_decode(self) -> bool:
        """One token per row at a time: each row is at most one query."""
        return self.tokens == self.rows


class ScheduledRow(NamedTuple):
    """One request's share of a step.

    Attributes:
        request_id: whose.
        slot: its row in the device's slot arrays.
        start: position of the first token computed (= tokens computed before this step).
        num_tokens: how many positions this step computes; in a decode loop at most so many, one after the
            other, each of which samples the next one.
        samples: whether the step reaches the request's last token and so samples the next one.
    """

    request_id: str
    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step as columns, aligned; as a sequence, a `ScheduledRow` each.

    Columns, because a row is made for every token: what walks all rows of all steps reads columns.
    """

    request_ids: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    samples: tuple[bool, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[ScheduledRow]) -> StepRows:
        return cls(*zip(*rows, strict=True))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int) -> ScheduledRow:
        return ScheduledRow(
            self.request_ids[index],
            self.slots[index],
            self.starts[index],
            self.num_tokens[index],
            self.samples[index],
        )

    def __iter__(self) -> Iterator[ScheduledRow]:
        columns = (self.request_ids, self.slots, self.starts, self.num_tokens, self.samples)
        return map(ScheduledRow._make, zip(*columns, strict=True))


class PageUpdate(NamedTuple):
    """``page_table[slot, column] = page`` before the step runs."""

    slot: int
    column: int
    page: int


# In a copy: nothing is copied there; nobody's slot.
NO_PAGE = NO_SLOT = -1


class PageCopy(NamedTuple):
    """KV pages that are copied to host memory, or back.

    Attributes:
        number: of the copy, counted from 1.
        request_id: whose; empty for pages of the prefix cache.
        slot: that the request has; `NO_SLOT` for pages of the prefix cache.
        blocks: of host memory; each holds as many pages as a block has.
        pages: of all blocks in order; the last block may have fewer, and `NO_PAGE` may stand for some.
    """

    number: int
    request_id: str
    slot: int
    blocks: tuple[int, ...]
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """Everything the device must know about a request that takes a slot in this step.

    ``token_ids`` are the prompt and, after preemption, the tokens generated so far; they never change. The
    first ``num_prompt_tokens`` are the prompt (penalties treat them differently). ``page_ids`` is the whole
    page-table row: pages for all of these tokens, some of them perhaps shared and already filled.
    """

    request_id: str
    slot: int
    token_ids: Sequence[int]
    page_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: which requests compute how many tokens, in which compiled shape.

    Attributes:
        step: number of the step, from 0.
        rows: decodes first, then prefill chunks; ``sum(num_tokens) <= bucket.tokens``, but in a decode loop
            each ``num_tokens <= bucket.decode_steps``.
        bucket: the compiled shape that runs it.
        admissions: requests that take a slot just before the step; all have a row in it, but for those whose
            prompts the step's budget has no room for: of a batch (static, dynamic), or behind a prefix that
            has been loaded. One whose pages are being loaded is told when they land.
        page_updates: pages of requests that grew; at most one per row.
        preempted_ids: requests that lost their slot and pages since the plan before.
        saves: pages to copy to the host before anything else of this plan is done.
        loads: blocks to bring to the device; they go into pages when they land.
        landings: numbers of loads, of this plan or earlier ones, to put into their pages before the step, in
            this order: pages of one may have been given up, and be those of a later one.
        num_held_slots: slots kept by finished requests (static and dynamic batching), padded in the step.
    """

    step: int
    rows: StepRows
    bucket: Bucket
    admissions: tuple[Admission, ...] = ()
    page_updates: tuple[PageUpdate, ...] = ()
    preempted_ids: tuple[str, ...] = ()
    saves: tuple[PageCopy, ...] = ()
    loads: tuple[PageCopy, ...] = ()
    landings: tuple[int, ...] = ()
    num_held_slots: int = 0

    @property
    def is_loop(self) -> bool:
        """Whether rows may make several tokens, one after the other."""
        return self.bucket.decode_steps > 1

    @property
    def num_tokens(self) -> int:
        is_plain = self.bucket.is_decode and not self.is_loop
        return len(self.rows) if is_plain else sum(self.rows.num_tokens)

    @property
    def num_decodes(self) -> int:
        """Rows that compute one token at a time."""
        return len(self.rows) if self.bucket.is_decode else self.rows.num_tokens.count(1)

    @property
    def num_decode_steps(self) -> int:
        """Decode steps of the row that has most; 1 but in a loop."""
        return max(self.rows.num_tokens, default=1) if self.is_loop else 1

    @property
    def num_padded_tokens(self) -> int:
        """Tokens for which the step has room and does not need it."""
        return self.bucket.tokens * self.bucket.decode_steps - self.num_tokens


def plan_digest(plan: StepPlan) -> str:
    """16 hexadecimal digits of all that a plan decides; contents (token ids, sampling) are left out."""
    decided = (
        plan.step,
        list(plan.rows),
        plan.bucket,
        [(a.request_id, a.slot, len(a.token_ids), a.page_ids) for a in plan.admissions],
        plan.page_updates,
        plan.preempted_ids,
        plan.saves,
        plan.loads,
        plan.landings,
        plan.num_held_slots,
    )
    return hashlib.blake2b(json.dumps(decided).encode(), digest_size=8).hexdigest()


class TopLogprobs(NamedTuple):
    """Log-probabilities of one sampled token, and of the best alternatives (best first)."""

    chosen: float
    rank: int
    token_ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, aligned with ``plan.rows``; plain host values.

    Attributes:
        token_ids: for each decode step that ran (one, but in a loop), the sampled id per row; meaningless
            where the row does not sample, or has stopped before.
        logprobs: per row, None where not asked for; None altogether if nobody asked, and in a loop.
        bad_rows: (decode step, index of the row) where the logits were not finite.
        arrived: numbers of loads that have come to the device since the last result.
        device_s: seconds the executor took to run the step, by its own clock (0 if unknown).
    """

    token_ids: list[list[int]]
    logprobs: list[TopLogprobs | None] | None = None
    bad_rows: tuple[tuple[int, int], ...] = ()
    arrived: tuple[int, ...] = ()
    device_s: float = 0.0
