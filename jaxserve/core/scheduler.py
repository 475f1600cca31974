"""The scheduler: requests in, frozen plans out, results in, updates out. No jax, no clock, no randomness.

There is no prefill phase and no decode phase. Each request's ``num_computed_tokens`` chases its
``num_tokens``; a plan spends one token budget on those distances. Counts advance when a step is *planned*;
token values arrive when its result is read, up to ``pipeline_depth`` steps later. A row whose request turned
out to be finished is discarded.

    position   0 ............. num_computed .............. num_known ........... num_tokens
               [ KV in pages  ][ to be computed            ][ sampled in flight, value not yet known ]
"""

from __future__ import annotations

from collections import deque
from itertools import compress

from jaxserve.core.buckets import BucketLadder
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.draft import Draft, StepInFlight
from jaxserve.core.horizon import loop_steps
from jaxserve.core.host_traffic import HostTraffic
from jaxserve.core.integrity import check_slots
from jaxserve.core.kv_cache_manager import KVCacheManager
from jaxserve.core.learning.arms import Arm
from jaxserve.core.observers import Observers
from jaxserve.core.plan import StepPlan, StepResult
from jaxserve.core.policies.switch import PolicySwitch, tell
from jaxserve.core.policy import Policies, Preempting, RankingPrefills, StepView
from jaxserve.core.prefix_cache import PrefixCacheStats
from jaxserve.core.radix_node import Match
from jaxserve.core.swap import SwapStats
from jaxserve.core.updates import SchedulerStats, StepUpdates, finish_reason, live_rows
from jaxserve.core.waiting_queue import WaitingQueue
from jaxserve.errors import DuplicateRequestError, QueueFullError
from jaxserve.request import FinishReason, Request, RequestStatus

# A slot is taken from a running request in every so many steps at most: the search looks at all of them.
_PREEMPTION_INTERVAL = 8


class Scheduler:
    """Decides what every step computes.

    ``schedule`` and ``update`` are called by one thread, in step order.
    """

    def __init__(
        self,
        *,
        switch: PolicySwitch,
        kv: KVCacheManager,
        ladder: BucketLadder,
        num_slots: int,
        watermark_pages: int,
        max_queued_requests: int,
        host: HostTraffic,
        decision_log: DecisionLog | None = None,
    ) -> None:
        self._switch = switch
        self._follow(switch.policies)
        self._token_budget = ladder.token_budget
        self._log = decision_log
        self._kv = kv
        self._host = host
        self._swap = host.swap
        self._ladder = ladder
        self._watermark_pages = watermark_pages
        self._max_queued_requests = max_queued_requests
        self._waiting = WaitingQueue(switch.policies.ordering)
        self._running: list[Request] = []
        self._held: list[Request] = []
        self._live: dict[str, Request] = {}
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._in_flight: deque[StepInFlight] = deque()
        self._with_deadline: set[Request] = set()
        self._ended: list[Request] = []  # ends that no step's result will report
        self._page_ends: list[Request] = []  # whose next token is the first of a page
        self._unsaid_ids: list[str] = []  # preempted when nothing could run: the next plan says so
        self._outgrown: list[Request] = []  # longer than the upper quantile of their prediction
        self._step = 0
        self._num_preemptions = 0
        self._num_lost_tokens = 0
        self._num_finished = 0

    def _follow(self, policies: Policies) -> None:
        ordering = policies.ordering
        self._policies = policies
        self._observers = Observers(policies)
        self._preempting = ordering if isinstance(ordering, Preempting) else None
        self._ranking = ordering if isinstance(ordering, RankingPrefills) else None

    def retune(self, arm: Arm, now: float) -> None:
        """Changes what an arm names, between any two steps. Who runs goes on; who waits is put in order."""
        self._token_budget = min(arm.max_num_batched_tokens, self._ladder.token_budget)
        before = self._policies.ordering
        self._follow(self._switch.change(arm))
        if self._policies.ordering is not before:
            tell(self._policies.ordering, self._running, now)
            self._waiting.reorder(self._policies.ordering, now)

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request, now: float) -> None:
        """Queues a request.

        Raises:
            DuplicateRequestError: a request with this id is alive.
            QueueFullError: too many are waiting.
        """
        if request.id in self._live:
            raise DuplicateRequestError("request_id", request.id, "a request with this id is still running")
        if len(self._waiting) >= self._max_queued_requests:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting (max_queued_requests)")
        self._live[request.id] = request
        self._enqueue(request, now)
        if request.deadline is not None:
            self._with_deadline.add(request)

    def get(self, request_id: str) -> Request | None:
        """The live request of that id, or None."""
        return self._live.get(request_id)

    def end(
        self,
        request: Request,
        reason: FinishReason,
        now: float,
        *,
        stop_reason: str | None = None,
        error: str | None = None,
    ) -> None:
        """Ends a live request from outside (abort, stop string, deadline, error); its pages are free at once.

        It is returned by the next ``take_ended``.
        """
        request.stop_reason = stop_reason
        request.error = error
        self._leave(request, reason, now)
        self._ended.append(request)
        self._release_batch(now)

    def stop(self, reason: FinishReason, now: float, error: str) -> None:
        """Ends every live request and forgets the steps in flight, for a failed or closing engine."""
        self._in_flight.clear()
        for request in list(self._live.values()):
            self.end(request, reason, now, error=error)

    def lose_device(self, now: float, error: str) -> None:
        """Ends who has a slot or a row in flight, with an error; empties every cache. Who waits goes on."""
        rows = {request for step in self._in_flight for request in step.owners}
        self._in_flight.clear()
        for request in [r for r in self._live.values() if r.slot is not None or r in rows]:
            self.end(request, FinishReason.ERROR, now, error=error)
        self._release_batch(now)
        self._host.forget()
        self._kv.forget()

    def take_ended(self) -> list[Request]:
        """Requests that ended outside of a step's result."""
        ended, self._ended = self._ended, []
        return ended

    def take_outgrown(self) -> list[Request]:
        """Requests that became longer than the upper quantile of their prediction since the last call."""
        outgrown, self._outgrown = self._outgrown, []
        return outgrown

    @property
    def has_work(self) -> bool:
        """Whether any request is alive or any result is due."""
        return bool(self._live or self._in_flight or self._ended)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_held=len(self._held),
            num_used_pages=self._kv.num_used,
            num_cached_pages=self._kv.num_cached,
            num_usable_pages=self._kv.num_usable,
            num_preemptions=self._num_preemptions,
            num_lost_tokens=self._num_lost_tokens - self._swap.stats().resumed_tokens,
            num_finished=self._num_finished,
        )

    def prefix_cache_stats(self) -> PrefixCacheStats | None:
        """Counters of the prefix cache; None without one."""
        return self._kv.prefix_cache_stats()

    def swap_stats(self) -> SwapStats:
        """Counters of the host tier."""
        return self._swap.stats()

    # ------------------------------------------------------------------ planning

    def schedule(self, now: float) -> StepPlan | None:
        """Plans the next step, or returns None if nothing can run before a result or an arrival comes."""
        if self._with_deadline:
            self._expire(now)
        self._kv.commit(now)
        draft = Draft(self._token_budget, self._kv.page_size, preempted_ids=self._unsaid_ids)
        self._grow_decodes(now, draft)
        self._release_batch(now)  # a batch whose last running member was preempted is over, too
        if self._waiting:
            self._waiting.refresh(now)
            if self._preempting is not None and not self._free_slots:
                self._make_room(self._preempting, now, draft)
        if self._host.has_loads:
            self._land(draft)
        prefills = draft.plan_decodes(self._running)
        if self._host.has_loads:
            prefills = [request for request in prefills if not self._host.is_loading(request)]
        num_decodes = len(draft.owners)
        if prefills or self._waiting:
            self._plan_prefills(prefills, now, draft)
        if self._ladder.decode_steps > 1 and not prefills and len(draft.owners) == num_decodes:
            self._look_ahead(draft)
        self._page_ends = draft.page_ends
        self._unsaid_ids = [] if draft.owners else draft.preempted_ids
        if not draft.owners:
            if not self._in_flight:
                self._host.land_all()
            return None
        self._host.take_copies(draft)
        plan = draft.finish(self._step, self._ladder, len(self._held))
        self._step += 1
        self._in_flight.append(StepInFlight(plan, draft.owners, self._num_finished))
        return plan

    def _look_ahead(self, draft: Draft) -> None:
        """Lets a plan that only decodes make several tokens a row, if nobody can take a slot meanwhile."""
        head = self._waiting.peek()
        if head is not None and (self._preempting is not None or self._is_in_flight(head)):
            return
        steps = loop_steps(draft.owners, self._ladder.decode_steps, is_awaited=head is not None)
        if steps is not None:
            draft.lengthen_decodes(steps, self._kv)

    def _grow_decodes(self, now: float, draft: Draft) -> None:
        """Gives those that the last plan left at the end of a page another, a victim's if none is left."""
        for request in self._page_ends:
            if request.status is not RequestStatus.RUNNING or request.num_tokens >= request.max_num_tokens:
                continue  # in the latter case the last token is being sampled
            if request.num_tokens <= len(request.page_ids) * self._kv.page_size:
                continue
            while self._kv.num_available == 0 and request.status is RequestStatus.RUNNING:
                self._preempt(self._policies.victim.choose(self._running), now, draft)
            if request.status is RequestStatus.RUNNING:
                draft.grow(request, request.num_tokens, self._kv)

    def _land(self, draft: Draft) -> None:
        """Lets those compute again whose pages have come back."""
        is_idle = not self._in_flight and self._host.num_loading == len(self._running)
        for request in self._host.land(waits_for_nothing_else=is_idle):
            self._kv.computed(request)
            draft.admit(request)

    def _make_room(self, ordering: Preempting, now: float, draft: Draft) -> None:
        """Lets the ordering take a slot from a running request for the head of the queue."""
        if self._step % _PREEMPTION_INTERVAL or self._policies.admission.holds_slots:
            return
        head = self._waiting.peek()
        if head is not None and not self._is_in_flight(head):
            victim = ordering.preempts(self._running, head, now)
            if victim is not None:
                self._preempt(victim, now, draft, for_id=head.id)

    def _is_in_flight(self, waiting: Request) -> bool:
        """Whether a step has a row of a request that waits: it was preempted after that was planned."""
        if waiting.status is not RequestStatus.PREEMPTED:
            return False
        return any(waiting in step.owners for step in self._in_flight)

    def _plan_prefills(self, prefills: list[Request], now: float, draft: Draft) -> None:
        """The next chunks of prompts that are partly computed, and then those of new requests."""
        # A batch that starts together must not be cut short by one step's budget: prompts for which none is
        # left take their slots now and are computed in the next steps.
        if not self._policies.admission.holds_slots:
            draft.budget = self._granted_tokens(prefills, now, draft)
        if self._ranking is not None and prefills:
            prefills.sort(key=self._ranking.rank)
            if self._waiting:
                self._admit(now, draft, ahead_of=self._ranking.rank(prefills[0]))
        for request in prefills:
            if draft.budget <= 0:
                break
            self._plan_chunk(request, draft)
        if self._waiting:
            self._admit(now, draft)

    def _plan_chunk(self, request: Request, draft: Draft) -> None:
        draft.plan_chunk(request, min(request.num_tokens - request.num_computed_tokens, draft.budget))
        self._kv.computed(request)

    def _granted_tokens(self, prefills: list[Request], now: float, draft: Draft) -> int:
        """How many prompt tokens the composition lets into this step."""
        if not prefills and not self._free_slots:
            return draft.budget  # nobody can use any
        view = StepView(
            now=now,
            decodes=draft.owners,
            budget_left=draft.budget,
            prefill_context=prefills[0].num_computed_tokens if prefills else 0,
            partial_tokens=sum([r.num_tokens - r.num_computed_tokens for r in prefills]),
            waiting_tokens=self._waiting.num_tokens,
            page_occupancy=self._kv.occupancy,
        )
        granted = min(self._policies.composition.prefill_tokens(view), draft.budget)
        if self._log is not None:
            self._log.composed(
                self._step, now, decodes=len(draft.owners), granted=granted, budget_left=draft.budget
            )
        return granted

    def _admit(self, now: float, draft: Draft, *, ahead_of: float | None = None) -> None:
        """Moves requests from the queue into slots, in order, until one does not fit: nobody is overtaken.

        With ``ahead_of``, only those that the ordering ranks before that.
        """
        is_batch = self._policies.admission.holds_slots
        free = len(self._free_slots)
        queue = self._waiting.view(
            now, num_running=len(self._running), num_held=len(self._held), num_free_slots=free
        )
        quota = min(self._policies.admission.quota(queue), free)
        while quota > 0 and (is_batch or draft.budget > 0):
            quota -= 1
            request = self._waiting.peek()
            if request is None or self._is_in_flight(request):  # a resumed request's tokens must be known
                return
            if ahead_of is not None and self._ranking is not None and self._ranking.rank(request) >= ahead_of:
                return
            match = self._kv.match(request)
            if match.is_claimed and not is_batch:  # those of one batch start together
                return
            view = self._kv.view(match, self._running, self._watermark_pages)
            # The whole prompt, not only its first chunk.
            if not self._policies.capacity.has_room(view, request, self._kv.new_pages(request, match)):
                return
            loads = self._swap.may_load(request, match.num_pages * self._kv.page_size)
            if loads and self._swap.is_busy:
                return
            self._start(request, match, now, is_saved=loads)
            if loads:
                self._swap.load(request, match.num_pages)
                continue
            self._swap.drop(request)
            if self._host.waits_for_prefix(request):
                continue
            draft.admit(request)
            if draft.budget > 0:
                self._plan_chunk(request, draft)

    def _start(self, request: Request, match: Match, now: float, *, is_saved: bool) -> None:
        if self._log is not None:
            key = self._waiting.key_of(request)
            self._log.admitted(self._step, now, request, key=key, ordering=self._policies.ordering)
        self._waiting.remove(request)
        self._observers.admitted(request, now)
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        found = self._kv.admit(request, match, now, may_load=not is_saved)
        if request.num_preemptions:
            self._num_lost_tokens -= found
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
            request.num_cached_tokens = found
        self._running.append(request)

    def _enqueue(self, request: Request, now: float) -> None:
        self._observers.queued(request, now)
        self._waiting.push(request, now)

    def _preempt(self, request: Request, now: float, draft: Draft, *, for_id: str | None = None) -> None:
        """Takes a running request's slot; what it computed is the prefix cache's, if there is one."""
        if self._log is not None:
            self._log.preempted(self._step, now, request.id, for_id=for_id)
        draft.drop_pages(request)
        self._swap.save(request, now)
        draft.preempted_ids.append(request.id)
        self._running.remove(request)
        self._give_up_slot(request, now)
        request.status = RequestStatus.PREEMPTED
        self._num_lost_tokens += request.num_computed_tokens
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(request, now)

    def _give_up_slot(self, request: Request, now: float, *, keep: bool = True) -> None:
        assert request.slot is not None
        self._free_slots.append(request.slot)
        request.slot = None
        self._kv.free(request, now, keep=keep)

    # ------------------------------------------------------------------ results

    def update(self, result: StepResult, now: float) -> StepUpdates:
        """Takes the result of the oldest step in flight; returns what changed."""
        step = self._in_flight.popleft()
        if result.arrived:
            self._host.arrived(result.arrived)
        updates = StepUpdates(logprobs=result.logprobs)
        for decode_step, token_ids in enumerate(result.token_ids):
            for index in [row for bad_step, row in result.bad_rows if bad_step == decode_step]:
                self._fail_row(step, index, now, updates)
            self._take_tokens(step, decode_step, token_ids, now, updates)
        self._release_batch(now)
        return updates

    def _take_tokens(
        self, step: StepInFlight, decode_step: int, token_ids: list[int], now: float, updates: StepUpdates
    ) -> None:
        """One token for each row that has one in a decode step, from 0."""
        rows, requests = step.plan.rows, step.owners
        if step.plan.is_loop or self._num_finished != step.num_finished or not all(rows.samples):
            live = live_rows(rows, requests, decode_step)
            requests, token_ids = list(compress(requests, live)), list(compress(token_ids, live))
            if updates.logprobs is not None:
                updates.logprobs = list(compress(updates.logprobs, live))
        for request, token_id in zip(requests, token_ids, strict=True):
            output = request.output_token_ids
            output.append(token_id)
            if token_id in request.stop_token_ids or len(output) >= request.next_limit:
                self._look_at(request, token_id, now, updates)
        if self._observers.want_tokens:
            self._observers.generated(requests, now)
        updates.extend(requests, token_ids)

    def _fail_row(self, step: StepInFlight, index: int, now: float, updates: StepUpdates) -> None:
        request = step.owners[index]
        if step.plan.rows.samples[index] and not request.is_finished:
            request.error = "the model produced logits that are not finite"
            self._leave(request, FinishReason.ERROR, now)
            updates.ended.append(request)

    def _look_at(self, request: Request, token_id: int, now: float, updates: StepUpdates) -> None:
        """Looks at a token that may be a request's first or last."""
        if request.first_token_time is None:
            request.first_token_time = now
            request.note_limit()
        reason = finish_reason(request, token_id)
        if reason is None:
            if len(request.output_token_ids) > request.predicted_output_upper:
                self._outgrown.append(request)
            return
        if reason is FinishReason.STOP:
            request.stop_reason = token_id
            updates.stopped.append(request)
        holds = self._policies.admission.holds_slots and request.status is RequestStatus.RUNNING
        self._leave(request, reason, now, holds_slot=holds)
        if not holds:
            updates.ended.append(request)

    def _leave(self, request: Request, reason: FinishReason, now: float, *, holds_slot: bool = False) -> None:
        """Takes a live request out of queue or slots; with ``holds_slot`` it keeps slot and pages for now."""
        was_waiting = request.status is not RequestStatus.RUNNING
        if not was_waiting:
            self._running.remove(request)
            if holds_slot:
                self._held.append(request)
            else:
                # Keys and values behind logits that are not finite are nobody else's to read.
                self._give_up_slot(request, now, keep=reason is not FinishReason.ERROR)
        else:
            self._waiting.remove(request)
        self._observers.left(request, now, was_waiting=was_waiting)
        self._swap.drop(request)
        del self._live[request.id]
        self._with_deadline.discard(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.finish_time = now
        self._num_finished += 1

    def _release_batch(self, now: float) -> None:
        """Ends a batch of which nobody runs any more: everybody waited for the longest."""
        if self._held and not self._running:
            for request in self._held:
                request.finish_time = now
                self._give_up_slot(request, now)
                self._ended.append(request)
            self._held.clear()

    def _expire(self, now: float) -> None:
        late = [r for r in self._with_deadline if r.deadline is not None and r.deadline <= now]
        for request in sorted(late, key=lambda r: r.id):
            self.end(request, FinishReason.DEADLINE, now)

    def check_integrity(self) -> None:
        """Raises RuntimeError if pages or slots are lost, doubled, or with someone who should have none."""
        holders = [*self._running, *self._held]
        self._kv.check_integrity(holders)
        self._host.check_integrity()
        check_slots(holders, self._free_slots, self._num_slots, self._waiting)
