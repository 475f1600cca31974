"""Admission ``static``: fixed batches."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import QueueView


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
