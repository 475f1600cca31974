"""What each expert knows, and what it must never know."""

from __future__ import annotations

import math
import random
from typing import Any

from jaxserve.core import length_experts
from jaxserve.core.length_experts import (
    ClientExpert,
    ConversationExpert,
    LengthExpert,
    PatternExpert,
    PrefixExpert,
    RecentMeans,
)
from jaxserve.request import Request
from tests.support.engine_parts import make_request

PRIOR = 4.0


def teach(expert: LengthExpert, times: int, z: float, **options: Any) -> None:
    for index in range(times):
        expert.observe(_request(f"t{index}", **options), z)


def _request(name: str, prompt: list[int] | None = None, **options: Any) -> Request:
    return make_request(name, prompt or [1] * 40, 1000, **options)


def _random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(50_000) for _ in range(length)]


def test_a_client_is_shrunk_towards_everybody() -> None:
    expert = ClientExpert()
    teach(expert, 10, 6.0, client="ann")
    assert expert.estimate(_request("r", client="ann"), PRIOR) == 5.0  # (10 * 6 + 10 * 4) / 20
    assert expert.estimate(_request("r", client="bob"), PRIOR) is None
    teach(expert, 10, 6.0)
    assert expert.estimate(_request("r"), PRIOR) is None, "no client is nobody, not everybody without one"


def test_patterns_are_lengths_and_among_them_templates() -> None:
    expert = PatternExpert()
    teach(expert, 50, 6.0, prompt=[7] * 40)
    teach(expert, 50, 2.0, prompt=[8] * 40)
    mixed = expert.estimate(_request("r", [9] * 40), PRIOR)
    assert mixed is not None
    assert 3.5 < mixed < 4.5
    first, second = (expert.estimate(_request("r", [token] * 50), PRIOR) for token in (7, 8))
    assert first is not None
    assert second is not None
    assert first > 5.5
    assert second < 2.5
    assert expert.estimate(_request("r", [7] * 200), PRIOR) is None


def test_a_longer_shared_prefix_says_more_and_other_tenants_share_none() -> None:
    rng, expert = random.Random(0), PrefixExpert()
    system = _random_prompt(rng, 32)
    tasks = {z: system + _random_prompt(rng, 32) for z in (2.0, 6.0)}
    for z, task in tasks.items():
        teach(expert, 20, z, prompt=task + _random_prompt(rng, 30))
    shared = expert.estimate(_request("r", system + _random_prompt(rng, 64)), PRIOR)
    assert shared is not None
    assert abs(shared - 4.0) < 0.3
    for z, task in tasks.items():
        deep = expert.estimate(_request("r", task + _random_prompt(rng, 64)), PRIOR)
        assert deep is not None
        assert abs(deep - z) < 0.4
        assert expert.estimate(_request("r", task, cache_salt="other"), PRIOR) is None


def test_a_conversation_is_known_by_its_own_words() -> None:
    rng, expert = random.Random(1), ConversationExpert()
    system = _random_prompt(rng, 64)
    said = {z: system + _random_prompt(rng, 20) for z in (2.0, 6.0)}
    for turn in range(3):
        for z, words in said.items():
            request = _request(f"{z}{turn}", words)
            request.output_token_ids = _random_prompt(rng, 50)
            if turn:
                estimate = expert.estimate(request, PRIOR)
                assert estimate is not None
                assert abs(estimate - z) < abs(PRIOR - z)
            expert.observe(request, z)
            said[z] = [*words, *request.output_token_ids, *_random_prompt(rng, 25)]
    stranger = _request("stranger", system + _random_prompt(rng, 100))
    assert expert.estimate(stranger, PRIOR) is None, "a system prompt is no conversation"


def test_estimates_do_not_depend_on_what_the_caller_allows() -> None:
    rng = random.Random(2)
    experts: list[LengthExpert] = [PatternExpert(), ClientExpert(), PrefixExpert(), ConversationExpert()]
    words, answer = _random_prompt(rng, 70), _random_prompt(rng, 50)
    for expert in experts:
        request = make_request("t", words, 100, client="c")
        request.output_token_ids = answer
        expert.observe(request, 5.5)
        few, many = (make_request("r", words + answer, most, client="c") for most in (1, 5000))
        assert PRIOR < (expert.estimate(few, PRIOR) or 0.0) < 5.5
        assert expert.estimate(few, PRIOR) == expert.estimate(many, PRIOR)


def test_means_fade_are_bounded_and_are_forgotten() -> None:
    means = RecentMeans(most_keys=3)
    for key in "abcd":
        means.add(key, 1.0, now=0.0)
    assert [key for key in "abcd" if means.knows(key)] == ["b", "c", "d"]
    for _ in range(2000):
        means.add("b", 5.0, now=1.0)
    shrunk = means.shrunk("b", 0.0, 0.0, now=1.0)
    assert shrunk is not None
    assert math.isclose(shrunk, 5.0, abs_tol=1e-3)
    assert means.shrunk("b", 0.0, 0.0, now=1.0 + length_experts._KEPT_S + 1.0) is None
