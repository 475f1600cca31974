"""Conversations at random through a step loop whose clock the test holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_request

_MOST_STEPS = 20_000


def hold_conversations(
    core: EngineCore[Any],
    clock: ManualClock,
    rng: random.Random,
    *,
    count: int,
    abort_rate: float,
    pauses_s: Sequence[float],
    check: Callable[[], None],
) -> list[Request]:
    """Shared documents, turns that go on from answers, salts, aborts; until nobody is left.

    Args:
        abort_rate: after how many of the arrivals somebody is aborted.
        pauses_s: one of these passes before each step while requests arrive.
        check: after everything that happens.
    """
    documents = [[rng.randrange(101) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    requests: list[Request] = []
    for index in range(count):
        source = rng.choice(documents)
        if requests and rng.random() < 0.5:
            before = rng.choice(requests)
            source = [*before.prompt_token_ids, *before.output_token_ids]
        prompt = [
            *source[: rng.randint(1, len(source))],
            *(rng.randrange(101) for _ in range(rng.randint(0, 6))),
        ]
        request = make_request(
            f"r{index}", prompt[:60], rng.randint(1, 30), seed=index, arrival=clock.now,
            client=f"c{index % 2}", priority=rng.randint(-1, 1), cache_salt=rng.choice(["", "", "s"]),
            stop_token_ids=frozenset({rng.randrange(101)}),
        )  # fmt: skip
        requests.append(request)
        core.add(request)
        for _ in range(rng.randint(0, 6)):
            clock.now += rng.choice(pauses_s)
            core.step()
            check()
        if rng.random() < abort_rate:
            core.end(rng.choice(requests).id, FinishReason.ABORT)
            check()
    for _ in range(_MOST_STEPS):
        if not core.has_work:
            break
        clock.now += 0.01
        core.step()
        check()
    assert not core.has_work, f"somebody starves: {core.scheduler.stats()}"
    return requests
