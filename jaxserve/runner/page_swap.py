"""Copies KV pages between the device's caches and host memory, beside the steps.

    save:  pages --gather (in step order)--> block on the device --copy--> block on the host
    load:  block on the host --copy--> block on the device;  land: --scatter (in step order)--> pages

Only gather and scatter run among the steps, at the device's own bandwidth; the host never waits for a copy.
Host blocks are arrays in pinned memory, which XLA's allocator keeps and uses again.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.plan import NO_PAGE, NO_SLOT, PageCopy, StepPlan
from jaxserve.core.resume_costs import MOST_SAVING
from jaxserve.models.sharding import Placement
from jaxserve.pallas_kernels.layout import gather_pages, scatter_pages
from jaxserve.runner.step import Caches

_PINNED = "pinned_host"


@final
class PageSwapper:
    """The copies of `jaxserve.core.host_traffic`, compiled when it is made.

    A save waits for the oldest one where too many are on their way.

    Args:
        caches: whose pages these are; not kept.
        block_pages: pages of a block.
        placement: of the caches.
    """

    def __init__(self, caches: Caches, block_pages: int, placement: Placement) -> None:
        self._block_pages = block_pages
        self._on_device = jax.tree.map(lambda array: array.sharding, caches)
        self._on_host = jax.tree.map(lambda sharding: sharding.with_memory_kind(_PINNED), self._on_device)
        ids = jax.ShapeDtypeStruct((block_pages,), jnp.int32, sharding=placement.sharding())
        gather: Any = jax.jit(_gather, out_shardings=self._on_device)
        self._gather = gather.lower(caches, ids).compile()
        block = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(
                (block_pages, *array.shape[1:]), array.dtype, sharding=array.sharding
            ),
            caches,
        )
        scatter: Any = jax.jit(_scatter, donate_argnums=0, out_shardings=self._on_device)
        self._scatter = scatter.lower(caches, ids, block).compile()
        self._blocks: dict[int, Caches] = {}
        self._saving: deque[Caches] = deque()
        self._loading: dict[int, tuple[PageCopy, list[Caches]]] = {}  # number of the load -> its blocks, near
        self._reported: set[int] = set()
        self.bytes_s = self._measure(caches)

    def run(self, plan: StepPlan, caches: Caches) -> Caches:
        """The copies of a plan, before its step; returns the caches, which are donated if anything lands."""
        for save in plan.saves:
            self._save(save, caches)
        loads = {load.number: load for load in plan.loads}
        # In the plan's order: what landed first may have been given up for what lands after it.
        for number in plan.landings:
            if number in loads:  # only now: its blocks need not wait beside those of others
                self._load(loads.pop(number))
            caches = self._land(number, caches)
        for load in loads.values():
            self._load(load)
        return caches

    def _land(self, number: int, caches: Caches) -> Caches:
        load, blocks = self._loading.pop(number)
        self._reported.discard(number)
        for ids, block in zip(self._ids(load), blocks, strict=True):
            caches = self._scatter(caches, ids, block)
        return caches

    def arrived(self) -> tuple[int, ...]:
        """Numbers of loads whose blocks are on the device; each is reported once."""
        new = tuple(
            number
            for number, (_, blocks) in self._loading.items()
            if number not in self._reported and all(_is_ready(block) for block in blocks)
        )
        self._reported.update(new)
        return new

    def forget(self) -> None:
        """Drops what is on its way: a step has failed, and nobody will ask for it."""
        self._saving.clear()
        self._loading.clear()
        self._reported.clear()

    def _save(self, save: PageCopy, caches: Caches) -> None:
        for block, ids in zip(save.blocks, self._ids(save), strict=True):
            while self._saving and (len(self._saving) >= MOST_SAVING or _is_ready(self._saving[0])):
                jax.block_until_ready(self._saving.popleft())
            copy: Caches = jax.device_put(self._gather(caches, ids), self._on_host)
            self._blocks[block] = copy
            self._saving.append(copy)

    def _load(self, load: PageCopy) -> None:
        # A slot has one load at a time: an older one was cancelled, and nobody else will say so.
        same_slot = [n for n, (other, _) in self._loading.items() if other.slot == load.slot != NO_SLOT]
        for number in same_slot:
            del self._loading[number]
            self._reported.discard(number)
        near: list[Caches] = [jax.device_put(self._blocks[block], self._on_device) for block in load.blocks]
        self._loading[load.number] = load, near

    def _ids(self, copy: PageCopy) -> list[np.ndarray]:
        """The pages of each block, int32 [block_pages], padded with an id that is out of range."""
        ids = np.full(len(copy.blocks) * self._block_pages, NO_PAGE, np.int32)
        ids[: len(copy.pages)] = copy.pages
        return list(ids.reshape(len(copy.blocks), self._block_pages))

    def _measure(self, caches: Caches) -> float:
        """Bytes per second of a copy to the host, or back if that is slower: the best of three rounds."""
        block = jax.block_until_ready(self._gather(caches, np.zeros(self._block_pages, np.int32)))
        num_bytes = sum(array.nbytes for array in jax.tree.leaves(block))
        seconds: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            far = jax.block_until_ready(jax.device_put(block, self._on_host))
            middle = time.perf_counter()
            jax.block_until_ready(jax.device_put(far, self._on_device))
            seconds.append(max(middle - start, time.perf_counter() - middle))
        return num_bytes / max(min(seconds), 1e-9)


def _gather(caches: Caches, ids: jax.Array) -> Caches:
    return tuple(gather_pages(cache, ids) for cache in caches)


def _scatter(caches: Caches, ids: jax.Array, block: Caches) -> Caches:
    return tuple(scatter_pages(cache, ids, pages) for cache, pages in zip(caches, block, strict=True))


def _is_ready(block: Caches) -> bool:
    return all(array.is_ready() for array in jax.tree.leaves(block))
