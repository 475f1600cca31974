"""Return times by hand, and what is kept, preloaded and promoted because of them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.core.prefix_cache import PrefixCacheStats
from jaxserve.core.preloading import Preloading, PreloadingStats
from jaxserve.core.radix_node import Node
from jaxserve.core.radix_tree import RadixTree
from jaxserve.core.resume_costs import HostTier
from jaxserve.core.return_times import BIN_ENDS, NUM_BINS, ReturnTimes, bin_of
from jaxserve.engine.engine_core import EngineCore
from jaxserve.request import FinishReason, Request
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import FakeExecutor

PAGE = 4
TIER = HostTier(64, 2, 1000, 1e12)


def awaited_turns(table: ReturnTimes, gap: int, count: int) -> None:
    """So many turns that came in a bin."""
    for _ in range(count):
        for index in range(gap + 1):
            table.awaited(index)
        table.came(gap, gap)


def test_bins_double_every_second_one() -> None:
    assert [bin_of(gap) for gap in (-1.0, 0.0, 0.25, 0.26, 0.5, 0.51, 1.0, 1e9)] == [0, 0, 0, 1, 2, 3, 4, 26]
    for index, end in enumerate(BIN_ENDS):
        assert bin_of(end) == index
        assert bin_of(1.001 * end) == min(index + 1, NUM_BINS - 1)


def test_hazards_by_hand() -> None:
    table = ReturnTimes()
    awaited_turns(table, 5, 12)
    for _ in range(8):
        for index in range(NUM_BINS):
            table.awaited(index)  # they never come
    assert table.hazard(4, []) == 0.0
    assert table.hazard(5, []) == pytest.approx(12 / (20 + 4))
    assert table.hazard(6, []) == 0.0
    assert table.comes_within(4, 6, []) == pytest.approx(0.5)
    # A conversation that has twice paused for bin 7, and once for bin 5: two turns of the table weigh in.
    assert table.hazard(7, [7, 7, 5]) == pytest.approx(2 / (2 + 2))
    assert table.hazard(5, [7, 7, 5]) == pytest.approx((2 * 0.5 + 1) / (2 + 3))
    assert table.num_returns == 12


def test_a_turn_that_is_learnt_of_late_counts_where_it_came() -> None:
    table = ReturnTimes()
    for index in range(8):
        table.awaited(index)
    table.came(5, 7)  # it waited in the queue through bins 6 and 7
    assert table.hazard(5, []) == pytest.approx(1 / 5)
    assert (table._awaited[6], table._awaited[7]) == (0, 0)


def test_how_long_to_keep_moves_with_price_and_gaps() -> None:
    table = ReturnTimes()
    awaited_turns(table, 8, 1000)
    end = BIN_ENDS[8]
    assert table.best_keep_s(0.01, 1.0, []) == end, "cheap: until the turn comes"
    assert table.best_keep_s(10.0, 1.0, []) == 0.0, "dearer than to bring it back"
    assert table.best_keep_s(0.01, 0.0, []) == 0.0
    nobody = ReturnTimes()
    for _ in range(100):
        for index in range(NUM_BINS):
            nobody.awaited(index)
    assert nobody.best_keep_s(1e-6, 1.0, []) == 0.0, "nobody comes back"


class Service:
    """Conversations on a device of 32 pages, each with a pause of its own; others push them out."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.rng = random.Random(3)
        self.core: EngineCore[Any]
        small: dict[str, Any] = {"num_pages": 33, "page_size": PAGE, "watermark_pages": 0, "token_budget": 64}
        small |= {"host": TIER, "clock": self.clock}
        self.core, self.fake = make_core(**small | options)
        self.count = 0

    def ask(self, tokens: list[int], max_tokens: int = 4) -> Request:
        self.count += 1
        request = make_request(f"r{self.count}", tokens, max_tokens, arrival=self.clock.now)
        self.core.add(request)
        while not request.is_finished:
            self.clock.now += 0.01
            self.core.step()
            self.core.scheduler.check_integrity()
        run_to_end(self.core)
        return request

    def strangers(self, seconds: float) -> None:
        """Prompts of six pages, one every second."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1.0:
            self.ask([self.rng.randrange(101) for _ in range(6 * PAGE)], 2)
            self.clock.now += 0.9
        self.clock.now = max(self.clock.now, end)

    def converse(self, pause_s: float, turns: int = 4) -> list[Request]:
        """Turns of one conversation."""
        tokens = [self.rng.randrange(101) for _ in range(5 * PAGE)]
        requests: list[Request] = []
        for _ in range(turns):
            requests.append(self.ask(tokens))
            tokens = [*tokens, *requests[-1].output_token_ids, *(self.rng.randrange(101) for _ in range(3))]
            self.strangers(pause_s)
        return requests

    def stats(self) -> tuple[PrefixCacheStats, PreloadingStats]:
        cache = self.core.scheduler.prefix_cache_stats()
        assert cache is not None
        assert cache.preloading is not None
        return cache, cache.preloading


def test_turns_of_a_conversation_are_recognised() -> None:
    service = Service()
    requests = service.converse(9.0, turns=5)
    _, preloading = service.stats()
    assert preloading.num_returns == 4, "strangers never come back"
    times = service.core.scheduler._kv._cache._preloading._times  # type: ignore[union-attr]
    assert sum(times._came[bin_of(8.0) : bin_of(11.0) + 1]) == 4
    assert all(request.num_cached_tokens >= 16 for request in requests[1:])


def test_regular_pauses_are_preloaded_for() -> None:
    """Ten seconds and a bit between turns; what is preloaded is used, and hits do not wait for the host."""
    service = Service()
    for _ in range(12):
        service.converse(10.5, turns=4)
    cache, preloading = service.stats()
    assert cache.host is not None
    assert preloading.num_preloads > 0
    assert cache.host.preload_useful_bytes > 0
    assert cache.host.preload_useful_bytes + cache.host.preload_wasted_bytes <= cache.host.preloaded_bytes


def test_a_preload_may_push_out_what_was_to_be_looked_at_next() -> None:
    """Two conversations become due at once; the pages of the second on the host make room for the first's."""
    root = Node(None, 0, b"", [], 0.0)
    ends = [Node(root, 0, b"", [page], 0.0) for page in (7, 8)]
    for node in ends:
        node.on_host = True
    looked_at: list[list[Node]] = []

    class Tree:
        host_nodes = RadixTree.host_nodes

        def marginal_s(self, now: float) -> float:
            return 0.0

        def value_of(self, chance: float, start: int, now: float) -> float:
            return 1.0

    class FullHost:
        def load_s(self, num_pages: int) -> float:
            return 0.0

        def preload(self, nodes: list[Node], below: float) -> bool:
            looked_at.append(nodes)
            ends[1].parent = None  # as the tree does with nodes that it drops
            return True

    costs: Any = SimpleNamespace(page_share=1.0, compute_s=lambda tokens, context: 1.0)
    tree: Any = Tree()
    preloading = Preloading(tree, PAGE, 10.0, costs, FullHost(), lambda: 1.0)
    awaited_turns(preloading._times, 1, 12)
    for index, node in enumerate(ends):
        preloading.ended(make_request(f"r{index}", [1], 1), node, 0.0)
    preloading.look(BIN_ENDS[0])
    assert looked_at == [ends[:1]]


def test_nobody_is_preloaded_for_who_never_returns() -> None:
    service = Service()
    service.strangers(120.0)
    cache, preloading = service.stats()
    assert preloading.num_returns == preloading.num_preloads == 0
    assert cache.host is not None
    assert cache.host.saved_bytes > 0
    assert cache.host.preloaded_bytes == 0


def test_one_option_turns_keeping_and_preloading_off() -> None:
    service = Service(prefix_preloading=False)
    for _ in range(4):
        service.converse(10.5)
    cache = service.core.scheduler.prefix_cache_stats()
    assert cache is not None
    assert cache.preloading is None
    assert cache.host is not None
    assert cache.host.preloaded_bytes == 0
    assert cache.host.loaded_bytes > 0


def test_a_beginning_that_many_share_is_promoted_and_stays() -> None:
    service = Service(host=HostTier(0, 1, 0, 1.0))
    system = [service.rng.randrange(101) for _ in range(3 * PAGE)]
    for _ in range(60):
        service.ask([*system, *(service.rng.randrange(101) for _ in range(PAGE + 1))], 1)
        service.clock.now += 1.0
    cache, _ = service.stats()
    assert cache.num_promotions == 1
    (shared,) = cache.shared_prefixes
    assert shared.num_tokens == 3 * PAGE
    assert shared.num_children >= 4
    assert shared.hits_per_minute >= 6.0
    service.strangers(60.0)  # each is used once, and later
    assert service.ask([*system, 1, 2], 1).num_cached_tokens == 3 * PAGE
    service.clock.now += 3000.0
    service.ask([1, 2, 3], 1)
    assert service.stats()[0].shared_prefixes == []


def test_too_few_children_or_hits_are_not_promoted() -> None:
    service = Service()
    system = [service.rng.randrange(101) for _ in range(3 * PAGE)]
    tails = [[service.rng.randrange(101) for _ in range(PAGE + 1)] for _ in range(3)]
    for index in range(60):
        service.ask([*system, *tails[index % 3]], 1)
        service.clock.now += 1.0
    assert service.stats()[0].num_promotions == 0, "three children"
    rare = Service()
    for _ in range(60):
        rare.ask([*system, *(rare.rng.randrange(101) for _ in range(PAGE + 1))], 1)
        rare.clock.now += 30.0
    assert rare.stats()[0].num_promotions == 0, "two hits a minute"


def test_a_turn_that_fails_is_forgotten() -> None:
    """Nobody keeps hold of a request whose logits were not finite; its pages are nobody's."""
    service = Service(executor=FakeExecutor(4, PAGE, bad_requests=frozenset({"r2"})))
    first = service.ask([service.rng.randrange(101) for _ in range(5 * PAGE)])
    next_turn = service.ask([*first.prompt_token_ids, *first.output_token_ids, 1, 2])
    assert next_turn.finish_reason is FinishReason.ERROR
    assert service.stats()[1].num_returns == 1, "it was a next turn"
    sessions = service.core.scheduler._kv._cache._preloading._sessions  # type: ignore[union-attr]
    assert not sessions._active
