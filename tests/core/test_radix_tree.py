"""The radix tree against a model of itself, and its values worked out by hand."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.core.radix_node import Match, Node, PrefixLoad, pack
from jaxserve.core.radix_tree import HORIZON_S, RadixTree

PAGE = 2


def make_tree(cost: float = 0.0) -> RadixTree:
    """Pages of two tokens; a chunk takes a second, and ``cost`` more for each token before it."""
    return RadixTree(PAGE, lambda context: 1.0 + cost * context)


def put(tree: RadixTree, tokens: list[int], pages: list[int], now: float = 0.0, salt: str = "") -> Node:
    """As a request would that finds what is there and brings the rest; its lock is returned."""
    match = tree.match(salt, tokens, len(tokens) // PAGE)
    node = tree.lock(match, now)
    start = match.num_pages * PAGE
    node, _ = tree.insert(node, pack(tokens[start:]), pages[match.num_pages :], now, may_grow=False)
    return node


def found(tree: RadixTree, tokens: list[int], salt: str = "") -> int:
    return tree.match(salt, tokens, len(tokens) // PAGE).num_pages


class TreeMachine(RuleBasedStateMachine):
    """Requests that enter with a match, bring pages, grow and leave; evictions. The model maps each page's
    whole beginning to the page."""

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tree = make_tree(cost=0.01)
        self.model: dict[tuple[str, tuple[int, ...]], int] = {}
        self.paths: list[
            tuple[Node, str, list[int], bool]
        ] = []  # (node, salt, tokens on the path, owns its end)
        self.now = 0.0
        self.next_page = 1

    def _tokens(self, num_pages: int) -> list[int]:
        return [self.rng.randrange(2) for _ in range(PAGE * num_pages)]

    def _match(self, salt: str, tokens: list[int]) -> Match:
        """What the tree says, which must be what the model says."""
        match = self.tree.match(salt, tokens, len(tokens) // PAGE)
        expected = 0
        while (salt, tuple(tokens[: PAGE * (expected + 1)])) in self.model and expected < len(tokens) // PAGE:
            expected += 1
        assert match.num_pages == expected
        return match

    @rule(num_pages=st.integers(0, 7), salt=st.sampled_from(["", "s"]))
    def enter(self, num_pages: int, salt: str) -> None:
        tokens = self._tokens(num_pages)
        match = self._match(salt, tokens)
        node = self.tree.lock(match, self.now)
        pages = self.tree.pages_to(node)
        assert pages == [self.model[salt, tuple(tokens[: PAGE * (i + 1)])] for i in range(match.num_pages)]
        self.paths.append((node, salt, tokens[: PAGE * match.num_pages], False))

    @precondition(lambda self: self.paths)
    @rule(data=st.data(), num_pages=st.integers(1, 5))
    def extend(self, data: st.DataObject, num_pages: int) -> None:
        index = data.draw(st.integers(0, len(self.paths) - 1))
        node, salt, tokens, owns_end = self.paths[index]
        new = self._tokens(num_pages)
        pages = list(range(self.next_page, self.next_page + num_pages))
        self.next_page += num_pages
        node, taken = self.tree.insert(node, pack(new), pages, self.now, may_grow=owns_end)
        tokens = tokens + new
        expected = [
            page
            for i, page in enumerate(pages)
            if (salt, tuple(tokens[: len(tokens) - PAGE * (num_pages - i - 1)])) not in self.model
        ]
        assert taken == expected, "exactly the pages whose tokens were not there"
        for i, page in enumerate(pages):
            self.model.setdefault((salt, tuple(tokens[: len(tokens) - PAGE * (num_pages - i - 1)])), page)
        self.paths[index] = (node, salt, tokens, bool(taken))

    @precondition(lambda self: self.paths)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        node, _, tokens, _ = self.paths.pop(data.draw(st.integers(0, len(self.paths) - 1)))
        assert node.end == len(tokens) // PAGE
        self.tree.unlock(node)
        if forget:
            self._gone(self.tree.forget(node, len(tokens) // PAGE // 2))

    @rule(num_pages=st.integers(1, 6))
    def evict(self, num_pages: int) -> None:
        expected = min(num_pages, self.tree.num_evictable)
        pages = self.tree.evict(num_pages)
        assert len(pages) == expected, "everything that nobody has locked can go, and no more"
        self._gone(pages)

    def _gone(self, pages: list[int]) -> None:
        locked = {page for node, *_ in self.paths for page in self.tree.pages_to(node)}
        assert locked.isdisjoint(pages), "a locked page was taken"
        assert len(set(pages)) == len(pages)
        left = {key: page for key, page in self.model.items() if page not in set(pages)}
        assert len(left) == len(self.model) - len(pages), "a page that was not there"
        for salt, tokens in left:
            assert len(tokens) == PAGE or (salt, tokens[:-PAGE]) in left, (
                "an inner page before those after it"
            )
        self.model = left

    @rule(seconds=st.sampled_from([0.0, 1.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def agrees(self) -> None:
        self.tree.check_integrity()
        assert self.tree.num_pages == len(self.model)
        assert sorted(p for node in self.tree.nodes() for p in node.pages) == sorted(self.model.values())
        locked = {page for node, *_ in self.paths for page in self.tree.pages_to(node)}
        assert self.tree.num_evictable == len(self.model) - len(locked)

    def teardown(self) -> None:
        for node, *_ in self.paths:
            self.tree.unlock(node)
        assert len(self.tree.evict(10_000)) == len(self.model)
        assert self.tree.num_nodes == 0
        assert not list(self.tree.nodes()), "not even a root is left"


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def test_edges_are_cut_where_tokens_part() -> None:
    tree = make_tree()
    put(tree, [1, 1, 2, 2, 3, 3], [11, 12, 13])
    put(tree, [1, 1, 2, 2, 4, 4, 5, 5], [21, 22, 23, 24])
    edges = {
        tuple(node.pages): [c.pages for c in node.children.values()] for node in tree.nodes() if node.pages
    }
    assert edges == {(11, 12): [[13], [23, 24]], (13,): [], (23, 24): []}
    assert found(tree, [1, 1, 2, 2, 4, 4, 9, 9]) == 3
    assert found(tree, [1, 1, 2, 9]) == 1, "only whole pages"
    assert found(tree, [1, 1, 2, 2], salt="other") == 0


def test_a_run_that_its_owner_continues_stays_one_edge() -> None:
    tree = make_tree()
    node = put(tree, [1, 1], [11])
    for page in (12, 13):
        node, taken = tree.insert(node, pack([page, page]), [page], 0.0, may_grow=True)
        assert taken == [page]
    assert tree.num_nodes == 1
    other = put(tree, [1, 1, 12, 12, 13, 13], [0, 0, 0])
    assert other is node
    node, _ = tree.insert(node, pack([14, 14]), [14], 0.0, may_grow=True)
    assert tree.num_nodes == 2, "but not while somebody else ends there"
    tree.check_integrity()


def test_leaves_go_by_reuses_age_and_what_they_cost() -> None:
    """Values by hand: two accesses at 0 are worth one at 300 ln 2 s; at depth, a page costs more."""
    tree = make_tree()
    twice, late, once = 1, 2, 3
    for page, times in ((twice, (0.0, 0.0)), (late, (0.69 * HORIZON_S,)), (once, (0.0,))):
        for now in times:
            tree.unlock(put(tree, [page, page], [page], now))
    # log 2 = 0.693 against 0.69 against 0
    assert [tree.evict(1) for _ in range(3)] == [[once], [late], [twice]]
    deep = make_tree(cost=0.5)  # a page after four tokens costs three times as much
    deep.unlock(put(deep, [1, 1, 2, 2, 3, 3], [1, 2, 3]))
    deep.unlock(put(deep, [1, 1, 2, 2, 4, 4], [1, 2, 4]))
    deep.unlock(put(deep, [5, 5], [5], 0.5 * HORIZON_S))  # 0.5 against log 3 = 1.10
    assert deep.evict(1) == [5]


def test_only_the_tail_of_a_long_leaf_goes() -> None:
    tree = make_tree()
    tree.unlock(put(tree, list(range(20)), list(range(1, 11))))
    assert tree.evict(3) == [8, 9, 10]
    assert found(tree, list(range(20))) == 7
    assert tree.evict(1) == [7]
    tree.check_integrity()


def test_what_was_reached_through_a_node_makes_it_worth_as_much() -> None:
    """A long answer keeps the prompt before it young."""
    tree = make_tree()
    node = put(tree, [1, 1], [1], 0.0)
    node, _ = tree.insert(node, pack([2, 2]), [2], 3.0 * HORIZON_S, may_grow=False)
    tree.unlock(node)
    tree.unlock(put(tree, [7, 7], [7], 2.0 * HORIZON_S))
    assert [tree.evict(1) for _ in range(3)] == [[7], [2], [1]]


@pytest.mark.parametrize("damage", ["evictable", "lock", "link", "heap"])
def test_integrity_check_can_fail(damage: str) -> None:
    tree = make_tree()
    node = put(tree, [1, 1], [1])
    if damage == "evictable":
        tree.num_evictable += 1
    elif damage == "lock":
        node.num_locks += 1
    elif damage == "link":
        node.start += 1
    else:
        tree.unlock(node)
        tree._near._heap.clear()
    with pytest.raises(RuntimeError):
        tree.check_integrity()


def test_a_hundred_thousand_random_operations_keep_locked_pages() -> None:
    rng, tree = random.Random(5), make_tree()
    paths: list[tuple[Node, list[int]]] = []
    held: dict[int, int] = {}
    next_page = 1
    for step in range(100_000):
        action = rng.random()
        if action < 0.45:
            tokens = [rng.randrange(3) for _ in range(PAGE * rng.randint(1, 8))]
            pages = list(range(next_page, next_page + len(tokens) // PAGE))
            next_page += len(pages)
            node = put(tree, tokens, pages, now=0.01 * step)
            mine = tree.pages_to(node)
            paths.append((node, mine))
            for page in mine:
                held[page] = held.get(page, 0) + 1
        elif action < 0.85 and paths:
            node, mine = paths.pop(rng.randrange(len(paths)))
            tree.unlock(node)
            for page in mine:
                held[page] -= 1
                if not held[page]:
                    del held[page]
        else:
            assert held.keys().isdisjoint(tree.evict(rng.randint(1, 5)))
    tree.check_integrity()
    assert tree.num_evictable == tree.num_pages - len(held)


def test_what_is_kept_goes_last_and_only_if_it_must() -> None:
    tree = make_tree()
    for page, now in ((1, 0.0), (2, 1.0), (3, 2.0)):
        tree.unlock(put(tree, [page, page], [page], now))
    kept = tree.match("", [1, 1], 1).node
    kept.kept_until = 50.0
    assert tree.evict(1, now=10.0) == [2], "the least valuable is kept"
    assert tree.evict(2, now=10.0, below=1e9) == [3], "nobody needs pages so much"
    assert tree.evict(1, now=10.0) == [1], "but now"
    for page, now in ((4, 3.0), (5, 4.0)):
        tree.unlock(put(tree, [page, page], [page], now))
    tree.match("", [4, 4], 1).node.kept_until = 50.0
    assert tree.evict(1, now=10.0, below=-1e9) == []
    tree.check_integrity()
    assert tree.evict(2, now=51.0) == [4, 5], "its time has passed"


class Host:
    """Places on the host, four to a block; refuses now and then."""

    def __init__(self, tree: RadixTree, rng: random.Random, most: int) -> None:
        self.tree, self.rng, self.most = tree, rng, most
        self.held: set[int] = set()
        self.next_block = 0

    def demote(self, node: Node, count: int) -> list[int] | None:
        assert not node.num_locks
        assert not node.on_host
        while len(self.held) + count > self.most:
            if not self.tree.evict_from_host(node.value):
                return None
            self.drop()
        if self.rng.random() < 0.1:
            return None
        places = [4 * self.next_block + i for i in range(count)]
        self.next_block += -(-count // 4)
        self.held.update(places)
        return places

    def drop(self) -> None:
        assert self.held.issuperset(self.tree.dropped)
        assert len(set(self.tree.dropped)) == len(self.tree.dropped)
        self.held.difference_update(self.tree.dropped)
        self.tree.dropped.clear()


def test_a_hundred_thousand_random_operations_on_two_tiers_keep_locked_pages() -> None:
    """Requests that compute or load, loads that outlive them, evictions of both tiers, and what must stay."""
    rng = random.Random(6)
    tree = RadixTree(PAGE, lambda context: 1.0 + context, block_pages=4)
    host = Host(tree, rng, 300)
    paths: list[Node] = []
    loads: list[PrefixLoad] = []
    held: Counter[int] = Counter()  # page -> locks
    moved = Counter[str]()
    next_page = 1
    for step in range(100_000):
        action, now = rng.random(), 0.01 * step
        if action < 0.38:
            tokens = [rng.choice((0, 0, 0, 0, 0, 1)) for _ in range(PAGE * rng.randint(1, 10))]
            match = tree.match("", tokens, len(tokens) // PAGE)
            node = tree.lock(match, now)
            if match.host is not None and rng.random() < 0.5:
                nodes = tree.host_path(match)
                count = sum(len(one.pages) for one in nodes)
                assert count == match.host.num_pages
                tree.hold(nodes[-1])
                load = PrefixLoad(nodes[-1], [p for one in nodes for p in one.pages], deque([((), ())]))
                tree.bring_near(nodes, list(range(next_page, next_page + count)), load)
                next_page += count
                held.update(tree.pages_to(nodes[-1]))
                loads.append(load)
                node = tree.lock_more(nodes, now)
                moved["loaded"] += count
            start = node.end
            pages = list(range(next_page, next_page + len(tokens) // PAGE - start))
            next_page += len(pages)
            if pages:
                node, taken = tree.insert(node, pack(tokens[start * PAGE :]), pages, now, may_grow=False)
                moved["taken"] += len(taken)
            host.drop()
            held.update(tree.pages_to(node))
            paths.append(node)
        elif action < 0.8 and paths:
            node = paths.pop(rng.randrange(len(paths)))
            held.subtract(tree.pages_to(node))
            tree.unlock(node)
        elif action < 0.87 and loads:
            load = loads.pop(rng.randrange(len(loads)))
            load.pieces.clear()
            host.held.difference_update(load.places)
            held.subtract(tree.pages_to(load.end))
            tree.unlock(load.end)
        else:
            pages = tree.evict(rng.randint(1, 5), now, demote=host.demote)
            host.drop()
            moved["evicted"] += len(pages)
            assert not any(held[page] for page in pages), "a locked page was taken"
        if step % 5000 == 0:
            tree.check_integrity()
    tree.check_integrity()
    locked = sum(1 for count in held.values() if count)
    assert tree.num_evictable == tree.num_pages - locked
    assert tree.num_host_pages + sum(len(load.places) for load in loads) == len(host.held)
    assert min(moved.values()) > 5000, moved


def test_a_tail_that_goes_to_the_host_in_parts_stays_one_edge() -> None:
    tree = RadixTree(PAGE, lambda context: 1.0, block_pages=2)
    tree.unlock(put(tree, list(range(16)), list(range(1, 9))))
    places = iter([[10, 11], [20, 21]])
    for pages in ([7, 8], [5, 6]):
        assert tree.evict(1, 1.0, demote=lambda node, count: next(places)) == pages
    match = tree.match("", list(range(16)), 8)
    assert (match.num_pages, match.num_evictable) == (4, 4)
    assert match.host is not None
    assert (match.host.num_pages, match.host.node.pages) == (4, [20, 21, 10, 11])
    assert tree.num_nodes == 2
    assert tree.evict(9, 1.0) == [1, 2, 3, 4], "and without a place the rest takes it along"
    assert tree.dropped == [20, 21, 10, 11]
    assert tree.num_nodes == tree.num_host_pages == 0


def test_operations_do_not_slow_down_with_the_tree() -> None:
    """Ten times the limit of 50 us, for a busy machine; `bench/prefix.py` measures."""
    tree: Any = make_tree()
    rng = random.Random(0)
    prompts = [[rng.randrange(50_000) for _ in range(PAGE * 40)] for _ in range(200)]
    page = 1
    for index in range(20_000):
        tokens = prompts[index % 200][: PAGE * 20] + [index] * (PAGE * 4)
        tree.unlock(put(tree, tokens, list(range(page, page + 24)), now=float(index)))
        page += 24
    assert tree.num_nodes > 20_000
    start = time.process_time()
    for index in range(1000):
        tokens = prompts[index % 200][: PAGE * 20] + [-index] * (PAGE * 4)
        tree.unlock(put(tree, tokens, list(range(page, page + 24)), now=30_000.0 + index))
        page += 24
        tree.evict(4)
    assert (time.process_time() - start) / 3000 < 500e-6
