"""Why the scheduler did what it did: one flat record a decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TextIO, final

from jaxserve.core.policy import Explaining, OrderingPolicy
from jaxserve.request import Request


@final
class DecisionLog:
    """Hands records of decisions to a sink. Every record has ``step``, ``now`` (seconds) and ``decision``."""

    def __init__(self, sink: Callable[[dict[str, Any]], None]) -> None:
        self._sink = sink

    def admitted(
        self, step: int, now: float, request: Request, *, key: Sequence[float], ordering: OrderingPolicy
    ) -> None:
        """A request got a slot: by which key it stood first, and what went into that key."""
        factors = dict(ordering.factors(request)) if isinstance(ordering, Explaining) else {}
        waited_s = now - request.arrival_time
        self._write("admit", step, now, request=request.id, waited_s=waited_s, key=list(key), factors=factors)

    def preempted(self, step: int, now: float, request_id: str, *, for_id: str | None) -> None:
        """A request lost its slot: for the head of the queue, or (None) for want of pages."""
        self._write("preempt", step, now, request=request_id, **{"for": for_id})

    def composed(self, step: int, now: float, *, decodes: int, granted: int, budget_left: int) -> None:
        """Prompts were granted so many of the tokens that the decodes left."""
        self._write("compose", step, now, decodes=decodes, granted=granted, budget_left=budget_left)

    def _write(self, decision: str, step: int, now: float, **fields: Any) -> None:
        self._sink({"step": step, "now": now, "decision": decision, **fields})


def json_lines(file: TextIO) -> Callable[[dict[str, Any]], None]:
    """A sink that writes one JSON object a line to an open file."""
    return lambda record: print(json.dumps(record), file=file)
