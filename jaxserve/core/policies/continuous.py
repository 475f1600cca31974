"""Admission ``continuous``: iteration-level batching (Orca, OSDI 2022, section 3.1)."""

from __future__ import annotations

from typing import final

from jaxserve.core.policy import QueueView


@final
class ContinuousAdmission:
    """A slot that is free may be taken in any step."""

    holds_slots = False

    def quota(self, view: QueueView) -> int:
        return view.num_free_slots
