"""How much service each client had: what the two fair orderings keep alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxserve.request import Request

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class ClientService:
    """Counters of weighted tokens (Sheng et al., OSDI 2024, section 4.1), and which clients are waiting.

    Attributes:
        of: client -> the service it had, as its ordering counts it.
        waiting: client -> its requests in the queue; only those with any.
    """

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self.waiting: Counter[str] = Counter()

    def raise_to(self, client: str, floor: float) -> None:
        """Lifts a client to a level that it may not lie below."""
        self.of[client] = max(self.of.get(client, 0.0), floor)

    def prompt_computed(self, request: Request, num_tokens: int) -> None:
        """Charges a request that was admitted for its prompt; what is computed once more is no service."""
        if request.num_preemptions == 0:
            self.of[request.client] += INPUT_WEIGHT * num_tokens

    def generated(self, requests: Sequence[Request]) -> None:
        """Charges a token of output for each request."""
        service = self.of
        for request in requests:
            if request.client in service:
                service[request.client] += OUTPUT_WEIGHT

    def stop_waiting(self, client: str) -> None:
        """Takes one request of a client out of the count."""
        self.waiting[client] -= 1
        if self.waiting[client] == 0:
            del self.waiting[client]
