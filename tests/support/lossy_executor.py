"""An executor whose device now and then has no memory for a step."""

from __future__ import annotations

import random

from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import StepResult
from jaxserve.errors import StepFailedError
from tests.support.fake_executor import FakeExecutor


class LossyExecutor(FakeExecutor):
    """Now and then it fails, when a step is launched or when it is read, and loses all that it holds."""

    rng = random.Random(0)
    share = 0.0
    num_failures = 0
    in_a_row = 0

    def dispatch(self, batch: StepBatch) -> StepResult:
        if self.rng.random() < 0.5:
            self.fail_sometimes()
            return super().dispatch(batch)
        result = super().dispatch(batch)  # launched, and its memory is gone with it
        self.fail_sometimes()
        return result

    def collect(self, handle: StepResult) -> StepResult:
        self.fail_sometimes()
        self.in_a_row = 0
        return handle

    def fail_sometimes(self) -> None:
        if self.in_a_row < 3 and self.rng.random() < self.share:
            self.in_a_row += 1
            self.num_failures += 1
            self.tokens = [[] for _ in range(self.num_slots)]
            self.tables = [{} for _ in range(self.num_slots)]
            for held in (self.contents, self.blocks, self.loads, self.loads_due, self.admissions):
                held.clear()
            raise StepFailedError("no memory for a step")
