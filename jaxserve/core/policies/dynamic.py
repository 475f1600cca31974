"""Admission ``dynamic``: request-level batches formed on arrival (Triton's dynamic batcher)."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import QueueView


@final
class DynamicAdmission:
    """A batch starts when it is full or its oldest request has waited ``window_s`` seconds, and then runs to
    its end.
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
