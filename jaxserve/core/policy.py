"""The scheduler's five decisions, each behind an interface: order, admission, capacity, composition, victim.

A policy sees requests and views, and returns a decision; what it remembers it learnt from the events that it
asks for. Nothing here reads a clock, draws a random number or keeps a global: a plan is a function of state,
time and configuration, and a recorded run replays exactly. The policies themselves are files in
`jaxserve/core/policies`, found by name in `registry.py` there.

Capabilities beyond the five interfaces are small protocols of their own (`ChangingKeys`, `LanedOrdering`,
`RankingPrefills`, `Preempting`, `RequestObserver`, `TokenObserver`, `Explaining`); a policy has one by having
its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxserve.config import SchedulerConfig
from jaxserve.core.cost_model import CostModel
from jaxserve.core.resume_costs import ResumeCosts
from jaxserve.request import Request

type SortKey = tuple[float, ...]


class PolicyContext(NamedTuple):
    """What a policy may be made from.

    Attributes:
        config: the scheduler's options.
        num_slots: requests that run at once.
        token_budget: most tokens of one step.
        chunk_sizes: token counts of the compiled shapes for steps with prefill, increasing.
        costs: what steps cost; refined while the engine runs.
        resume: what it costs to put a preempted request back.
        page_size: tokens of a KV page.
        matched_tokens: leading prompt tokens of a request that are in the cache already.
        page_occupancy: share of the KV pages in use.
    """

    config: SchedulerConfig
    num_slots: int
    token_budget: int
    chunk_sizes: tuple[int, ...]
    costs: CostModel
    resume: ResumeCosts
    page_size: int
    matched_tokens: Callable[[Request], int]
    page_occupancy: Callable[[], float]


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


class PagesView(NamedTuple):
    """What capacity may look at.

    Attributes:
        running: requests that hold a slot and are not finished.
        num_usable: KV pages that requests can own.
        num_used: of these, those that running and held requests own; one that several share counts once.
        num_available: those that can be given out now.
        watermark_pages: those that the configuration wants left free.
    """

    running: Sequence[Request]
    num_usable: int
    num_used: int
    num_available: int
    watermark_pages: int


class StepView(NamedTuple):
    """What composition may look at, when the decodes of a step are planned and its prefill is not.

    Attributes:
        now: the time of this decision, in seconds on the engine's clock.
        decodes: the requests that decode one token in this step.
        budget_left: tokens that the step can still hold.
        prefill_context: tokens computed already of the prompt that is next.
        partial_tokens: prompt tokens that running requests still lack.
        waiting_tokens: tokens of all waiting requests.
        page_occupancy: share of the KV pages in use.
    """

    now: float
    decodes: Sequence[Request]
    budget_left: int
    prefill_context: int
    partial_tokens: int
    waiting_tokens: int
    page_occupancy: float


class OrderingPolicy(Protocol):
    """In which order waiting requests are considered."""

    def key(self, request: Request, now: float) -> SortKey:
        """Smaller runs earlier; computed when the request joins the queue."""
        ...


@runtime_checkable
class ChangingKeys(Protocol):
    """An ordering whose keys change while requests wait."""

    def key_until(self, request: Request, now: float) -> float:
        """Until when (seconds) the key computed at ``now`` holds; ``math.inf`` for ever."""
        ...


@runtime_checkable
class LanedOrdering(Protocol):
    """An ordering with a lane for each client: first the lanes are compared, then the keys of their heads."""

    def lane(self, request: Request, now: float) -> str:
        """The lane that a request joins; asked again whenever its key is."""
        ...

    def lane_key(self, lane: str) -> float:
        """Smaller runs earlier. While a lane has members its key must not fall."""
        ...


@runtime_checkable
class RankingPrefills(Protocol):
    """An ordering that also says which prompt a step's chunk goes to; otherwise who began first goes on."""

    def rank(self, request: Request) -> float:
        """Smaller first, among running prompts that are partly computed and the head of the queue."""
        ...


@runtime_checkable
class Preempting(Protocol):
    """An ordering that may take a slot from a running request for the head of the queue."""

    def preempts(self, running: Sequence[Request], head: Request, now: float) -> Request | None:
        """Who must make room for ``head``, or None; asked now and then while no slot is free."""
        ...


@runtime_checkable
class RequestObserver(Protocol):
    """A policy that is told what becomes of requests."""

    def queued(self, request: Request, now: float) -> None:
        """It joins the queue, for the first time or preempted; told before its key is asked for."""
        ...

    def admitted(self, request: Request, now: float) -> None:
        """It left the queue for a slot."""
        ...

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        """It finished, or was ended while it waited."""
        ...


@runtime_checkable
class TokenObserver(Protocol):
    """A policy that is told of every token."""

    def generated(self, requests: Sequence[Request], now: float) -> None:
        """Each of them got one more output token, its last perhaps; called once a step, after ``left``."""
        ...


@runtime_checkable
class Explaining(Protocol):
    """An ordering that can say why a request stands where it stands."""

    def factors(self, request: Request) -> Mapping[str, float]:
        """What went into its last key, by name, for the decision log."""
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


class CapacityPolicy(Protocol):
    """Whether the pages suffice for one more request. Pages themselves are taken when they are needed."""

    def has_room(self, view: PagesView, request: Request, num_pages: int) -> bool:
        """Whether a request that takes so many new pages now may run beside the others.

        Never more than ``view.num_available``, and always true where nobody runs and they are available.
        """
        ...


class CompositionPolicy(Protocol):
    """How much of a step's token budget goes to prompts; decodes come first and are never paused."""

    def prefill_tokens(self, view: StepView) -> int:
        """Most prompt tokens that this step may compute; asked only if there are some."""
        ...


class VictimPolicy(Protocol):
    """Who gives up its pages when none is left."""

    def choose(self, running: Sequence[Request]) -> Request:
        """One of the running requests (at least one is given)."""
        ...


class Policies(NamedTuple):
    """One choice of each kind."""

    ordering: OrderingPolicy
    admission: AdmissionPolicy
    capacity: CapacityPolicy
    composition: CompositionPolicy
    victim: VictimPolicy
