"""Who is probed and when, that nobody waits for it, and that a replay knows what came of it."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxserve.core.cost_model import UnknownDevice
from jaxserve.core.fused_predictor import FusedLengthPredictor
from jaxserve.core.plan import StepResult
from jaxserve.core.predictor import LengthPredictor
from jaxserve.core.probing import Probe, ProbeResult, Probing
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.recording import Recorder
from jaxserve.request import FinishReason, Request
from jaxserve.simulator.replay import replay
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor

INTERVAL = 10


class FakeProber(FakeExecutor):
    """Says that ``lengths[request]`` is where it ends, if it knows; counts what it is asked."""

    def __init__(self, num_slots: int, page_size: int, lengths: dict[str, int] | None = None) -> None:
        super().__init__(num_slots, page_size)
        self.lengths = lengths or {}
        self.owner: dict[int, str] = {}
        self.launched: list[tuple[int, list[Probe]]] = []  # steps dispatched by then, probes
        self.num_collected = 0
        self.asked: dict[str, list[int]] = {}

    def dispatch(self, batch: Any) -> StepResult:
        for admission in batch.plan.admissions:
            self.owner[admission.slot] = admission.request_id
        return super().dispatch(batch)

    def collect(self, handle: StepResult) -> StepResult:
        self.num_collected += 1
        return super().collect(handle)

    def launch_probe(self, probes: Sequence[Probe]) -> tuple[int, np.ndarray]:
        found: list[list[float]] = []
        for slot, generated, prompt_tokens in probes:
            name = self.owner[slot]
            self.asked.setdefault(name, []).append(generated)
            assert self.computed_of(slot) == prompt_tokens + generated, "the state of another token"
            z = math.log1p(max(self.lengths.get(name, 50) - generated, 1))
            found.append([z - 0.1, z, z + 0.1])
        return self.num_dispatched, np.array(found, np.float32)

    def computed_of(self, slot: int) -> int:
        return len(self.tokens[slot]) - 1  # the newest was sampled from the state

    def read_probe(self, handle: tuple[int, np.ndarray]) -> ProbeResult:
        dispatched_then, found = handle
        assert self.num_collected > dispatched_then, "nobody knows that it is done"
        states = np.arange(len(found), dtype=np.float16)[:, None, None]
        return ProbeResult(states, found)


def parts(
    depth: int = 1,
    predictor: LengthPredictor | None = None,
    lengths: dict[str, int] | None = None,
    **options: Any,
) -> tuple[EngineCore[object], FakeProber]:
    prober = FakeProber(4, 4, lengths)
    core, _ = make_core(
        num_slots=4, executor=prober, pipeline_depth=depth, predictor=predictor,
        probing=Probing(prober, INTERVAL), **options,
    )  # fmt: skip
    return core, prober


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_each_request_is_probed_at_its_start_and_every_so_many_tokens(depth: int) -> None:
    rng = random.Random(depth)
    core, prober = parts(depth, num_pages=400)
    lengths = {f"r{i}": rng.randint(1, 70) for i in range(12)}
    for name, length in lengths.items():
        core.add(make_request(name, [1] * rng.randint(1, 60), length))
    run_to_end(core)
    for name, length in lengths.items():
        asked = prober.asked.get(name, [])
        assert length < 4 or asked[0] <= 3
        gaps = [b - a for a, b in itertools.pairwise(asked)]
        assert all(INTERVAL <= gap <= INTERVAL + 3 for gap in gaps)
        assert len(asked) >= (length - 3) // (INTERVAL + 3)
    assert not core._probing._last, "finished requests are forgotten"  # type: ignore[union-attr]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_landed_is_what_is_predicted(depth: int) -> None:
    predictor = FusedLengthPredictor()
    lengths: dict[str, int] = {}
    rng = random.Random(1)
    for index in range(120):  # too many lengths for anything but the head to know
        lengths[f"r{index}"] = rng.randint(20, 90)
    core, _ = parts(depth, predictor, lengths, num_pages=400)
    for name in lengths:
        core.add(make_request(name, [1] * 5, 100, stop_token_ids=frozenset({7})))
    # The fake model ends nobody at the lengths that the head was told: end them by hand.
    errors: list[float] = []
    while core.has_work:
        core.step()
        for name, length in lengths.items():
            request = core.scheduler.get(name)
            if request is None:
                continue
            if len(request.output_token_ids) == length - 5 and int(name[1:]) > 60:
                assert request.predicted_output_tokens is not None
                errors.append(abs(request.predicted_output_tokens - length))
            if len(request.output_token_ids) >= length:
                core.end(name, FinishReason.STOP)
    assert len(errors) > 40
    assert sorted(errors)[len(errors) // 2] < 4


def test_a_probe_of_a_request_that_ended_is_nobody_s() -> None:
    core, prober = parts(2, FusedLengthPredictor())
    core.add(make_request("a", [1, 2, 3], 30))
    for _ in range(4):
        core.step()
    core.end("a", FinishReason.ABORT)
    core.add(make_request("b", [4], 6))
    run_to_end(core)
    assert prober.asked["a"]
    assert core.stats.finished == {"abort": 1, "length": 1}


def recorded_run(seed: int) -> list[dict[str, Any]]:
    """Too little memory: who gives up its pages depends on what is predicted."""
    rng, clock, records = random.Random(seed), ManualClock(), list[dict[str, Any]]()
    lengths = {f"r{i}": rng.randint(5, 40) for i in range(40)}
    core, _ = parts(
        1, FusedLengthPredictor(), lengths, num_pages=30, clock=clock,
        ordering="sjf", victim="most_remaining",
        recorder=lambda assembly: Recorder(records.append, assembly, UnknownDevice(), 1),
    )  # fmt: skip
    for index, name in enumerate(lengths):
        request = make_request(
            name, [rng.randrange(101) for _ in range(rng.randint(1, 30))], 60, arrival=clock.now, seed=index,
            stop_token_ids=frozenset(rng.sample(range(101), 3)),
        )  # fmt: skip
        core.add(request)
        core.step()
        clock.now += 0.01
    while core.has_work:
        core.step()
        clock.now += 0.01
    return records


def test_a_replay_makes_the_same_plans() -> None:
    changed = 0
    for seed in range(5):
        records = json.loads(json.dumps(recorded_run(seed)))
        assert any(record["e"] == "refresh" for record in records)
        assert replay(records).first_difference is None
        for record in records:
            if record["e"] == "refresh":
                record["predicted"] = [60.0, 60.0]
        changed += replay(records).first_difference is not None
    assert changed > 0, "what landed decided nothing: this tests nothing"


class _Quiet:
    """A predictor that reads no probes."""

    def predict(self, request: Request) -> Any:
        return (50.0, 50.0)

    def observe(self, request: Request) -> None:
        pass


def test_a_predictor_that_reads_no_probes_is_left_alone() -> None:
    core, prober = parts(1, _Quiet())
    core.add(make_request("a", [1], 30))
    run_to_end(core)
    assert prober.asked["a"]
