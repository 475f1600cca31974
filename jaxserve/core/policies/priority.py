"""Ordering ``priority``: a weighted score of tier, urgency, size, waiting, history and load."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

from jaxserve.core.policies.fair import VirtualTokenCounters
from jaxserve.core.policies.sizes import ServiceTimes
from jaxserve.core.policies.starvation import NORMAL, PROMOTED, WaitCap
from jaxserve.core.policy import PolicyContext, SortKey
from jaxserve.request import Request

_REFRESH_S = 0.5
_FULL = 0.9  # page occupancy from which on memory counts
_SAMPLE = 512  # requests whose sizes the 95th percentile is taken of
_PERCENTILE = 0.95
_RESORT_EVERY = 32


class Factors(NamedTuple):
    """Each in [0, 1]; more is more urgent."""

    tier: float
    urgency: float
    shortness: float
    waiting: float
    history: float
    load: float


DEFAULT_WEIGHTS = Factors(0.25, 0.25, 0.25, 0.15, 0.05, 0.05)


def score_of(weights: Factors, factors: Factors) -> float:
    """The weighted sum."""
    return sum(weight * factor for weight, factor in zip(weights, factors, strict=True))


@final
class ScoredPriority:
    """Highest score first; with a wait cap, so that no tier starves another.

    - tier: the request's priority mapped to (0, 1): 0 gives a half, lower numbers more.
    - urgency: ``1 - slack / allowance``; slack is what is left until the deadline (the request's own, else
      the TTFT objective) when its predicted service is subtracted.
    - shortness: ``1 - size / 95th percentile of sizes``.
    - waiting: share of the wait cap.
    - history: above a half for clients that were served less than the mean client.
    - load: when pages are nearly all in use, ``1 - volume / 95th percentile`` (seconds x tokens held).

    Every factor of a request's last key is kept, and logged when it is admitted.
    """

    def __init__(
        self,
        times: ServiceTimes,
        *,
        max_wait_s: float,
        ttft_slo_s: float,
        page_occupancy: Callable[[], float],
        weights: Factors = DEFAULT_WEIGHTS,
    ) -> None:
        self._times = times
        self._cap = WaitCap(max_wait_s)
        self._ttft_slo_s = ttft_slo_s
        self._page_occupancy = page_occupancy
        self.weights = weights
        self._counters = VirtualTokenCounters()
        self._mean_service = 0.0
        self._sizes = _Percentile()
        self._volumes = _Percentile()
        self._factors: dict[Request, Factors] = {}

    @classmethod
    def from_context(cls, context: PolicyContext) -> ScoredPriority:
        return cls(
            ServiceTimes(context.costs, context.num_slots, context.token_budget),
            max_wait_s=context.config.max_wait_s,
            ttft_slo_s=context.config.ttft_slo_s,
            page_occupancy=context.page_occupancy,
        )

    # ------------------------------------------------------------------ order

    def key(self, request: Request, now: float) -> SortKey:
        factors = self._factors[request] = self.evaluate(request, now)
        if self._cap.is_promoted(request, now):
            return (PROMOTED, request.arrival_time)
        return (NORMAL, -score_of(self.weights, factors), request.arrival_time)

    def key_until(self, request: Request, now: float) -> float:
        if self._cap.is_promoted(request, now):
            return math.inf
        return min(self._cap.promotion_time(request), now + _REFRESH_S)

    def evaluate(self, request: Request, now: float) -> Factors:
        """The factors of a request at a time."""
        size_s = self._times.size_s(request)
        full = self._page_occupancy() > _FULL
        return Factors(
            tier=0.5 * (1.0 - request.priority / (1.0 + abs(request.priority))),
            urgency=self._urgency(request, size_s, now),
            shortness=_share_left(size_s, self._sizes.value),
            waiting=min(1.0, (now - request.arrival_time) / max(self._cap.limit_s(request), 1e-9)),
            history=self._history(request.client),
            load=_share_left(self._volume(request, size_s), self._volumes.value) if full else 0.0,
        )

    def factors(self, request: Request) -> Mapping[str, float]:
        return self._factors[request]._asdict()

    def _urgency(self, request: Request, size_s: float, now: float) -> float:
        if request.deadline is None:
            allowance_s, service_s = self._ttft_slo_s, self._times.prefill_s(request)
        else:
            allowance_s, service_s = request.deadline - request.arrival_time, size_s
        slack_s = request.arrival_time + allowance_s - now - service_s
        return min(1.0, max(0.0, 1.0 - slack_s / max(allowance_s, 1e-9)))

    def _history(self, client: str) -> float:
        mean = self._mean_service
        if mean <= 0.0:
            return 0.5
        return min(1.0, max(0.0, 0.5 + (mean - self._counters.counters.get(client, 0.0)) / (2.0 * mean)))

    def _volume(self, request: Request, size_s: float) -> float:
        return size_s * (request.num_tokens + 0.5 * self._times.remaining_tokens(request))

    # ------------------------------------------------------------------ events

    def queued(self, request: Request, now: float) -> None:
        size_s = self._times.size_s(request)
        self._sizes.add(size_s)
        self._volumes.add(self._volume(request, size_s))
        self._counters.queued(request, now)

    def admitted(self, request: Request, now: float) -> None:
        self._counters.admitted(request, now)
        del self._factors[request]

    def generated(self, requests: Sequence[Request], now: float) -> None:
        self._counters.generated(requests, now)
        counters = self._counters.counters.values()
        self._mean_service = sum(counters) / max(len(counters), 1)

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        self._counters.left(request, now, was_waiting=was_waiting)
        self._factors.pop(request, None)


def _share_left(value: float, most: float) -> float:
    return min(1.0, max(0.0, 1.0 - value / most)) if most > 0.0 else 0.0


@final
class _Percentile:
    """The 95th percentile of the newest values, sorted anew now and then."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=_SAMPLE)
        self._added = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self._newest.append(value)
        self._added += 1
        if self._added < _RESORT_EVERY or self._added % _RESORT_EVERY == 0:
            ordered = sorted(self._newest)
            self.value = ordered[min(len(ordered) - 1, int(_PERCENTILE * len(ordered)))]
