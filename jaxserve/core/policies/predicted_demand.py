"""Capacity ``predicted``: a request may run if the predicted peak of the pages of all who run fits.

After MC-SF (arXiv 2502.07115): at every predicted end, those who still run then must fit. Here lengths are
distributions. At a time ``t`` steps from now request j still runs with probability p_j(t), and then holds
n_j(t) pages. Demand at that time has the mean sum(p n) and the variance sum(p (1 - p) n^2), for lengths that
are independent; its quantile must fit at every t. With lengths that are known this is MC-SF.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, final

import numpy as np
import numpy.typing as npt

from jaxserve.core.policy import PagesView, PolicyContext
from jaxserve.request import Request, RequestStatus

_NORMAL: Final = NormalDist()
_UPPER_Z: Final = _NORMAL.inv_cdf(0.9)  # of `Request.predicted_output_upper`
_LEAST_SIGMA = 1e-6
_FARTHEST_Z = 5.0
_Z: Final = np.linspace(-_FARTHEST_Z, _FARTHEST_Z, 4001)
# Certain at both ends, so that what is known is exact.
_SURVIVAL: Final = np.array([1.0, *(1.0 - _NORMAL.cdf(z) for z in _Z[1:-1]), 0.0])
_MOST_TIMES = 64
# A refusal holds until somebody leaves or joins; predictions may change meanwhile.
_REFUSED_ASKS = 16
_MARGIN_STEP = 0.005
_MOST_MARGIN = 0.3

Float64Array = npt.NDArray[np.float64]


@final
class PredictedDemand:
    """Admits by the quantile of the predicted peak demand, and learns how far to trust it.

    Predictions may be wrong in ways that their quantiles do not say. So a share of the pages is left free
    that grows when a request is preempted and shrinks when one finishes: it comes to rest where ``target`` of
    the requests are preempted, or at none. With a ``target`` of 1 there is none.

    Args:
        page_size: tokens of a KV page.
        quantile: of the demand that must fit; more admits fewer.
        lag: tokens that others make after a request's last one while it still holds its pages.
        target: share of the requests that may be preempted.
    """

    def __init__(self, page_size: int, quantile: float, lag: int = 0, *, target: float = 0.02) -> None:
        self._page_size = page_size
        self._z = _NORMAL.inv_cdf(quantile)
        self._lag = lag
        self._target = target
        self.margin = 0.0
        self._refused: Request | None = None
        self._asks = 0

    @classmethod
    def from_context(cls, context: PolicyContext) -> PredictedDemand:
        config = context.config
        # The rest of its own decode loop, if it ends at the first token of that, and the loops in flight.
        lag = (config.pipeline_depth + 1) * config.max_decode_steps - 1
        return cls(context.page_size, config.demand_quantile, lag, target=config.preempted_target)

    def has_room(self, view: PagesView, request: Request, num_pages: int) -> bool:
        if num_pages > view.num_available:
            return False
        if not view.running:
            return True
        if request is self._refused and self._asks < _REFUSED_ASKS:
            self._asks += 1
            return False
        # The watermark is for what times are off by: prompts not computed yet, ends learnt a step late.
        capacity = (1.0 - self.margin) * view.num_usable - view.watermark_pages
        fits = self.peak(view, request, num_pages) <= capacity
        self._refused, self._asks = (None if fits else request), 0
        return fits

    def peak(self, view: PagesView, request: Request, num_pages: int) -> float:
        """Pages of all who run, and a request that takes so many new ones, when they need most."""
        requests = [*view.running, request]
        lengths = np.array([_length(r) for r in requests], np.float64)  # median, sigma, most, generated
        median, sigma, most, generated = lengths.T
        context = np.array([r.num_tokens for r in requests], np.float64)
        held = np.array([len(r.page_ids) for r in view.running] + [num_pages], np.float64)
        remaining = np.maximum(np.ceil(median - generated), 1.0)
        ends = _times(remaining)[:, None]
        times = ends + self._lag
        # Requests share pages of prefixes, and more than the running hold some: neither is in the tables.
        other = view.num_used - float(held[:-1].sum())
        before = _survival((generated + 0.5) / median, sigma)
        alive = _survival((generated + ends - 0.5) / median, sigma) / np.maximum(before, 1e-6)
        alive = np.where(generated + ends <= most, np.minimum(alive, 1.0), 0.0)
        # What is held now and shared counts once, so tables are compared with tables.
        tables = np.ceil((context + times) / self._page_size)
        tables[:, -1] -= math.ceil(context[-1] / self._page_size) - num_pages
        mean = (alive * tables).sum(1) + other * alive.mean(1)
        spread = np.sqrt((alive * (1.0 - alive) * tables**2).sum(1))
        now = view.num_used + num_pages
        return float(max((mean + self._z * spread).max(), now))

    def queued(self, request: Request, now: float) -> None:
        if request.status is RequestStatus.PREEMPTED:
            self._changed(_MARGIN_STEP if self._target < 1.0 else 0.0)

    def admitted(self, request: Request, now: float) -> None:
        self._refused = None

    def left(self, request: Request, now: float, *, was_waiting: bool) -> None:
        self._changed(-_MARGIN_STEP * self._target)

    def _changed(self, margin: float) -> None:
        self.margin = min(max(self.margin + margin, 0.0), _MOST_MARGIN)
        self._refused = None


def _length(request: Request) -> tuple[float, float, float, float]:
    """Median and logarithmic sigma of the output's length, its limit, and what was generated."""
    median, upper = request.predicted_output_tokens, request.predicted_output_upper
    most, generated = float(request.max_tokens), request.num_tokens - request.num_prompt_tokens
    if median is None:
        median = upper = most
    median = max(median, 1.0)
    sigma = math.log(max(min(upper, most), median) / median) / _UPPER_Z
    return median, max(sigma, _LEAST_SIGMA), most, float(generated)


def _survival(ratio: Float64Array, sigma: Float64Array) -> Float64Array:
    """Probability that a length, log-normal around 1, is more than a ratio."""
    z = np.log(np.maximum(ratio, 1e-9)) / sigma
    nearest = np.clip(z, -_FARTHEST_Z, _FARTHEST_Z) * (len(_Z) // 2 / _FARTHEST_Z) + len(_Z) // 2 + 0.5
    return _SURVIVAL[nearest.astype(np.intp)]


def _times(remaining: Float64Array) -> Float64Array:
    """When to look: at the expected ends, or quantiles of them if they are many."""
    ends = np.unique(remaining)
    if len(ends) <= _MOST_TIMES:
        return ends
    chosen: Sequence[int] = np.linspace(0, len(ends) - 1, _MOST_TIMES).astype(int).tolist()
    return ends[chosen]
