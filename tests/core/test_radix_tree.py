"""The radix tree against a model of itself, and its values worked out by hand."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.core.radix_node import Match, Node, pack
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
