"""Copies of pages to the host and back, by the plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.plan import NO_PAGE, NO_SLOT, Bucket, PageCopy, StepPlan, StepRows
from jaxserve.core.resume_costs import MOST_SAVING
from jaxserve.models.sharding import Placement, make_mesh
from jaxserve.pallas_kernels.layout import KVLayout, KVPages
from jaxserve.runner import page_swap
from jaxserve.runner.page_swap import PageSwapper
from jaxserve.runner.step import Caches

NUM_PAGES, BLOCK = 6, 2


def plan(
    step: int, saves: tuple[PageCopy, ...], loads: tuple[PageCopy, ...], landings: tuple[int, ...]
) -> StepPlan:
    return StepPlan(step, StepRows(), Bucket(1, 1), saves=saves, loads=loads, landings=landings)


def copy(number: int, block: int, page: int) -> PageCopy:
    return PageCopy(number, "", NO_SLOT, (block,), (page, NO_PAGE))


def make_swapper() -> tuple[PageSwapper, Caches]:
    """On pages that hold their own number."""
    placement = Placement(make_mesh(1))
    shapes = KVLayout(2, 1, 4, jnp.dtype("float32")).shapes(NUM_PAGES)
    contents = np.broadcast_to(np.arange(NUM_PAGES, dtype=np.float32)[:, None, None, None], shapes.data.shape)
    caches = (KVPages(jax.device_put(jnp.asarray(contents), placement.sharding()), None, 4),)
    return PageSwapper(caches, BLOCK, placement), caches


@pytest.mark.parametrize("second_lands", [False, True])
def test_landings_are_in_the_order_of_the_plan(second_lands: bool) -> None:
    """A page of a load that has just landed is given up for another load, which may land in the same plan."""
    swapper, caches = make_swapper()
    saves = (copy(1, 1, 1), copy(2, 2, 2))
    caches = swapper.run(plan(0, saves, (copy(3, 1, 4),), ()), caches)
    landings = (3, 4) if second_lands else (3,)
    caches = swapper.run(plan(1, (), (copy(4, 2, 4),), landings), caches)
    pages = np.asarray(caches[0].data)[:, 0, 0, 0]
    assert pages.tolist() == [0, 1, 2, 3, 2 if second_lands else 1, 5]
    if not second_lands:
        caches = swapper.run(plan(2, (), (), (4,)), caches)
        assert np.asarray(caches[0].data)[4, 0, 0, 0] == 2


def test_a_step_waits_for_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the link: nothing is ready here. Only a save more than may be on its way waits."""
    swapper, caches = make_swapper()
    ready, waits = [False], list[object]()
    monkeypatch.setattr(page_swap, "_is_ready", lambda block: ready[0])
    monkeypatch.setattr(jax, "block_until_ready", waits.append)
    saves = tuple(copy(number, number, 1) for number in range(MOST_SAVING))
    caches = swapper.run(plan(0, saves, (copy(99, 3, 4),), ()), caches)
    assert swapper.arrived() == ()
    assert not waits
    ready[0] = True
    assert (swapper.arrived(), swapper.arrived()) == ((99,), ())
    ready[0] = False
    swapper.run(plan(1, (copy(100, 100, 1),), (), ()), caches)
    assert len(waits) == 1


def test_blocks_are_written_over_and_copies_given_up() -> None:
    """Saves and loads in the same blocks again and again hold no more arrays than the first."""
    swapper, caches = make_swapper()
    alive: list[int] = []
    for step in range(20):
        saves = (copy(10 * step, 1, 1), copy(10 * step + 1, 2, 2))
        load = copy(10 * step + 2, 1, 4)
        caches = swapper.run(plan(step, saves, (load,), (load.number,)), caches)
        jax.block_until_ready(caches)
        swapper.forget()
        alive.append(len(jax.live_arrays()))
    assert alive[-1] == alive[0]
