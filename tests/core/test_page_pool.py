"""The page pool against a model of itself."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.core.page_pool import NULL_PAGE, PagePool

NUM_PAGES = 12


class PoolMachine(RuleBasedStateMachine):
    """Tables that allocate, share and release; a plain dict of counts is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, NUM_PAGES))
    def allocate(self, count: int) -> None:
        owned = {page for table in self.tables for page in table}
        if count > self.pool.num_free:
            with pytest.raises(RuntimeError, match="check first"):
                self.pool.allocate(count)
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert NULL_PAGE not in pages
        assert owned.isdisjoint(pages), "a page was given away twice"
        self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(0, len(table)))]
        self.pool.share(prefix)
        self.tables.append(list(prefix))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @invariant()
    def counts_equal_tables(self) -> None:
        self.pool.check_integrity(self.tables)
        owned = {page for table in self.tables for page in table}
        assert self.pool.num_used == len(owned)
        assert self.pool.num_used + self.pool.num_free == self.pool.num_usable == NUM_PAGES - 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_double_free_is_an_error() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(RuntimeError, match=f"double free of page {pages[1]}"):
        pool.release(pages)


def test_sharing_a_free_page_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nobody owns"):
        PagePool(4).share([2])


@pytest.mark.parametrize(
    ("tables", "message"),
    [([[1, 2], [1]], "2 owners"), ([[1]], "0 owners"), ([[1, 2, 0]], "null page")],
)
def test_integrity_check_can_fail(tables: list[list[int]], message: str) -> None:
    pool = PagePool(4)
    assert pool.allocate(2) == [1, 2]
    with pytest.raises(RuntimeError, match=message):
        pool.check_integrity(tables)
