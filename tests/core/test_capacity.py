"""Who may run: the predicted peak by hand, what moves it, and what it is worth under pressure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from jaxserve.core.known_lengths import (
    KNOWN_LENGTH_PREDICTORS,
    OraclePredictor,
    make_known_length_predictor,
)
from jaxserve.core.policies.predicted_demand import PredictedDemand
from jaxserve.core.policies.value_victim import ValueVictim
from jaxserve.core.policies.watermark import Watermark
from jaxserve.core.policy import PagesView
from jaxserve.core.predictor import LengthPredictor
from jaxserve.request import Request, RequestStatus
from tests.support.engine_parts import make_core, make_request, run_to_end
from tests.support.policy_parts import make_context, predicted

PAGE = 4


def running(name: str, prompt: int, generated: int, median: float, upper: float | None = None) -> Request:
    """A request in mid-decode with its pages."""
    request = predicted(name, median, upper, prompt=prompt)
    request.output_token_ids = [1] * generated
    request.num_tokens = prompt + generated
    request.num_computed_tokens = request.num_tokens - 1
    request.page_ids = list(range(1, 1 - (-request.num_tokens // PAGE)))
    return request


def view(requests: list[Request], num_usable: int, watermark_pages: int = 0) -> PagesView:
    used = sum(len(request.page_ids) for request in requests)
    return PagesView(requests, num_usable, used, num_usable - used, watermark_pages)


def test_the_peak_by_hand() -> None:
    """``a`` ends in 4 steps with 12 tokens, ``b`` in 20 with 32; the new one needs 8 + 8 tokens."""
    a, b = running("a", 4, 4, 8), running("b", 8, 4, 24)
    new = predicted("new", 8, prompt=8)
    policy = PredictedDemand(PAGE, 0.75)
    # In 4 steps: a 12 tokens, b 16, new 12: 3 + 4 + 3. In 8: b 20, new 16: 5 + 4. In 20: b 32: 8.
    assert policy.peak(view([a, b], 100), new, 2) == pytest.approx(10)
    # Pages that two tables share count once, and those that are in no table count as long as all run.
    for other in (-1, 4):
        pages = view([a, b], 100)
        pages = pages._replace(num_used=pages.num_used + other)
        assert policy.peak(pages, new, 2) == pytest.approx(10 + other)
    assert policy.has_room(view([a, b], 10), new, 2)
    assert not PredictedDemand(PAGE, 0.75).has_room(view([a, b], 9), new, 2)
    assert not PredictedDemand(PAGE, 0.75).has_room(view([a, b], 10, watermark_pages=1), new, 2)
    assert Watermark().has_room(view([a, b], 9), new, 2)  # who looks at now sees 7 pages


def test_loops_count_in_the_peak_by_hand() -> None:
    """With loops of four tokens the others, and ``a`` itself, may be three tokens further when ``a`` ends."""
    a, b = running("a", 4, 4, 8), running("b", 8, 4, 24)
    new = predicted("new", 8, prompt=8)
    # In 4 steps: a 12 + 3 tokens, b 16 + 3, new 12 + 3: 4 + 5 + 4.
    context = make_context(pipeline_depth=0, max_decode_steps=4)._replace(page_size=PAGE)
    assert PredictedDemand.from_context(context).peak(view([a, b], 100), new, 2) == pytest.approx(13)
    # With another loop in flight they are seven tokens further: a 19, b 23, new 19: 5 + 6 + 5.
    context = make_context(pipeline_depth=1, max_decode_steps=4)._replace(page_size=PAGE)
    assert PredictedDemand.from_context(context).peak(view([a, b], 100), new, 2) == pytest.approx(16)


def test_what_moves_the_peak() -> None:
    def peak(median: float, upper: float, quantile: float) -> float:
        others = [running(f"r{i}", 16, 4, median, upper) for i in range(8)]
        return PredictedDemand(PAGE, quantile).peak(view(others, 1000), predicted("new", 8, prompt=8), 2)

    assert peak(40, 40, 0.75) < peak(60, 60, 0.75)  # longer
    assert peak(40, 120, 0.6) < peak(40, 120, 0.9) < peak(40, 120, 0.99)  # safer
    assert peak(40, 40, 0.6) == pytest.approx(peak(40, 40, 0.99))  # nothing is uncertain
    assert peak(40, 120, 0.9) < 8 * (16 + 120) / PAGE + 4  # sums are surer than their parts


def test_the_margin_grows_with_preemptions_and_shrinks_with_ends() -> None:
    policy, request = PredictedDemand(PAGE, 0.75, target=0.02), predicted("r", 8)
    request.status = RequestStatus.PREEMPTED
    policy.queued(request, 0.0)
    policy.queued(request, 0.0)
    assert policy.margin == pytest.approx(0.01)
    for _ in range(50):  # one preemption in fifty requests leaves it where it is
        policy.left(request, 0.0, was_waiting=False)
    assert policy.margin == pytest.approx(0.005)
    request.status = RequestStatus.WAITING
    policy.queued(request, 0.0)
    assert policy.margin == pytest.approx(0.005)
    for _ in range(1000):
        policy.left(request, 0.0, was_waiting=False)
    assert policy.margin == 0.0


def test_a_target_of_one_is_no_margin() -> None:
    request = predicted("r", 8)
    request.status = RequestStatus.PREEMPTED
    for target, margin in ((0.5, 0.005), (1.0, 0.0)):
        context = make_context(preempted_target=target)._replace(page_size=PAGE)
        policy = PredictedDemand.from_context(context)
        policy.queued(request, 0.0)
        assert policy.margin == margin


def test_a_refusal_is_looked_at_again_when_somebody_leaves() -> None:
    a, new = running("a", 4, 4, 100), predicted("new", 8, prompt=8)
    policy = PredictedDemand(PAGE, 0.75)
    assert not policy.has_room(view([a], 20), new, 2)
    a.predicted_output_tokens = a.predicted_output_upper = 8.0
    assert not policy.has_room(view([a], 20), new, 2)  # remembered
    policy.left(predicted("gone", 8), 0.0, was_waiting=False)
    assert policy.has_room(view([a], 20), new, 2)


def test_alone_a_request_may_always_run() -> None:
    assert PredictedDemand(PAGE, 0.75).has_room(view([], 3), predicted("new", 4000, prompt=8), 2)
    assert not PredictedDemand(PAGE, 0.75).has_room(view([], 1), predicted("new", 4, prompt=8), 2)


def test_the_victim_has_most_to_come_for_what_resuming_costs() -> None:
    context = make_context()
    victim = ValueVictim.from_context(context)
    almost_done, long_context, young = (
        running("a", 8, 30, 32),
        running("b", 400, 4, 100),
        running("c", 8, 4, 100),
    )
    assert victim.choose([almost_done, long_context, young]) is young
    assert victim.choose([almost_done, young, long_context]) is young
    young.predicted_output_tokens = 5.0
    assert victim.choose([almost_done, long_context, young]) is long_context
    outlived = running("d", 8, 40, 10, 400)
    assert victim.choose([almost_done, long_context, young, outlived]) is outlived


def pressed(predictor: str, **options: Any) -> tuple[int, int]:
    """Preempted requests and lost tokens of 300 requests of 8 + U(2, 120) tokens, on pages for a third."""
    rng = random.Random(4)
    requests = [make_request(f"r{i}", [i % 7] * 8, 200) for i in range(300)]
    lengths = {request.id: rng.randint(2, 120) for request in requests}
    for request in requests:
        request.max_tokens = lengths[request.id]
        request.max_num_tokens = 8 + lengths[request.id]
    known = make_known_length_predictor(predictor, lengths, sigma=0.7, seed=1)
    core, _ = make_core(
        num_slots=32, num_pages=200, page_size=4, token_budget=128, watermark_pages=2, prefix_caching=False,
        predictor=known, **options,
    )  # fmt: skip
    for request in requests:
        core.add(request)
    run_to_end(core, check=False)
    assert all(len(request.output_token_ids) == lengths[request.id] for request in requests)
    return sum(r.num_preemptions > 0 for r in requests), core.scheduler.stats().num_lost_tokens


def test_prediction_is_worth_something_and_poison_takes_it_away() -> None:
    greedy = pressed("oracle")
    oracle = pressed("oracle", capacity="predicted", victim="value")
    noisy = pressed("noisy", capacity="predicted", victim="value")
    constant = pressed("constant", capacity="predicted", victim="value")
    shuffled = pressed("shuffled", capacity="predicted", victim="value")
    assert greedy[0] > 60
    assert oracle[0] <= 0.05 * greedy[0]  # prompts start later than planned, and a page here has four tokens
    assert oracle[1] <= 0.02 * greedy[1]
    assert noisy[0] <= 0.25 * greedy[0]
    assert noisy[1] <= 0.25 * greedy[1]
    assert constant[0] < greedy[0]
    assert noisy[0] < shuffled[0] < greedy[0]


@pytest.mark.parametrize("factor", [0.1, 0.3])
def test_lengths_that_are_always_too_short_break_nothing(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preemptions, but fewer than greedy's: the margin learns of them."""

    def short(lengths: Mapping[str, int], sigma: float, seed: int) -> LengthPredictor:
        return OraclePredictor({name: max(1, round(factor * length)) for name, length in lengths.items()})

    monkeypatch.setitem(KNOWN_LENGTH_PREDICTORS, "short", short)
    num_preempted, _ = pressed("short", capacity="predicted", victim="value")
    assert 10 < num_preempted < pressed("oracle")[0]


def test_nobody_of_known_length_is_preempted_by_loops() -> None:
    """Without what loops in flight make, ten would be."""
    loops = {"max_decode_steps": 4}
    assert pressed("oracle", **loops)[0] > 60
    assert pressed("oracle", capacity="predicted", victim="value", **loops) == (0, 0)
