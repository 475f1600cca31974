"""The scheduler's four decisions, each behind a small interface: order, admission, composition, victim.

A policy is pure: it sees requests and a view, and returns a decision. Adding one is a class here and a line
in its dictionary; flags, engine and tests read the dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, final

from jaxserve.config import SchedulerConfig
from jaxserve.request import Request

type SortKey = tuple[float, ...]


class QueueView(NamedTuple):
    """What admission may look at. Times are on the engine's clock, in seconds.

    Attributes:
        now: the time of this decision.
        num_waiting: requests in the queue.
        oldest_arrival, newest_arrival: of the waiting requests (``now`` if none waits).
        num_running: requests that hold a slot and are not finished.
        num_held: slots kept by finished requests of a batch that is not done.
        num_free_slots: slots that nobody holds.
    """

    now: float
    num_waiting: int
    oldest_arrival: float
    newest_arrival: float
    num_running: int
    num_held: int
    num_free_slots: int


class OrderingPolicy(Protocol):
    """In which order waiting requests are considered."""

    def key(self, request: Request) -> SortKey:
        """Smaller runs earlier; computed when the request joins the queue."""
        ...


class AdmissionPolicy(Protocol):
    """When requests may take free slots."""

    @property
    def holds_slots(self) -> bool:
        """Whether a finished request keeps its slot until its whole batch is done."""
        ...

    def quota(self, view: QueueView) -> int:
        """How many requests may be admitted now (slots and pages are checked by the scheduler)."""
        ...


class CompositionPolicy(Protocol):
    """How the token budget of a step is spent on prefill; decodes come first and are never paused."""

    def chunk(self, remaining: int, budget_left: int) -> int:
        """Tokens to compute now of a prompt that lacks ``remaining``; 0 ends the step's prefill."""
        ...


class VictimPolicy(Protocol):
    """Who gives up its pages when none is left."""

    def choose(self, running: Sequence[Request]) -> Request:
        """One of the running requests (at least one is given)."""
        ...


@final
class FirstComeFirstServed:
    """By arrival, ties by id: deterministic for recorded runs."""

    def key(self, request: Request) -> SortKey:
        return (request.arrival_time,)


@final
class PriorityOrder:
    """By the request's priority (lower first), then by arrival."""

    def key(self, request: Request) -> SortKey:
        return (request.priority, request.arrival_time)


@final
class ContinuousAdmission:
    """Iteration-level batching (Orca, section 3.1): a slot that is free may be taken in any step."""

    holds_slots = False

    def quota(self, view: QueueView) -> int:
        return view.num_free_slots


@final
class StaticAdmission:
    """Fixed batches: the next one starts when the last is done and either all slots can be filled or nobody
    has arrived for ``idle_s`` seconds, so that the tail of a workload is not kept waiting for ever.
    """

    holds_slots = True

    def __init__(self, batch_size: int, idle_s: float) -> None:
        self._batch_size = batch_size
        self._idle_s = idle_s

    def quota(self, view: QueueView) -> int:
        if view.num_running or view.num_held:
            return 0
        is_full = view.num_waiting >= self._batch_size
        return self._batch_size if is_full or view.now - view.newest_arrival >= self._idle_s else 0


@final
class DynamicAdmission:
    """Request-level batches formed on arrival (Triton's dynamic batcher): a batch starts when it is full or
    its oldest request has waited ``window_s`` seconds, and then runs to its end.
    """

    holds_slots = True

    def __init__(self, batch_size: int, window_s: float) -> None:
        self._batch_size = batch_size
        self._window_s = window_s

    def quota(self, view: QueueView) -> int:
        if view.num_running or view.num_held:
            return 0
        is_due = view.num_waiting >= self._batch_size or view.now - view.oldest_arrival >= self._window_s
        return self._batch_size if is_due else 0


@final
class ChunkedPrefill:
    """Stall-free batching (Sarathi-Serve, section 4.2): prompts take what the decodes leave of the budget."""

    def chunk(self, remaining: int, budget_left: int) -> int:
        return min(remaining, budget_left)


@final
class LatestVictim:
    """Whoever joined last: the least work is lost, and the oldest always makes progress."""

    def choose(self, running: Sequence[Request]) -> Request:
        return running[-1]


@final
class LeastUrgentVictim:
    """Of those with the worst priority, whoever joined last."""

    def choose(self, running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda request: request.priority)


class Policies(NamedTuple):
    """One choice of each kind."""

    ordering: OrderingPolicy
    admission: AdmissionPolicy
    composition: CompositionPolicy
    victim: VictimPolicy


ORDERINGS: dict[str, Callable[[], OrderingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": PriorityOrder,
}
# Orderings for which the latest is the wrong victim: they would preempt whom they have just admitted.
VICTIMS: dict[str, Callable[[], VictimPolicy]] = {
    "priority": LeastUrgentVictim,
}
ADMISSIONS: dict[str, Callable[[int, float], AdmissionPolicy]] = {
    "continuous": lambda batch_size, window_s: ContinuousAdmission(),
    "static": StaticAdmission,
    "dynamic": DynamicAdmission,
}


def make_policies(config: SchedulerConfig, num_slots: int) -> Policies:
    """The policies that a configuration names."""
    return Policies(
        ordering=ORDERINGS[config.ordering](),
        admission=ADMISSIONS[config.batching](num_slots, config.batch_window_s),
        composition=ChunkedPrefill(),
        victim=VICTIMS.get(config.ordering, LatestVictim)(),
    )
