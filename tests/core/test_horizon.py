"""Decode loops: when they are planned, how far they go, and what is kept of them."""

from __future__ import annotations

import pytest

from jaxserve.core.buckets import BucketLadder
from jaxserve.core.cost_model import StepFeatures, features_of
from jaxserve.core.horizon import loop_steps
from jaxserve.core.plan import Bucket, PageUpdate, ScheduledRow, StepPlan, StepRows
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens


def plans(fake: FakeExecutor) -> list[StepPlan]:
    return [batch.plan for batch in fake.batches]


def decoding(max_tokens: int, num_output: int = 1, predicted: float | None = None) -> Request:
    """A running request whose next token, after ``num_output``, has just been planned."""
    request = make_request("r", [1, 2, 3], max_tokens)
    request.output_token_ids += [7] * num_output
    request.num_tokens = 3 + num_output + 1
    request.predicted_output_tokens = predicted
    return request


@pytest.mark.parametrize(
    ("decodes", "is_awaited", "want"),
    [
        ([decoding(100), decoding(100)], False, [8, 8]),
        ([decoding(100), decoding(4)], False, [8, 3]),
        ([decoding(4), decoding(4)], False, None),  # three of eight: less than half is of use
        ([decoding(6)], False, [5]),
        ([decoding(100), decoding(7)], True, [6, 6]),  # whoever waits gets the slot of the second then
        ([decoding(100), decoding(3)], True, None),
        ([decoding(100, 10, predicted=15.5), decoding(100)], True, [6, 6]),
        ([decoding(100, 10, predicted=15.5), decoding(100)], False, [8, 8]),
        ([decoding(100, 10, predicted=9.0)], True, [8]),  # it has outgrown its prediction
    ],
)
def test_how_far_a_loop_goes(decodes: list[Request], is_awaited: bool, want: list[int] | None) -> None:
    assert loop_steps(decodes, 8, is_awaited=is_awaited) == want


def test_a_loop_by_hand() -> None:
    core, fake = make_core(pipeline_depth=0, page_size=4, max_decode_steps=4)
    core.add(make_request("a", [1, 2, 3], 12))
    core.add(make_request("b", [4, 5], 6))
    run_to_end(core)
    assert [plan.bucket for plan in plans(fake)] == [
        Bucket(32, 8),
        Bucket(2, 2, 4),
        Bucket(2, 2, 4),
        Bucket(1, 1, 4),
    ]
    rows = [list(plan.rows) for plan in plans(fake)]
    assert rows[1] == [ScheduledRow("a", 0, 3, 4, True), ScheduledRow("b", 1, 2, 4, True)]
    assert rows[2] == [ScheduledRow("a", 0, 7, 4, True), ScheduledRow("b", 1, 6, 1, True)]
    assert rows[3] == [ScheduledRow("a", 0, 11, 3, True)]
    assert plans(fake)[1].page_updates == (PageUpdate(0, 1, 3), PageUpdate(1, 1, 4))
    assert [plan.num_tokens for plan in plans(fake)] == [5, 8, 5, 3]
    assert [plan.num_padded_tokens for plan in plans(fake)] == [27, 0, 3, 1]
    assert core.stats.output_tokens == 18


def test_a_short_pool_shortens_loops() -> None:
    """Of three usable pages a row takes the last; the other goes to the end of its own; nobody must go."""
    core, fake = make_core(
        pipeline_depth=0, page_size=4, num_pages=4, num_slots=2, watermark_pages=0, max_decode_steps=4
    )
    requests = [make_request("a", [1, 2], 9), make_request("b", [4, 5], 9)]
    for request in requests:
        core.add(request)
    run_to_end(core)
    assert [row.num_tokens for row in plans(fake)[1].rows] == [4, 2], "b's page ends there"
    assert not plans(fake)[1].preempted_ids
    for request in requests:
        prompt = list(request.prompt_token_ids)
        assert request.output_token_ids == expected_tokens(prompt, 0, 9)


def test_prompts_come_before_loops() -> None:
    """While a prompt is computed, or a free slot has somebody to take it, a step is one token a row."""
    core, fake = make_core(pipeline_depth=0, token_budget=12, max_decode_steps=4)
    core.add(make_request("a", [1, 2, 3], 40))
    core.step()
    core.step()
    core.add(make_request("b", list(range(30)), 40))
    for _ in range(4):
        core.step()
    kinds = [plan.bucket.decode_steps for plan in plans(fake)]
    assert kinds == [1, 4, 1, 1, 1, 4]
    run_to_end(core)


def test_a_loop_ends_for_whoever_waits() -> None:
    core, fake = make_core(num_slots=1, pipeline_depth=0, max_decode_steps=4)
    core.add(make_request("a", [1, 2, 3], 8))
    core.add(make_request("b", [4, 5], 3))
    run_to_end(core)
    made = [(plan.rows[0].request_id, plan.rows[0].num_tokens) for plan in plans(fake)]
    assert made == [("a", 3), ("a", 4), ("a", 3), ("b", 2), ("b", 1), ("b", 1)]


def test_rows_with_logprobs_make_no_loop() -> None:
    core, fake = make_core(max_decode_steps=4)
    request = make_request("a", [1, 2, 3], 12)
    request.params = type(request.params)(max_tokens=12, logprobs=0)
    core.add(request)
    run_to_end(core)
    assert {plan.bucket.decode_steps for plan in plans(fake)} == {1}


@pytest.mark.parametrize("stops_rows", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_follows_a_stop_token_is_discarded(depth: int, stops_rows: bool) -> None:
    tokens = expected_tokens([4, 9], 0, 16)
    for place in range(1, 14):
        if tokens[place] in tokens[:place]:
            continue
        executor = FakeExecutor(8, 4, stops_rows=stops_rows)
        core, fake = make_core(pipeline_depth=depth, max_decode_steps=4, executor=executor)
        request = make_request("r", [4, 9], 16, stop_token_ids=frozenset({tokens[place]}))
        neighbour = make_request("n", [7], 16)
        core.add(request)
        core.add(neighbour)
        run_to_end(core)
        assert request.output_token_ids == tokens[: place + 1]
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, tokens[place])
        assert neighbour.output_token_ids == expected_tokens([7], 0, 16)
        assert any(plan.is_loop for plan in plans(fake))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_bad_logits_in_a_loop_end_only_their_own_request(depth: int) -> None:
    class TurnsBad(FakeExecutor):
        """The third token of "bad" has none."""

        def is_bad(self, row: ScheduledRow, decode_step: int) -> bool:
            return row.request_id == "bad" and row.start + decode_step + 1 >= 4

    core, _ = make_core(executor=TurnsBad(8, 4), pipeline_depth=depth, max_decode_steps=4)
    bad, good = make_request("bad", [1, 2], 9), make_request("good", [3, 4], 9)
    core.add(bad)
    core.add(good)
    run_to_end(core)
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.output_token_ids == expected_tokens([1, 2], 0, 2)
    assert good.output_token_ids == expected_tokens([3, 4], 0, 9)
    assert core.stats.output_tokens == 11


def test_an_abort_discards_what_is_in_flight() -> None:
    core, _ = make_core(pipeline_depth=2, max_decode_steps=4)
    core.add(make_request("r", list(range(20)), 50))
    for _ in range(4):
        core.step()
    core.end("r", FinishReason.ABORT)
    assert core.scheduler.stats().num_used_pages == 0
    run_to_end(core)


def test_a_loop_is_priced_by_its_mean_step() -> None:
    rows = (ScheduledRow("a", 0, 10, 4, True), ScheduledRow("b", 1, 20, 2, True))
    plan = StepPlan(0, StepRows.of(rows), Bucket(2, 2, 4))
    context = (11 + 12 + 13 + 14) + (21 + 22)
    assert features_of(plan) == StepFeatures(round(6 / 4), round(context / 4), 0.0, 2)
    assert plan.num_decode_steps == 4


def test_a_stopped_request_is_learnt_from_once() -> None:
    class Counting:
        observed = 0

        def predict(self, request: Request) -> tuple[None, float]:
            return None, float("inf")

        def observe(self, request: Request) -> None:
            self.observed += 1

    predictor = Counting()
    tokens = expected_tokens([4, 9], 0, 5)
    core: EngineCore[object]
    core, _ = make_core(max_decode_steps=4, predictor=predictor)  # type: ignore[arg-type]
    core.add(make_request("r", [4, 9], 30, stop_token_ids=frozenset({tokens[4]})))
    run_to_end(core)
    assert predictor.observed == 1


def test_a_ladder_has_loops_beside_its_decode_steps() -> None:
    ladder = BucketLadder((2, 8), (32,), 8, 4)
    assert ladder.all() == [Bucket(2, 2), Bucket(8, 8), Bucket(2, 2, 4), Bucket(8, 8, 4), Bucket(32, 8)]
    assert BucketLadder((2, 8), (32,), 8).all() == [Bucket(2, 2), Bucket(8, 8), Bucket(32, 8)]
    assert ladder.choose_decode(3, is_loop=True) == Bucket(8, 8, 4)
