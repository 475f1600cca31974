"""The *prepare* stage: a plan becomes the few small integer arrays that a step sends to the device.

Host only: numpy in, numpy out, no jax. What a steady decode step sends is one small array; tokens, page
tables and sampling parameters already live in the device's slot arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.core.plan import StepPlan, StepResult

Int32Array = npt.NDArray[np.int32]

NUM_ROW_FIELDS = 4
NUM_FIELDS = NUM_ROW_FIELDS + 3


@dataclasses.dataclass(frozen=True, slots=True)
class StepBatch:
    """A plan and its device inputs.

    Attributes:
        plan: what this batch runs.
        inputs: int32 [7, bucket.rows], one copy to the device. Of each row: slot, start, number of tokens,
            samples (0 or 1). Padding rows have slot ``num_slots`` (out of range: reads of it are masked,
            writes dropped) and no tokens. Then of each new page: slot, column, page; padding has slot
            ``num_slots``.
    """

    plan: StepPlan
    inputs: Int32Array


def prepare(plan: StepPlan, *, num_slots: int) -> StepBatch:
    """Builds the device inputs of a plan."""
    bucket = plan.bucket
    inputs = np.zeros((NUM_FIELDS, bucket.rows), np.int32)
    rows, updates = inputs[:NUM_ROW_FIELDS], inputs[NUM_ROW_FIELDS:]
    rows[0] = num_slots
    columns = (plan.rows.slots, plan.rows.starts, plan.rows.num_tokens, plan.rows.samples)
    rows[:, : len(plan.rows)] = columns
    updates[0] = num_slots
    if plan.page_updates:
        updates[:, : len(plan.page_updates)] = np.array(plan.page_updates, np.int32).T
    return StepBatch(plan, inputs)


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
