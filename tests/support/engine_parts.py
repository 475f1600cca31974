"""Engines made of real parts and a fake executor."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.assembly import Assembly, assemble
from jaxserve.core.batch import prepare
from jaxserve.core.buckets import BucketLadder, default_decode_rows, default_mixed_tokens
from jaxserve.core.cost_model import CostModel, UnknownDevice
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.learning.tuner import Tuner
from jaxserve.core.predictor import LengthPredictor, MeanLengthPredictor
from jaxserve.core.probing import Probing
from jaxserve.core.resume_costs import NO_HOST, HostTier, ResumeCosts
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.hidden_recording import HiddenRecorder
from jaxserve.engine.recording import Recorder
from jaxserve.request import Request, SamplingParams
from tests.support.fake_executor import FakeExecutor


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_core(
    *,
    num_slots: int = 8,
    num_pages: int = 64,
    page_size: int = 4,
    token_budget: int = 32,
    pipeline_depth: int = 1,
    watermark_pages: int = 1,
    max_queued_requests: int = 100_000,
    prefix_caching: bool = True,
    prefix_preloading: bool = True,
    host: HostTier = NO_HOST,
    clock: Callable[[], float] | None = None,
    executor: Any = None,
    predictor: LengthPredictor | None = None,
    decision_log: DecisionLog | None = None,
    recorder: Callable[[Assembly], Recorder] | None = None,
    probing: Probing[Any] | None = None,
    hidden_recorder: HiddenRecorder | None = None,
    tuner: Callable[[Assembly, CostModel], Tuner] | None = None,
    **scheduler: object,
) -> tuple[EngineCore[object], FakeExecutor]:
    """An engine core over a fake executor; ``scheduler`` are fields of `SchedulerConfig`."""
    fake = executor or FakeExecutor(num_slots, page_size)
    assembly = Assembly(
        scheduler=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
        ladder=BucketLadder(
            default_decode_rows(num_slots, 1),
            default_mixed_tokens(token_budget, num_slots),
            num_slots,
            scheduler.get("max_decode_steps", 1),  # type: ignore[arg-type]
        ),
        num_slots=num_slots,
        num_pages=num_pages,
        page_size=page_size,
        watermark_pages=watermark_pages,
        max_queued_requests=max_queued_requests,
        prefix_caching=prefix_caching,
        prefix_preloading=prefix_preloading,
        host=host,
    )
    costs = CostModel(UnknownDevice())
    core = EngineCore(
        scheduler=assemble(assembly, costs, decision_log),
        executor=fake,
        prepare=functools.partial(prepare, num_slots=num_slots),
        predictor=predictor or MeanLengthPredictor(),
        clock=clock or ManualClock(),
        pipeline_depth=pipeline_depth,
        costs=costs,
        recorder=recorder(assembly) if recorder else None,
        probing=probing,
        hidden_recorder=hidden_recorder,
        tuner=None if tuner is None else tuner(assembly, costs),
    )
    return core, fake  # type: ignore[return-value]


def make_request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    seed: int = 0,
    arrival: float = 0.0,
    stop_token_ids: frozenset[int] = frozenset(),
    priority: int = 0,
    deadline: float | None = None,
    min_tokens: int = 0,
    client: str = "",
    cache_salt: str = "",
) -> Request:
    """A request as the input processor would make it."""
    return Request(
        id=name,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens),
        arrival_time=arrival,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=stop_token_ids,
        priority=priority,
        deadline=deadline,
        client=client,
        cache_salt=cache_salt,
    )


def run_to_end(core: EngineCore[object], *, most_steps: int = 100_000, check: bool = True) -> int:
    """Steps until nothing is left; returns the number of steps. Checks every invariant after each."""
    for step in range(most_steps):
        if not core.has_work:
            return step
        core.step()
        if check:
            core.scheduler.check_integrity()
    raise AssertionError(f"still working after {most_steps} steps: {core.scheduler.stats()}")


def random_prompt(rng: random.Random, longest: int, vocab_size: int = 101) -> list[int]:
    """A prompt of 1 to ``longest`` tokens."""
    return [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))]


def make_copies_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swaps whom it can: a tiny model computes faster than memory copies."""

    def free(self: ResumeCosts, count: int) -> float:
        return 0.0

    monkeypatch.setattr(ResumeCosts, "swap_s", free)
    monkeypatch.setattr(ResumeCosts, "load_s", free)
