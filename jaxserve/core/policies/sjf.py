"""Ordering ``sjf``: shortest job first by predicted size, with a wait cap, preemption and time slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

from jaxserve.core.policies.fair import VirtualTokenCounters
from jaxserve.core.policies.sizes import ServiceTimes
from jaxserve.core.policies.starvation import NORMAL, PROMOTED, IdleRule, WaitCap
from jaxserve.core.policy import PolicyContext, SortKey
from jaxserve.request import Request

# A running request gives way only in the first part of its predicted output (TRAIL, arXiv 2410.01035).
PREEMPTIBLE_SHARE = 0.8
# ... and only for one that is shorter by this share of its own size.
LEAST_GAIN = 0.2
FIRST_SLICE = 512  # output tokens; doubles with every slice
QUANTUM_BUDGETS = 8  # token budgets of a step that a client may be ahead of another that waits
_PROMOTED_LANE = "!"  # no client is called so: see `validation.check_client`


@final
class ShortestJobFirst:
    """Smallest ``size - gamma * wait`` first; promoted requests before all others, by arrival.

    The size is the predicted service time: what is left of the prompt, and the output at a quantile above
    its median (pessimism under uncertainty). Waiting lowers every key alike, so keys do not change with time
    but for the promotion: with gamma alone, a request overtakes a fresh one of size s after
    ``(its size - s) / gamma`` seconds.

    *Preemption* (limited): when no slot is free, the running request that is longest gives way to the head
    of the queue, if it has not generated much of its prediction, is longer by a fifth of its size, and the
    exchange pays. What the head gains is the wait for the next slot to become free: for exponential remaining
    times ``1 / sum(1 / size)``, which is short where there are many slots. What it costs is the head's size,
    by which the other is delayed, and the time to compute the other's pages again, for all that run.

    *Time slices*: a request that outgrows its upper quantile was taken for short by mistake. It is then as
    long as its slice, 512 output tokens doubling with each, and may be preempted once in each of them.

    *Clients*: those that had a quantum of service more than another that waits come after it, whatever their
    sizes; within a quantum only sizes count. Promoted requests come before all others, whoever sent them.
    With one client there is nobody to come after.

    *Standing still*: a preempted request is promoted after 200 steps, and then runs ten undisturbed.

    Args:
        times: sizes.
        max_wait_s: a waiting request is promoted after so many seconds.
        gamma: seconds of size that a second of waiting is worth.
        quantum: weighted tokens (`VirtualTokenCounters`) that a client may be ahead.
    """

    def __init__(
        self, times: ServiceTimes, max_wait_s: float, gamma: float = 0.02, quantum: float = math.inf
    ) -> None:
        self._times = times
        self._cap = WaitCap(max_wait_s)
        self._idle = IdleRule()
        self._clients = VirtualTokenCounters()
        self._gamma = gamma
        self._quantum = quantum
        self._slices: dict[Request, int] = {}  # of those that outgrew their prediction: how often
        self._initial: dict[Request, float] = {}  # first predictions of those running
        self._ends: dict[Request, float] = {}  # output tokens at which the present slice is used up
        self._yielded: dict[Request, int] = {}  # slice in which a request was preempted last

    @classmethod
    def from_context(cls, context: PolicyContext) -> ShortestJobFirst:
        times = ServiceTimes(context.costs, context.num_slots, context.token_budget)
        return cls(times, context.config.max_wait_s, quantum=QUANTUM_BUDGETS * context.token_budget)

    # ------------------------------------------------------------------ order

    def key(self, request: Request, now: float) -> SortKey:
        if self._is_promoted(request, now):
            return (PROMOTED, request.arrival_time)
        return (NORMAL, self._size_s(request) + self._gamma * request.arrival_time)

    def key_until(self, request: Request, now: float) -> float:
        until = self._cap.until(request, now)
        left = self._idle.idle_steps_left(request)
        if left is None or self._is_promoted(request, now):
            return until
        return min(until, now + left * self._times.token_s)  # steps have no clock: then it is asked again

    def lane(self, request: Request, now: float) -> str:
        return _PROMOTED_LANE if self._is_promoted(request, now) else request.client

    def lane_key(self, lane: str) -> float:
        return PROMOTED if lane == _PROMOTED_LANE else self._clients.counters[lane] // self._quantum

    def _is_promoted(self, request: Request, now: float) -> bool:
        return self._cap.is_promoted(request, now) or self._idle.idle_steps_left(request) == 0

    def factors(self, request: Request) -> Mapping[str, float]:
        return {
            "size_s": self._size_s(request),
            "prefill_s": self._times.prefill_s(request),
            "remaining_tokens": self._times.remaining_tokens(request),
            "promotion_time": self._cap.promotion_time(request),
            "slices": float(self._slices.get(request, 0)),
        }

    def _size_s(self, request: Request) -> float:
        size_s = self._times.size_s(request)
        outgrown = self._slices.get(request, 0)
        if outgrown == 0:
            return size_s
        return max(size_s, FIRST_SLICE * 2 ** (outgrown - 1) * self._times.token_s)

    # ------------------------------------------------------------------ events

    def queued(self, request: Request, now: float) -> None:
        self._idle.queued(request)
        self._clients.queued(request, now)
        if request.predicted_output_tokens is not None:
            self._initial.setdefault(request, request.predicted_output_tokens)
            self._ends.setdefault(request, request.predicted_output_upper)

    def admitted(self, request: Request, now: float) -> None:
        self._idle.admitted(request)
        self._clients.admitted(request, now)

    def generated(self, requests: Sequence[Request], now: float) -> None:
        self._idle.step_done()
        self._clients.generated(requests, now)
        ends = self._ends
        for request in requests:
            generated = len(request.output_token_ids)
            if generated > ends.get(request, math.inf):
                outgrown = self._slices.get(request, 0) + 1
                self._slices[request] = outgrown
                ends[request] = generated + FIRST_SLICE * 2.0 ** (outgrown - 1)

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        self._idle.left(request)
        self._clients.left(request, now, was_waiting=was_waiting)
        for memory in (self._slices, self._initial, self._ends, self._yielded):
            memory.pop(request, None)

    # ------------------------------------------------------------------ preemption

    def preempts(self, running: Sequence[Request], head: Request, now: float) -> Request | None:
        if self._is_promoted(head, now):
            return None  # its turn comes by arrival; nobody is thrown out for it
        size_s = self._size_s(head)
        sizes = [self._size_s(request) for request in running]
        slot_wait_s = 1.0 / sum([1.0 / own_s for own_s in sizes])
        most_cost_s = slot_wait_s - size_s
        if most_cost_s <= 0.0:
            return None
        best, longest_s = None, 0.0
        for request, own_s in zip(running, sizes, strict=True):
            is_longer = own_s > longest_s and own_s - size_s > LEAST_GAIN * own_s
            if is_longer and self._cost_s(request, len(running)) < most_cost_s and self._may_yield(request):
                best, longest_s = request, own_s
        if best is not None:
            self._yielded[best] = self._slices.get(best, 0)
        return best

    def _cost_s(self, request: Request, num_running: int) -> float:
        """What it costs to compute a request's pages once more: everybody waits for it."""
        return self._times.recompute_s(request) * num_running

    def _may_yield(self, request: Request) -> bool:
        if request.num_computed_tokens < request.num_prompt_tokens:
            return False  # its prompt is being computed: all of that would be lost
        if self._idle.is_granted(request):
            return False
        current = self._slices.get(request, 0)
        if self._yielded.get(request, -1) >= current:
            return False  # once a slice: it must get on
        generated = len(request.output_token_ids)
        return current > 0 or generated < PREEMPTIBLE_SHARE * self._initial.get(request, 0.0)
