"""Rings of tiles in shared memory, between a producer, which loads keys and values, and its consumers.

Tiles of a 16-bit cache land where tensor cores read them. Those of an 8-bit cache take two steps: codes land
in a ring of their own, and the producer's warpgroup, idle otherwise, converts them, exactly, into the tile
that tensor cores read. Their scales stay float32 and multiply scores and softmax weights.

    cache --TMA--> tiles --> consumers                               16-bit
    cache --TMA--> codes --producer--> a tile --> consumers           8-bit
          --TMA--> scales ----------------------> consumers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import tile
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu.tile import Heads, Tensors

_CONVERTED_ROWS = 64  # at once
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, slots=True)
class RingShape:
    """How much of what is kept.

    Attributes:
        heads: sizes.
        tokens: of a tile.
        stages: tiles on their way.
        owners: producers of a CTA, each with a ring of its own.
        num_consumers: warpgroups that read every tile.
    """

    heads: Heads
    tokens: int
    stages: int
    owners: int
    num_consumers: int

    @property
    def readable(self) -> int:
        """Tiles of a ring that tensor cores can read."""
        return 1 if self.heads.is_coded else self.stages

    @property
    def copies(self) -> int:
        """Pages that make up a tile."""
        return max(1, self.tokens // self.heads.page_size)

    @property
    def num_scales(self) -> int:
        """Tiles whose scales are kept: those on their way, and those that are read."""
        return self.stages + self.readable

    def memory(self) -> tuple[plgpu.GPUMemoryRef, ...]:
        """Keys and values; then, of 8-bit caches, codes of both, and scales."""
        heads = self.heads
        shape = (self.owners * self.readable, self.tokens, heads.head_dim)
        read = plgpu.SMEM(shape, heads.dtype, transforms=tile.smem_transforms(heads.head_dim, heads.dtype))
        if not heads.is_coded:
            return read, read
        shape = (self.owners * self.stages, self.tokens, heads.head_dim)
        transforms = tile.smem_transforms(heads.head_dim, heads.kv_dtype)
        codes = plgpu.SMEM(shape, heads.kv_dtype, transforms=transforms)
        scales = plgpu.SMEM((self.owners * self.num_scales, 2, self.tokens), jnp.float32)
        return read, read, codes, codes, scales

    def barriers(self) -> tuple[plgpu.Barrier, ...]:
        """Full and free tiles of keys and of values; then, of 8-bit caches, codes that have landed."""
        num = self.owners * self.readable
        free = plgpu.Barrier(num_arrivals=self.num_consumers, num_barriers=num)
        if not self.heads.is_coded:
            full = plgpu.Barrier(num_arrivals=self.copies, num_barriers=num)
            return full, full, free, free
        full = plgpu.Barrier(num_barriers=num)
        num = self.owners * self.stages
        landed = [plgpu.Barrier(num_arrivals=each * self.copies, num_barriers=num) for each in (3, 1)]
        return full, full, free, free, *landed

    def open(self, memory: Sequence[Any], barriers: Sequence[Any], owner: jax.Array | int) -> Ring:
        """One owner's ring, in references to `memory` and `barriers`."""
        sides: list[_Side] = []
        for which in range(2):
            codes = memory[2 + which] if self.heads.is_coded else None
            landed = barriers[4 + which] if self.heads.is_coded else None
            sides.append(_Side(memory[which], barriers[which], barriers[2 + which], codes, landed))
        return Ring(self, *sides, memory[4] if self.heads.is_coded else None, owner)


class _Side(NamedTuple):
    """Tiles of keys, or of values, with what tells that they are full and free."""

    tiles: Any
    full: Any
    free: Any
    codes: Any
    landed: Any


class Ring(NamedTuple):
    """A ring as its producer and its consumers see it. Tiles are numbered as they come, from 0."""

    shape: RingShape
    keys: _Side
    values: _Side
    scales: Any
    owner: jax.Array | int

    # ------------------------------------------------------------------ consumers

    def wait(self, side: _Side, number: jax.Array) -> Any:
        """The tile ``[tokens, head_dim]``, when it is there."""
        slot = self._slot(number, self.shape.readable)
        plgpu.barrier_wait(side.full.at[slot])
        return side.tiles.at[slot]

    def release(self, side: _Side, number: jax.Array) -> None:
        """Says that this consumer has read the tile; its scales, too, once that is said of both sides."""
        plgpu.barrier_arrive(side.free.at[self._slot(number, self.shape.readable)])

    def scaled(self, scores: jax.Array, number: jax.Array) -> jax.Array:
        """Scores ``[64, tokens]`` of codes, times the scales of the keys, which were waited for."""
        return scores * self._scales(0, number, scores) if self.shape.heads.is_coded else scores

    def weighted(self, weights: jax.Array, number: jax.Array, seen: jax.Array | None) -> jax.Array:
        """Softmax weights ``[64, tokens]``, times the scales of the values; the keys were waited for.

        Args:
            seen: which of them count, of others the scale may be anything; None if all do.
        """
        if not self.shape.heads.is_coded:
            return weights
        weights = weights * self._scales(1, number, weights)
        return weights if seen is None else jnp.where(seen, weights, 0.0)

    def _scales(self, which: int, number: jax.Array, like: jax.Array) -> jax.Array:
        slot = self._slot(number, self.shape.num_scales)
        scales = plgpu.load(self.scales.at[slot, which], layout=_COLUMNS)
        return lax.broadcast_in_dim(scales, like.shape, [1])

    # ------------------------------------------------------------------ producer

    def fetch(
        self, number: jax.Array, tensors: Tensors, row: Any, head: Any, start: jax.Array, last_page: jax.Array
    ) -> None:
        """Has the tile of a row's context from token ``start`` on copied, when there is room.

        Args:
            number: of the tile, one more than the last.
            head: of keys and values.
            last_page: of the row, which stands in for those behind it.
        """
        shape, size = self.shape, self.shape.heads.page_size
        first = lax.div(start, size)
        pages = [tensors.page_table[row, jnp.minimum(first + i, last_page)] for i in range(shape.copies)]
        rows = min(shape.tokens, size)
        within = pl.ds(lax.rem(start, size) if size > shape.tokens else 0, rows)
        slot = self._slot(number, shape.stages)
        for which, side in enumerate((self.keys, self.values)):
            if shape.heads.is_coded:  # what was there has been converted
                target, barrier = side.codes, side.landed
            else:
                target, barrier = side.tiles, side.full
                pl.when(number >= shape.stages)(lambda side=side: plgpu.barrier_wait(side.free.at[slot]))
            for i, page in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    tensors.kv_pages.at[page, within, 2 * head + which],
                    target.at[slot, pl.ds(i * rows, rows)],
                    barrier.at[slot],
                )
        if shape.heads.is_coded:
            for which in range(2):
                for i, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        tensors.scales.at[page, 2 * head + which, within],
                        self.scales.at[self._slot(number, shape.num_scales), which, pl.ds(i * rows, rows)],
                        self.keys.landed.at[slot],
                    )
            behind = shape.stages - 1
            pl.when(number >= behind)(lambda: self._convert(number - behind))

    def finish(self, total: jax.Array) -> None:
        """After the last of so many tiles: returns when all have been read."""
        shape = self.shape
        if shape.heads.is_coded:
            pl.loop(jnp.maximum(total - (shape.stages - 1), 0), total)(self._convert)

        @pl.loop(jnp.maximum(total - shape.readable, 0), total)
        def _drain(number):
            for side in (self.keys, self.values):
                plgpu.barrier_wait(side.free.at[self._slot(number, shape.readable)])

    def _convert(self, number: jax.Array) -> None:
        """Codes that have landed to the numbers that they are."""
        shape = self.shape
        source, slot = self._slot(number, shape.stages), self._slot(number, shape.readable)
        for side in (self.keys, self.values):
            pl.when(number >= shape.readable)(lambda side=side: plgpu.barrier_wait(side.free.at[slot]))
            plgpu.barrier_wait(side.landed.at[source])
            for first in range(0, shape.tokens, _CONVERTED_ROWS):
                rows = pl.ds(first, _CONVERTED_ROWS)
                codes = plgpu.load(side.codes.at[source, rows], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                side.tiles.at[slot, rows][...] = _widened(codes, shape.heads.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(side.full.at[slot])

    def _slot(self, number: jax.Array, count: int) -> jax.Array:
        return self.owner * count + lax.rem(number, count)


def _widened(codes: jax.Array, dtype: Any) -> jax.Array:
    """Codes in a 16-bit type, which has all of them."""
    if codes.dtype == jnp.float8_e4m3fn:
        codes = codes.astype(jnp.float16)  # the one conversion that the device has
        if dtype != jnp.float16:
            codes = codes.astype(jnp.float32)
    return codes.astype(dtype)
