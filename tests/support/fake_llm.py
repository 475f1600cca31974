"""A whole engine, thread and all, over the fake executor: its tokens are known without a model."""

from __future__ import annotations

import dataclasses
import random
import threading
import time

from jaxserve.core.batch import StepBatch
from jaxserve.core.plan import StepResult
from jaxserve.engine.build import Engine
from jaxserve.engine.input_processor import InputProcessor
from jaxserve.engine.loop import EngineLoop
from jaxserve.validation import RequestLimits
from tests.support.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from tests.support.engine_parts import make_core
from tests.support.fake_executor import FakeExecutor


class ScriptedExecutor(FakeExecutor):
    """Answers with given bytes, one after the other, whatever the prompt; optionally slowly, or failing.

    With a gate, a step's result can be read only when the test has released it.
    """

    script: bytes | None = None
    delay_s: float = 0.0
    fails_at: int | None = None
    gate: threading.Semaphore | None = None
    is_waiting: bool = False

    def collect(self, handle: StepResult) -> StepResult:
        time.sleep(self.delay_s)
        if self.gate is not None:
            self.is_waiting = True
            self.gate.acquire()
            self.is_waiting = False
        return super().collect(handle)

    def dispatch(self, batch: StepBatch) -> StepResult:
        if self.fails_at is not None and self.num_dispatched >= self.fails_at:
            raise RuntimeError("the device is gone")
        prompt_lengths = {a.slot: len(a.token_ids) for a in batch.plan.admissions}
        self.prompts = {**getattr(self, "prompts", {}), **prompt_lengths}
        result = super().dispatch(batch)
        if self.script is None:
            return result
        (token_ids,) = result.token_ids
        for index, row in enumerate(batch.plan.rows):
            if row.samples:
                place = row.start + row.num_tokens - self.prompts[row.slot]
                token_ids[index] = self.script[place % len(self.script)]
                self.tokens[row.slot][-1] = token_ids[index]
        return dataclasses.replace(result, token_ids=[token_ids])


def make_engine(
    *,
    script: bytes | None = None,
    delay_s: float = 0.0,
    fails_at: int | None = None,
    num_slots: int = 8,
    num_pages: int = 512,
    max_alive: int = 10_000,
    pipeline_depth: int = 1,
) -> tuple[Engine, ScriptedExecutor]:
    """An engine that serves at once; close it."""
    executor = ScriptedExecutor(num_slots, 4, vocab_size=VOCAB_SIZE - 1)
    executor.script, executor.delay_s, executor.fails_at = script, delay_s, fails_at
    core, _ = make_core(
        num_slots=num_slots,
        num_pages=num_pages,
        token_budget=64,
        pipeline_depth=pipeline_depth,
        clock=time.monotonic,
        executor=executor,
    )
    tokenizer = byte_tokenizer()
    limits = RequestLimits(VOCAB_SIZE, 512, (num_pages - 1) * 4)
    engine = Engine(
        name="fake",
        loop=EngineLoop(core, tokenizer, max_alive),
        inputs=InputProcessor(tokenizer, limits, time.monotonic, random.Random(0)),
        description={"model": "fake", "slots": num_slots},
    )
    return engine, executor
