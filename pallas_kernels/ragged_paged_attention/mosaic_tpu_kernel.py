"""The TPU kernel's body: copies, and attention of one item at a time.

A core walks the work list item by item, and each item's context a *KV block* of pages at a time. Blocks
travel through a ring of buffers: while one is computed, the next ``depth - 1``, of this item or of later
ones, are on their way. A block's slot in the ring is its running number modulo ``depth``, an item's slot for
queries its index modulo ``depth``:

    block     | item 0: 0 | 1 | 2 | item 1: 3 | item 2: 4 | 5 | ...
    slot            0     | 1 | 2 |         0 |         1 | 2 |         (depth 3)
                            ^ computed here: 2 is in flight, and 3 is started into the slot that 0 has left

Only pages that the item needs are copied, and of them only tokens that exist. Everything else in a slot is
left over from earlier blocks and may be NaN: scores and values of it are replaced before they are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_attend import attend_block, begin, finish
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_types import Item, KernelConfig, Refs


class Cursor(NamedTuple):
    """Which block is fetched next, and how many were; this core's items end before ``end``."""

    item: jax.Array
    block: jax.Array
    number: jax.Array
    end: jax.Array


def kernel(*refs: Any, names: tuple[str, ...], config: KernelConfig) -> None:
    """Writes the step's keys and values into their pages, then attends, item by item."""
    run(Refs(**dict(zip(names, refs, strict=True))), config)


def run(refs: Refs, config: KernelConfig) -> None:
    """The kernel on named references."""
    core = pl.program_id(0)
    num_items = refs.num_items[core]
    begins = core * config.items_per_core
    _write_new(refs, config, core)
    cursor = Cursor(begins, jnp.int32(0), jnp.int32(0), begins + num_items)
    cursor = lax.fori_loop(0, config.depth - 1, lambda _, cursor: _fetch_next(refs, config, cursor), cursor)

    def walk_item(index: jax.Array, carry: tuple[Cursor, jax.Array]) -> tuple[Cursor, jax.Array]:
        item = _item(refs, config, index)
        begin(refs, config, item)

        def walk_block(block: jax.Array, carry: tuple[Cursor, jax.Array]) -> tuple[Cursor, jax.Array]:
            cursor, number = carry
            cursor = _fetch_next(refs, config, cursor)
            _wait_for_block(refs, config, index, item, block, number)
            attend_block(
                refs, config, item, block, lax.rem(index, config.depth), lax.rem(number, config.depth)
            )
            return cursor, number + 1

        carry = lax.fori_loop(0, item.num_blocks, walk_block, carry)
        _finish(refs, config, index, item, index - begins)
        return carry

    lax.fori_loop(begins, begins + num_items, walk_item, (cursor, jnp.int32(0)))
    for behind in (2, 1):  # the last two items' outputs are still on their way

        @pl.when(num_items >= behind)
        def _(index: Any = begins + num_items - behind) -> None:
            _out_copy(refs, index, _item(refs, config, index)).wait()


def _finish(refs: Refs, config: KernelConfig, index: jax.Array, item: Item, num_before: jax.Array) -> None:
    """Sends an item's output on its way, from a buffer that the output of the item before last has left."""

    @pl.when(num_before >= 2)
    def _() -> None:
        _out_copy(refs, index - 2, _item(refs, config, index - 2)).wait()

    finish(refs, config, item, lax.rem(index, 2))
    _out_copy(refs, index, item).start()


def _item(refs: Refs, config: KernelConfig, index: jax.Array) -> Item:
    row, first = refs.item_row[index], refs.item_first[index]
    start, end = refs.cu_q_lens[row], refs.cu_q_lens[row + 1]
    count = jnp.minimum(end - start - first, config.q_tokens)
    position = refs.kv_lens[row] - (end - start) + first
    first_key = jnp.int32(0)
    if config.variant.sliding_window is not None:
        first_key = jnp.maximum(position - config.variant.sliding_window + 1, 0)
    first_page = lax.div(first_key, config.page_size)
    num_pages = pl.cdiv(position + count, config.page_size) - first_page
    num_blocks = pl.cdiv(num_pages, config.kv_pages)
    return Item(row, start + first, count, position, first_key, first_page, num_blocks)


def _page(refs: Refs, config: KernelConfig, row: jax.Array, column: jax.Array) -> jax.Array:
    return refs.page_table[row * config.max_pages + column]


# --- new keys and values ---------------------------------------------------------------------------------


def _write_new(refs: Refs, config: KernelConfig, core: jax.Array) -> None:
    """Copies tokens' keys and values to their places, runs within a page at once, and waits for all.

    A core needs what it reads: its own single tokens, and all of the chunks, whose blocks the cores share. So
    two cores may write the same bytes to the same place, and neither waits for the other.
    """
    for part in range(config.folds):  # the tokens of a line bring the same line: not both at once
        _for_each_item(refs, config, core, part, lambda copy: copy.start())
        _for_each_item(refs, config, core, part, lambda copy: copy.wait())


def _for_each_item(refs: Refs, config: KernelConfig, core: jax.Array, part: int, use: Any) -> None:
    for owner in range(config.cores):

        def write_item(index: jax.Array, _: None, owner: int = owner) -> None:
            item = _item(refs, config, index)
            is_needed = (core == owner) | (item.count > 1)
            pl.when(is_needed)(lambda: _for_each_run(refs, config, item, part, use))
            if config.has_scales and part == 0:
                is_first = item.token == refs.cu_q_lens[item.row]
                pl.when(is_needed & is_first)(lambda: _for_each_scale_page(refs, config, item.row, use))

        begin = owner * config.items_per_core
        lax.fori_loop(begin, begin + refs.num_items[owner], write_item, None)


def _for_each_run(refs: Refs, config: KernelConfig, item: Item, part: int, use: Any) -> None:
    """Copies the lines of an item's tokens in a part of their pages; columns here are of parts."""
    size = config.part_size
    first_column = lax.div(item.position, size)
    end_column = pl.cdiv(item.end, size)
    first_column += lax.rem(part + config.folds - lax.rem(first_column, config.folds), config.folds)

    def run_in_part(index: jax.Array, _: None) -> None:
        column = first_column + index * config.folds
        start = jnp.maximum(item.position, column * size)
        count = jnp.minimum(item.end, (column + 1) * size) - start
        if config.q_tokens == 1:
            count = 1
        page = _page(refs, config, item.row, lax.div(column, config.folds))
        use(
            pltpu.make_async_copy(
                refs.new_kv.at[pl.ds(item.token + start - item.position, count)],
                refs.pages.at[page, pl.ds(start - column * size, count)],
                refs.write_sem,
            )
        )

    lax.fori_loop(0, pl.cdiv(end_column - first_column, config.folds), run_in_part, None)


def _for_each_scale_page(refs: Refs, config: KernelConfig, row: jax.Array, use: Any) -> None:
    """Copies the scales of every page that a row writes to, as `merge_scales` made them."""
    position = refs.kv_lens[row] - (refs.cu_q_lens[row + 1] - refs.cu_q_lens[row])
    first_column = lax.div(position, config.page_size)

    def copy_page(column: jax.Array, _: None) -> None:
        use(
            pltpu.make_async_copy(
                refs.new_scales.at[refs.first_scales[row] + column - first_column],
                refs.scales.at[_page(refs, config, row, column)],
                refs.write_sem,
            )
        )

    lax.fori_loop(first_column, pl.cdiv(refs.kv_lens[row], config.page_size), copy_page, None)


# --- copies of the ring ----------------------------------------------------------------------------------


def _fetch_next(refs: Refs, config: KernelConfig, cursor: Cursor) -> Cursor:
    """Starts the copies of the cursor's block, if there is one, and of its item's queries with the first."""
    is_there = cursor.item < cursor.end
    item = _item(refs, config, jnp.where(is_there, cursor.item, 0))

    @pl.when(is_there)
    def _() -> None:
        _for_each_page(
            refs, config, item, cursor.block, lax.rem(cursor.number, config.depth), lambda copy: copy.start()
        )

    @pl.when(is_there & (cursor.block == 0))
    def _() -> None:
        _q_copy(refs, config, cursor.item, item).start()

    is_last = cursor.block + 1 >= item.num_blocks
    following = Cursor(
        item=jnp.where(is_last, cursor.item + 1, cursor.item),
        block=jnp.where(is_last, 0, cursor.block + 1),
        number=cursor.number + 1,
        end=cursor.end,
    )
    return jax.tree.map(lambda new, old: jnp.where(is_there, new, old), following, cursor)


def _wait_for_block(
    refs: Refs, config: KernelConfig, index: jax.Array, item: Item, block: jax.Array, number: jax.Array
) -> None:
    @pl.when(block == 0)
    def _() -> None:
        _q_copy(refs, config, index, item).wait()

    _for_each_page(refs, config, item, block, lax.rem(number, config.depth), lambda copy: copy.wait())


def _for_each_page(
    refs: Refs, config: KernelConfig, item: Item, block: jax.Array, slot: jax.Array, use: Any
) -> None:
    first = item.first_page + block * config.kv_pages
    end = jnp.minimum(pl.cdiv(item.end, config.page_size), first + config.kv_pages)

    def copy_page(column: jax.Array, _: None) -> None:
        count = jnp.minimum(item.end - column * config.page_size, config.part_size)
        page = _page(refs, config, item.row, column)
        if config.has_scales:
            ring = refs.scale_ring.at[slot, column - first]
            use(pltpu.make_async_copy(refs.scales.at[page], ring, refs.kv_sems.at[slot]))
        use(
            pltpu.make_async_copy(
                refs.pages.at[page, pl.ds(0, count)],
                refs.kv_ring.at[slot, column - first, pl.ds(0, count)],
                refs.kv_sems.at[slot],
            )
        )

    lax.fori_loop(first, end, copy_page, None)


def _q_copy(refs: Refs, config: KernelConfig, index: jax.Array, item: Item) -> Any:
    slot = lax.rem(index, config.depth)
    return pltpu.make_async_copy(
        refs.q.at[:, pl.ds(item.token, item.count)],
        refs.q_ring.at[slot, :, pl.ds(0, item.count)],
        refs.q_sems.at[slot],
    )


def _out_copy(refs: Refs, index: jax.Array, item: Item) -> Any:
    slot = lax.rem(index, 2)
    return pltpu.make_async_copy(
        refs.out_ring.at[slot, :, pl.ds(0, item.count)],
        refs.out.at[:, pl.ds(item.token, item.count)],
        refs.out_sems.at[slot],
    )
