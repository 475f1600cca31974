"""The *prepare* stage: a plan becomes the few small integer arrays that a step sends to the device.

Host only: numpy in, numpy out, no jax. What a steady decode step sends is ``rows`` and the handful of new
pages; tokens, page tables and sampling parameters already live in the device's slot arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.core.plan import StepPlan, StepResult

Int32Array = npt.NDArray[np.int32]

NUM_ROW_FIELDS = 4
NUM_PAGE_FIELDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StepBatch:
    """A plan and its device inputs.

    Attributes:
        plan: what this batch runs.
        rows: int32 [4, bucket.rows]: slot, start, number of tokens, samples (0 or 1). Padding rows have
            slot ``num_slots`` (out of range: reads of it are masked, writes dropped) and no tokens.
        page_updates: int32 [3, bucket.rows]: slot, column, page; padding has slot ``num_slots``.
    """

    plan: StepPlan
    rows: Int32Array
    page_updates: Int32Array


def prepare(plan: StepPlan, *, num_slots: int) -> StepBatch:
    """Builds the device inputs of a plan."""
    bucket = plan.bucket
    rows = np.zeros((NUM_ROW_FIELDS, bucket.rows), np.int32)
    rows[0] = num_slots
    columns = (plan.rows.slots, plan.rows.starts, plan.rows.num_tokens, plan.rows.samples)
    rows[:, : len(plan.rows)] = columns
    updates = np.zeros((NUM_PAGE_FIELDS, bucket.rows), np.int32)
    updates[0] = num_slots
    if plan.page_updates:
        updates[:, : len(plan.page_updates)] = np.array(plan.page_updates, np.int32).T
    return StepBatch(plan, rows, updates)


class Executor[Handle](Protocol):
    """Runs batches in the order in which they were dispatched.

    Order is the contract that makes freeing safe: a page or slot given up by one plan may be given to a
    request in a later plan at once, because every step that still touches it was dispatched before.

    Either method may raise `jaxserve.errors.StepFailedError` for a step that the device could not run. All
    steps in flight are lost then, with what any page or slot held, and the next step may be dispatched.
    """

    def dispatch(self, batch: StepBatch) -> Handle:
        """Starts a step and returns at once."""
        ...

    def collect(self, handle: Handle) -> StepResult:
        """Waits for a step's result; called once per handle, in dispatch order."""
        ...
