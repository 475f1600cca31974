"""The prefix cache in the scheduler: what is computed, what is found, and that no page is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.policies.registry import ORDERINGS
from jaxserve.core.prefix_cache import PrefixCacheStats
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor, expected_tokens
from tests.support.prefix_trie import PrefixTrie
from tests.support.random_traffic import hold_conversations

PAGE = 4
DEPTHS = (0, 1, 2)


def cache_stats(core: EngineCore[Any]) -> PrefixCacheStats:
    stats = core.scheduler.prefix_cache_stats()
    assert stats is not None
    return stats


def serve(core: EngineCore[Any], *requests: Request) -> None:
    for request in requests:
        core.add(request)
    run_to_end(core)


def assert_right_tokens(requests: list[Request]) -> None:
    for request in requests:
        count = len(request.output_token_ids)
        assert request.output_token_ids == expected_tokens(
            list(request.prompt_token_ids), request.seed, count
        )


def prompt_of(*parts: int, length: int = PAGE) -> list[int]:
    """A page for each number, with tokens that tell it from others."""
    return [(7 * part + i) % 101 for part in parts for i in range(length)]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_second_request_computes_only_what_is_new(depth: int) -> None:
    core, fake = make_core(pipeline_depth=depth, token_budget=64)
    system = list(range(22))  # five full pages and two tokens
    first, second = make_request("a", [*system, 50, 51], 3), make_request("b", [*system, 60], 3)
    serve(core, first)
    assert fake.num_computed_tokens == 24 + 2
    serve(core, second)
    assert fake.num_computed_tokens == 26 + (23 - 20) + 2
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 20)
    tables = [a.page_ids for batch in fake.batches for a in batch.plan.admissions]
    assert tables[0][:5] == tables[1][:5], "the same pages, not copies"
    assert_right_tokens([first, second])
    stats = cache_stats(core)
    assert (stats.lookup_tokens, stats.hit_tokens) == (24 + 23, 20)


def test_what_was_generated_is_found_as_well() -> None:
    """The next turn of a conversation: prompt, answer and a new question. The last token has no keys yet."""
    core, fake = make_core(token_budget=64)
    first = make_request("a", list(range(10)), 8)
    serve(core, first)
    turn = [*range(10), *first.output_token_ids, 90, 91]
    before = fake.num_computed_tokens
    second = make_request("b", turn, 1)
    serve(core, second)
    assert second.num_cached_tokens == 16, "17 of 18 tokens were computed: four full pages"
    assert fake.num_computed_tokens - before == 20 - 16


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_the_last_token_is_always_computed(length: int) -> None:
    core, fake = make_core(token_budget=64)
    serve(core, make_request("a", range(length), 1))
    before = fake.num_computed_tokens
    again = make_request("b", range(length), 1, seed=1)
    serve(core, again)
    assert again.num_cached_tokens == (length - 1) // PAGE * PAGE
    assert fake.num_computed_tokens - before == length - again.num_cached_tokens
    assert_right_tokens([again])


@pytest.mark.parametrize("depth", DEPTHS)
def test_requests_that_wait_for_the_same_prefix_compute_it_once(depth: int) -> None:
    """Ten at once, over a prefix that takes several steps: each computes its own two last tokens only."""
    core, fake = make_core(pipeline_depth=depth, num_pages=200, token_budget=32, num_slots=10)
    system = [i % 101 for i in range(100)]
    requests = [make_request(f"r{i}", [*system, i, i + 1], 2, seed=i) for i in range(10)]
    serve(core, *requests)
    assert fake.num_computed_tokens == 102 + 9 * 2 + 10 * 1
    assert [r.num_cached_tokens for r in requests] == [0] + [100] * 9
    assert_right_tokens(requests)


def test_who_parts_early_does_not_wait_for_the_whole() -> None:
    core, fake = make_core(pipeline_depth=0, num_pages=200, token_budget=16)
    core.add(make_request("long", prompt_of(1, *range(10, 30)), 1))
    core.add(make_request("short", prompt_of(1, 2), 1))
    run_to_end(core)
    admitted = {a.request_id: batch.plan.step for batch in fake.batches for a in batch.plan.admissions}
    assert admitted == {"long": 0, "short": 5}, "when the long one leaves room in a step"
    core, fake = make_core(pipeline_depth=0, num_pages=200, token_budget=32)
    core.add(make_request("first", prompt_of(1, 2, 3), 1))
    core.add(make_request("second", prompt_of(1, 2, 4), 1))
    core.add(make_request("other", prompt_of(5), 1))
    core.step()
    core.step()
    rows = [[(r.request_id, r.start, r.num_tokens) for r in batch.plan.rows] for batch in fake.batches]
    assert rows == [[("first", 0, 12)], [("second", 8, 4), ("other", 0, 4)]]


def test_a_claim_ends_with_its_owner() -> None:
    """Who computes a prefix is aborted before it has: the next one computes it."""
    core, fake = make_core(pipeline_depth=0, num_pages=100, token_budget=16)
    prompt = prompt_of(*range(12))
    core.add(make_request("first", prompt, 2))
    core.add(make_request("second", prompt, 2, seed=1))
    core.step()
    core.end("first", FinishReason.ABORT)
    core.scheduler.check_integrity()
    run_to_end(core)
    second = next(a for batch in fake.batches for a in batch.plan.admissions if a.request_id == "second")
    assert fake.batches[1].plan.admissions == (second,)
    assert fake.batches[1].plan.rows[0].start == 16, "what the first had computed is there"


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_preempted_request_finds_its_pages_again(depth: int) -> None:
    core, fake = make_core(
        num_slots=2, num_pages=12, watermark_pages=0, pipeline_depth=depth, token_budget=64
    )
    requests = [make_request(f"r{i}", prompt_of(i, i + 10, i + 20), 16, seed=i) for i in range(2)]
    serve(core, *requests)
    assert requests[1].num_preemptions > 0
    assert_right_tokens(requests)
    assert cache_stats(core).resumed_hit_tokens > 0
    # Each token of either has been computed once, but for what had to be evicted and the tail of a page.
    recomputed = fake.num_computed_tokens - 2 * (12 + 15)
    assert recomputed <= requests[1].num_preemptions * 2 * PAGE


def test_cached_pages_make_room_for_others() -> None:
    """A cache full of finished requests refuses nobody and preempts nobody."""
    core, _ = make_core(num_slots=4, num_pages=33, token_budget=64)
    requests = [make_request(f"r{i}", prompt_of(i, i + 1, i + 2), 6, seed=i) for i in range(60)]
    serve(core, *requests)
    stats = core.scheduler.stats()
    assert stats.num_preemptions == 0
    assert stats.num_used_pages == 0
    assert stats.num_cached_pages > 20
    assert cache_stats(core).num_evicted_pages > 100
    assert_right_tokens(requests)


def test_admission_prices_only_what_is_not_cached() -> None:
    """Of 16 pages 9 are in use, 8 of them shared: a request of ten fits if it lacks only two."""
    core, _ = make_core(num_slots=4, num_pages=17, watermark_pages=0, token_budget=64, pipeline_depth=0)
    prefix = prompt_of(*range(8))
    holder = make_request("holder", [*prefix, 1, 2], 20)
    core.add(holder)
    core.step()
    stranger = make_request("stranger", prompt_of(*range(30, 40)), 1)
    core.add(stranger)
    core.step()
    assert stranger.slot is None
    core.end("stranger", FinishReason.ABORT)
    friend = make_request("friend", [*prefix, 3, 4, 5, 6, 7], 1)
    core.add(friend)
    core.step()
    assert friend.num_cached_tokens == 32
    run_to_end(core)


def test_salts_never_meet() -> None:
    core, fake = make_core(token_budget=64, num_pages=200)
    prompt = prompt_of(*range(6))
    requests = [make_request(f"r{i}", prompt, 4, cache_salt=f"tenant-{i % 3}") for i in range(9)]
    serve(core, *requests)
    assert [r.num_cached_tokens for r in requests] == [0] * 3 + [20] * 6
    written = {a.request_id: a.page_ids for batch in fake.batches for a in batch.plan.admissions}
    for one in requests:
        for other in requests:
            if one.cache_salt != other.cache_salt:
                assert set(written[one.id]).isdisjoint(written[other.id])


def test_nothing_is_kept_of_a_request_with_bad_logits() -> None:
    fake = FakeExecutor(8, PAGE, bad_requests=frozenset({"bad"}))
    core, _ = make_core(executor=fake, token_budget=16, num_pages=100)
    good = make_request("good", prompt_of(1, 2), 2)
    serve(core, good)
    bad = make_request("bad", prompt_of(1, 2, 3, 4, 5, 6, 7), 4)
    serve(core, bad)
    assert bad.finish_reason is FinishReason.ERROR
    after = make_request("after", prompt_of(1, 2, 3, 4, 5, 6, 7), 1)
    serve(core, after)
    assert after.num_cached_tokens == 8, "what was there before stays"


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_a_batch_does_not_wait_for_a_prefix(batching: str) -> None:
    core, fake = make_core(num_slots=4, pipeline_depth=0, batching=batching, batch_window_s=0.0)
    requests = [make_request(f"r{i}", prompt_of(1, 2, 3), 5, seed=i) for i in range(8)]
    serve(core, *requests)
    assert len(fake.batches[0].plan.admissions) == 4
    assert [r.num_cached_tokens for r in requests] == [0] * 4 + [8] * 4
    assert_right_tokens(requests)


@pytest.mark.parametrize("ordering", ["lpm", "dlpm"])
def test_longest_prefix_first_sees_the_cache(ordering: str) -> None:
    core, fake = make_core(num_slots=1, ordering=ordering, token_budget=64, pipeline_depth=0)
    serve(core, make_request("seed", prompt_of(1, 2, 3, 4), 1))
    for name, parts in (("cold", (9, 8, 7, 6)), ("half", (1, 2, 9, 9)), ("warm", (1, 2, 3, 5))):
        core.add(make_request(name, prompt_of(*parts), 1))
    run_to_end(core)
    order = [a.request_id for batch in fake.batches for a in batch.plan.admissions]
    assert order == ["seed", "warm", "half", "cold"]


def test_decode_steps_do_not_touch_the_tree(monkeypatch) -> None:
    from jaxserve.core import prefix_cache

    calls: list[str] = []

    class Watched(prefix_cache.RadixTree):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in ("match", "lock", "unlock", "insert", "evict"):
                calls.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(prefix_cache, "RadixTree", Watched)
    core, _ = make_core(token_budget=64)
    for index in range(4):
        core.add(make_request(f"r{index}", prompt_of(index, 50), 40))
    for _ in range(4):
        core.step()
    assert calls
    calls.clear()
    for _ in range(30):
        core.step()
    assert calls == []


def test_without_a_cache_everything_is_computed() -> None:
    core, fake = make_core(prefix_caching=False, token_budget=64)
    requests = [make_request(f"r{i}", prompt_of(1, 2, 3), 4, seed=i) for i in range(6)]
    serve(core, *requests)
    assert fake.num_computed_tokens == 6 * (12 + 3)
    assert core.scheduler.prefix_cache_stats() is None
    assert core.scheduler.stats().num_cached_pages == 0
    assert_right_tokens(requests)


def test_hits_equal_those_of_an_independent_trie() -> None:
    """One request at a time and no eviction: then nothing but the tokens decides what is found."""
    rng = random.Random(4)
    core, _ = make_core(num_pages=20_000, token_budget=512, num_slots=4)
    trie, hits, lookups = PrefixTrie(PAGE), 0, 0
    documents = [[rng.randrange(101) for _ in range(rng.randint(5, 120))] for _ in range(12)]
    history: list[list[int]] = []
    for index in range(150):
        source = rng.choice([*documents, *history[-8:]])
        prompt = [
            *source[: rng.randint(1, len(source))],
            *(rng.randrange(101) for _ in range(rng.randint(0, 9))),
        ]
        request = make_request(
            f"r{index}", prompt, rng.randint(1, 9), seed=index, cache_salt=rng.choice(["", "s"])
        )
        expected = trie.hit_tokens(prompt, request.cache_salt)
        serve(core, request)
        assert request.num_cached_tokens == expected
        whole = [*prompt, *request.output_token_ids]
        trie.add(whole[:-1] if len(request.output_token_ids) else whole, request.cache_salt)
        history.append(whole)
        hits, lookups = hits + expected, lookups + len(prompt)
    stats = cache_stats(core)
    assert (stats.hit_tokens, stats.lookup_tokens, stats.num_evicted_pages) == (hits, lookups, 0)
    assert hits > lookups / 4, "the test must hit"


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    depth=st.sampled_from(DEPTHS),
    num_slots=st.integers(1, 6),
    num_pages=st.integers(26, 80),
    batching=st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
    abort_rate=st.sampled_from([0.0, 0.1, 0.3]),
    ordering=st.sampled_from(sorted(ORDERINGS)),
)
def test_random_conversations_leak_nothing(
    seed: int, depth: int, num_slots: int, num_pages: int, batching: str, abort_rate: float, ordering: str
) -> None:
    """Shared documents, turns that go on from answers, salts, aborts, errors, preemptions, evictions.

    The fake executor checks that every key that a step reads was computed from this request's tokens; after
    every step, references equal tables plus tree, and free + used + cached pages are all there are.
    """
    rng, clock = random.Random(seed), ManualClock()
    fake = FakeExecutor(num_slots, PAGE, bad_requests=frozenset({"r5", "r11"}))
    core, _ = make_core(
        num_slots=num_slots, num_pages=num_pages, pipeline_depth=depth, batching=batching, clock=clock,
        ordering=ordering, executor=fake, max_wait_s=0.3, batch_window_s=0.02,
    )  # fmt: skip

    def check() -> None:
        core.scheduler.check_integrity()
        stats = core.scheduler.stats()
        free = core.scheduler._kv._pool.num_free
        assert free + stats.num_used_pages + stats.num_cached_pages == num_pages - 1

    requests = hold_conversations(
        core, clock, rng, count=30, abort_rate=abort_rate, pauses_s=(0.01,), check=check
    )
    assert core.scheduler.stats().num_used_pages == 0
    assert_right_tokens([r for r in requests if r.finish_reason is not FinishReason.ERROR])
    core.scheduler._kv._cache.evict(num_pages)  # type: ignore[union-attr]
    assert core.scheduler._kv._pool.num_used == 0
    assert cache_stats(core).num_nodes == 0


def test_template_breaks_are_reported() -> None:
    """A date of varying length after six tokens; the same text after it. A shared top alone is no break."""
    rng = random.Random(2)
    top, text = [*prompt_of(1), 3, 4], [rng.randrange(5, 101) for _ in range(200)]
    core, _ = make_core(num_pages=2000, token_budget=512)
    for index in range(12):
        date = [rng.randrange(101) for _ in range(3 + index % 3)]
        serve(core, make_request(f"r{index}", [*top, *date, *text, index], 1))
    for index in range(5):
        serve(
            core, make_request(f"o{index}", [*prompt_of(8, 9), *(rng.randrange(101) for _ in range(150))], 1)
        )
    breaks = cache_stats(core).template_breaks
    assert sum(place.num_requests for place in breaks) >= 9
    assert {place.position for place in breaks} <= {6, 7, 8}, "a date may begin like another one"
    assert all(place.lost_tokens >= 200 * place.num_requests for place in breaks)
