"""How much service a request still needs, in seconds, from predicted lengths and the cost model."""

from __future__ import annotations

from typing import final

from jaxserve.core.cost_model import CostModel, StepFeatures
from jaxserve.core.plan import Bucket
from jaxserve.request import Request

_CONTEXT = 512  # a typical one: sizes must compare requests, not predict their latency
_REFRESH_STEPS = 256


@final
class ServiceTimes:
    """Seconds a prompt token and an output token take in a full engine; refreshed as the cost model learns.

    Sizes of different requests are compared, so one pair of rates holds for all of them at a time.

    Args:
        costs: predicts steps.
        num_slots: rows of the decode step that an output token is a part of.
        chunk: tokens of the step that a prompt token is a part of.
        pessimism: how far from the median to the upper quantile a length is taken to be (zeta, 8.5).
    """

    def __init__(self, costs: CostModel, num_slots: int, chunk: int, pessimism: float = 0.25) -> None:
        self._costs = costs
        self._decode_bucket = Bucket(num_slots, num_slots)
        self._decode = StepFeatures(num_slots, num_slots * _CONTEXT, 0.0, num_slots)
        self._prefill_bucket = Bucket(chunk, num_slots)
        self._prefill = StepFeatures(0, 0, 0.0, 0).with_prefill(chunk, 0)
        self._pessimism = pessimism
        self._uses = 0
        self._refresh()

    def _refresh(self) -> None:
        self.token_s = self._costs.predict(self._decode_bucket, self._decode)
        self.prompt_token_s = self._costs.predict(self._prefill_bucket, self._prefill) / self._prefill.tokens

    def size_s(self, request: Request) -> float:
        """Seconds of service that a request lacks, if it ran now in a full engine."""
        self._uses += 1
        if self._uses % _REFRESH_STEPS == 0:
            self._refresh()
        return self.prefill_s(request) + self.remaining_tokens(request) * self.token_s

    def prefill_s(self, request: Request) -> float:
        """Seconds to compute what is not computed of prompt (and, once preempted, of the output)."""
        return (request.num_tokens - request.num_computed_tokens) * self.prompt_token_s

    def recompute_s(self, request: Request) -> float:
        """Seconds to compute once more what a running request has in its pages."""
        return request.num_computed_tokens * self.prompt_token_s

    def remaining_tokens(self, request: Request) -> float:
        """Output tokens still to come, pessimistic under uncertainty."""
        median, upper = request.predicted_output_tokens, request.predicted_output_upper
        if median is None:
            median = upper = float(request.max_tokens)
        expected = median + self._pessimism * (upper - median)
        return max(1.0, expected - len(request.output_token_ids))
