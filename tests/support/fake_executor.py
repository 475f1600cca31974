"""An executor whose arithmetic is done by hand: next token = (sum of all tokens before it + seed) % vocab."""

from __future__ import annotations

import dataclasses

from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import NO_PAGE, Admission, PageCopy, ScheduledRow, StepPlan, StepResult, TopLogprobs


@dataclasses.dataclass
class FakeExecutor:
    """Keeps its own token rows, as the device does, and never looks at the scheduler's.

    It checks what a real device could not survive: a step that reads positions nobody has written, a page
    table that lacks a page, a page that two live slots write.
    """

    num_slots: int
    page_size: int
    vocab_size: int = 101
    bad_requests: frozenset[str] = frozenset()
    block_pages: int = 2
    load_steps: int = 3
    # Off: rows of a loop never stop by themselves, and the scheduler must discard what is too much.
    stops_rows: bool = True

    def __post_init__(self) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(self.num_slots)]
        self.seeds = [0] * self.num_slots
        self.admissions: dict[int, Admission] = {}
        self.computed = [0] * self.num_slots
        self.tables: list[dict[int, int]] = [{} for _ in range(self.num_slots)]
        self.contents: dict[
            tuple[int, int], tuple[int, ...]
        ] = {}  # (page, offset) -> prefix it was computed from
        self.blocks: dict[int, list[dict[tuple[int, int], tuple[int, ...]]]] = {}  # host block -> its pages
        self.loads: dict[int, tuple[PageCopy, list[dict[tuple[int, int], tuple[int, ...]]]]] = {}
        self.loads_due: dict[int, int] = {}  # number -> the step that reports it
        self.num_dispatched = 0
        self.num_computed_tokens = 0
        self.batches: list[StepBatch] = []

    def dispatch(self, batch: StepBatch) -> StepResult:
        """Runs at once; a handle is its own result."""
        plan = batch.plan
        self.num_dispatched += 1
        self.batches.append(batch)
        self._copy(plan)
        for admission in plan.admissions:
            self.tokens[admission.slot] = list(admission.token_ids)
            self.seeds[admission.slot] = admission.seed
            self.admissions[admission.slot] = admission
            self.tables[admission.slot] = dict(enumerate(admission.page_ids))
            assert 0 not in admission.page_ids, "the null page was given away"
        for slot, index, page in plan.page_updates:
            assert page != 0, "the null page was given away"
            self.tables[slot][index] = page
        assert len(plan.rows) <= plan.bucket.rows
        if plan.is_loop:
            token_ids = self._run_loop(plan)
        else:
            assert sum(row.num_tokens for row in plan.rows) <= plan.bucket.tokens
            token_ids = [[self._run_row(*row[1:]) for row in plan.rows]]
        bad_rows = [
            (decode_step, index)
            for decode_step in range(len(token_ids))
            for index, row in enumerate(plan.rows)
            if self.is_bad(row, decode_step)
        ]
        arrived = tuple(n for n, at in self.loads_due.items() if at == self.num_dispatched)
        return StepResult(token_ids, self._logprobs(plan), tuple(bad_rows), arrived)

    def _logprobs(self, plan: StepPlan) -> list[TopLogprobs | None] | None:
        """One half for the token, and alternatives 0, 1, ... for rows that want any; they are in no loop."""
        wanted = [self.admissions[row.slot].params.logprobs if row.samples else None for row in plan.rows]
        if all(count is None for count in wanted):
            return None
        return [
            None
            if count is None
            else TopLogprobs(-0.5, 1, list(range(count)), [-1.0 - rank for rank in range(count)])
            for count in wanted
        ]

    def is_bad(self, row: ScheduledRow, decode_step: int) -> bool:
        """Whether a row's logits are not finite."""
        return row.samples and row.request_id in self.bad_requests

    def _copy(self, plan: StepPlan) -> None:
        """Copies what pages hold, to blocks and back; a block that was given to another is overwritten."""
        size = self.block_pages
        for save in plan.saves:
            assert len(save.blocks) == -(-len(save.pages) // size)
            for index, block in enumerate(save.blocks):
                pages = save.pages[index * size : (index + 1) * size]
                self.blocks[block] = [self._page(page) for page in pages] + [{}] * (size - len(pages))
        for load in plan.loads:
            held = [page for block in load.blocks for page in self.blocks[block]]
            self.loads[load.number] = load, held
            self.loads_due[load.number] = self.num_dispatched + self.load_steps
        for number in plan.landings:
            load, held = self.loads.pop(number)
            self.loads_due.pop(number)
            for page, content in zip(load.pages, held[: len(load.pages)], strict=True):
                if page != NO_PAGE:
                    self.contents |= {(page, offset): tokens for (_, offset), tokens in content.items()}

    def _page(self, page: int) -> dict[tuple[int, int], tuple[int, ...]]:
        places = [(page, offset) for offset in range(self.page_size)]
        return {place: self.contents[place] for place in places if place in self.contents}

    def collect(self, handle: StepResult) -> StepResult:
        return handle

    def _run_loop(self, plan: StepPlan) -> list[list[int]]:
        """As a device does: a row that stops leaves no token for its next loop, and is out of that, too."""
        running = [not self._is_out(row.slot, row.start) for row in plan.rows]
        result: list[list[int]] = []
        for decode_step in range(plan.bucket.decode_steps):
            running = [
                on and decode_step < row.num_tokens for on, row in zip(running, plan.rows, strict=True)
            ]
            if not any(running):
                break
            token_ids = [
                self._run_row(row.slot, row.start + decode_step, 1, row.samples) if on else -1
                for on, row in zip(running, plan.rows, strict=True)
            ]
            if self.stops_rows:
                running = [
                    on and not self._has_stopped(row.slot) for on, row in zip(running, plan.rows, strict=True)
                ]
            result.append(token_ids)
        return result

    def _has_stopped(self, slot: int) -> bool:
        admission, tokens = self.admissions[slot], self.tokens[slot]
        num_output = len(tokens) - admission.num_prompt_tokens
        return tokens[-1] in admission.stop_token_ids and num_output > admission.params.min_tokens

    def _is_out(self, slot: int, start: int) -> bool:
        """Whether a row's request stopped in an earlier loop, so that nothing of it is looked at any more."""
        return start >= len(self.tokens[slot]) and self._has_stopped(slot)

    def _run_row(self, slot: int, start: int, num_tokens: int, samples: bool) -> int:
        tokens, table = self.tokens[slot], self.tables[slot]
        if self._is_out(slot, start):
            return -1
        assert start + num_tokens <= len(tokens), "the step computes a token that does not exist yet"
        for position in range(start, start + num_tokens):
            page = table[position // self.page_size]
            self.contents[page, position % self.page_size] = tuple(tokens[: position + 1])
        for position in range(
            start + num_tokens
        ):  # attention reads every earlier key: each must be this request's
            page = table[position // self.page_size]
            assert self.contents[page, position % self.page_size] == tuple(tokens[: position + 1]), (
                "foreign KV"
            )
        self.num_computed_tokens += num_tokens
        if not samples:
            return -1
        assert start + num_tokens == len(tokens)
        token = (sum(tokens) + self.seeds[slot]) % self.vocab_size
        tokens.append(token)
        return token


def expected_tokens(prompt: list[int], seed: int, count: int, vocab_size: int = 101) -> list[int]:
    """What `FakeExecutor` generates for a request alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((sum(tokens) + seed) % vocab_size)
    return tokens[len(prompt) :]
