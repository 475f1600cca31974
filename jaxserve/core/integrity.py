"""What must always hold of slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.request import Request


def check_slots(
    holders: Sequence[Request], free_slots: Iterable[int], num_slots: int, waiting: Iterable[Request]
) -> None:
    """Raises RuntimeError if slots are lost or doubled, or a waiting request owns something."""
    taken = [request.slot for request in holders if request.slot is not None]
    slots = sorted([*free_slots, *taken])
    if slots != list(range(num_slots)) or len(taken) != len(holders):
        raise RuntimeError(f"slots are lost or doubled: {slots}")
    for request in waiting:
        if request.page_ids or request.slot is not None:
            raise RuntimeError(f"waiting request {request.id} owns pages or a slot")
