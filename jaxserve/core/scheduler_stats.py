"""What a scheduler says about itself."""

from __future__ import annotations

from typing import NamedTuple


class SchedulerStats(NamedTuple):
    """A snapshot of the queues and pages."""

    num_waiting: int
    num_running: int
    num_held: int
    num_used_pages: int  # by running requests
    num_cached_pages: int  # by the prefix cache alone
    num_usable_pages: int
    num_preemptions: int
    num_lost_tokens: int  # computed, lost to preemption, and not found or loaded again
    num_finished: int
