"""How keys and values lie in pages, how they are rounded to eight bits, and the primitives that move pages.

Every operation on a KV cache goes through this layout, so that a cache of another precision is another layout
and not another copy of the code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Stored types of a byte, and the largest magnitude of a code.
LARGEST_CODE = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """One layer's paged KV cache: an array ``[num_pages, page_size, 2 * num_kv_heads, head_dim]``.

    Token-major: the keys and values of all heads of one token are one contiguous row, so writing a token is
    one copy. Head ``h`` has its key at index ``2 * h`` and its value at ``2 * h + 1``: a shard of that axis
    holds whole heads. Page 0 is the null page: no request owns it, page tables are padded with it, and
    padding tokens may be written to it.

    Packed, it is ``[num_pages, page_size, num_kv_heads, 2 * head_dim]``: a head's key and value side by side.
    In row-major memory these are the same bytes; a TPU, which fills up rows to 128 elements, needs half the
    memory for heads of 64.

    Folded, a page's tokens lie in ``folds`` parts side by side: with ``half = page_size // 2``, tokens ``i``
    and ``half + i`` share a row of ``[num_pages, half, 2 * 2 * num_kv_heads, head_dim]``, in the order head,
    part, key or value. A TPU copies whole 32-bit words of rows: so it can, where a token's own are less.

    An 8-bit cache (int8, float8_e4m3fn) has a second array, float32 ``[num_pages, 2 * num_kv_heads,
    page_size]``: the scale of each key and value, head-major within a page, so that one head's scales of a
    page are one contiguous run. A stored element stands for code times scale.

    Attributes:
        page_size: tokens in a page.
        num_kv_heads: key/value heads in this array (per shard, under `jax.shard_map`).
        head_dim: elements of one key.
        dtype: of the stored elements: float32, bfloat16, float16, int8 or float8_e4m3fn.
        is_packed: whether a head's key and value are one row.
        folds: parts of a page that lie side by side; divides ``page_size``.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    is_packed: bool = False
    folds: int = 1

    def __post_init__(self) -> None:
        for name in ("page_size", "num_kv_heads", "head_dim", "folds"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.page_size % self.folds:
            raise ValueError(f"folds={self.folds}: must divide page_size={self.page_size}")
        dtype = jnp.dtype(self.dtype)
        is_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (2, 4)
        if not is_float and dtype not in LARGEST_CODE:
            raise ValueError(
                f"dtype={dtype}: must be float32, bfloat16, float16, {', '.join(map(str, LARGEST_CODE))}"
            )
        object.__setattr__(self, "dtype", dtype)

    @property
    def has_scales(self) -> bool:
        """Whether elements are codes that stand for code times scale."""
        return self.dtype in LARGEST_CODE

    def shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """The shape of one layer's elements with this many pages, the null page included."""
        heads = self.num_kv_heads * self.folds
        row = (heads, 2 * self.head_dim) if self.is_packed else (2 * heads, self.head_dim)
        return (num_pages, self.page_size // self.folds, *row)

    def scales_shape(self, num_pages: int) -> tuple[int, int, int]:
        """The shape of one layer's scales with this many pages, of a layout that has them."""
        return (num_pages, 2 * self.num_kv_heads, self.page_size)

    def bytes_per_page(self) -> int:
        """Bytes that one page takes in one layer, its scales included."""
        elements = math.prod(self.shape(1)) * self.dtype.itemsize
        return elements + (4 * math.prod(self.scales_shape(1)) if self.has_scales else 0)

    def shapes(self, num_pages: int) -> KVPages:
        """One layer's cache as `jax.ShapeDtypeStruct`."""
        data: Any = jax.ShapeDtypeStruct(self.shape(num_pages), self.dtype)
        scales: Any = jax.ShapeDtypeStruct(self.scales_shape(num_pages), jnp.float32)
        return KVPages(data, scales if self.has_scales else None, self.head_dim, self.folds)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KVPages:
    """One layer's cache; a pytree.

    The layout follows from the arrays, for under `jax.shard_map` they hold fewer heads. What they do not tell
    is static.

    Attributes:
        data: the elements, see `KVLayout`.
        scales: float32 ``[num_pages, 2 * num_kv_heads, page_size]``; None unless ``data`` is 8-bit.
        head_dim, folds: see `KVLayout`; static.
    """

    data: jax.Array
    scales: jax.Array | None
    head_dim: int = dataclasses.field(metadata={"static": True})
    folds: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def layout(self) -> KVLayout:
        """How the arrays are laid out.

        Raises:
            ValueError: if they cannot be a KV cache.
        """
        shape, dtype = self.data.shape, self.data.dtype
        if len(shape) != 4 or 0 in shape:
            raise ValueError(
                f"kv_pages has shape {shape}: must be [num_pages, page_size, 2 * num_kv_heads, head_dim]"
            )
        num_pages, tokens, rows, width = shape
        is_packed = width == 2 * self.head_dim
        rows_per_head = self.folds * (1 if is_packed else 2)
        if width not in (self.head_dim, 2 * self.head_dim) or rows % rows_per_head:
            raise ValueError(
                f"kv_pages has shape {shape}, for heads of {self.head_dim} elements: "
                "must end in [2 * num_kv_heads, head_dim], or packed in [num_kv_heads, 2 * head_dim]"
            )
        heads, page_size = rows // rows_per_head, tokens * self.folds
        layout = KVLayout(page_size, heads, self.head_dim, dtype, is_packed, self.folds)
        if layout.has_scales != (self.scales is not None):
            must = "must have scales" if layout.has_scales else "must have no scales"
            raise ValueError(f"kv_pages is {dtype}: {must}")
        if self.scales is not None:
            expected = layout.scales_shape(num_pages)
            if self.scales.shape != expected or self.scales.dtype != jnp.float32:
                raise ValueError(
                    f"scales is {self.scales.dtype}{list(self.scales.shape)}: must be float32{list(expected)}"
                )
        return layout

    def ordered(self, *, is_packed: bool = False, folds: int = 1) -> KVPages:
        """The same cache in another order; folding and unfolding copies it."""
        layout = self.layout
        wanted = dataclasses.replace(layout, is_packed=is_packed, folds=folds)
        data = self.data
        if folds != self.folds:
            size, last = layout.page_size, (layout.num_kv_heads, 2 * layout.head_dim)
            by_line = data.reshape(-1, size // self.folds, last[0], self.folds, last[1])
            by_token = by_line.transpose(0, 3, 1, 2, 4)
            data = by_token.reshape(-1, folds, size // folds, *last).transpose(0, 2, 3, 1, 4)
        return KVPages(data.reshape(wanted.shape(-1)), self.scales, self.head_dim, folds)


def interleave(k: jax.Array, v: jax.Array) -> jax.Array:
    """Keys and values ``[..., heads, head_dim]`` in the layout's order, ``[..., 2 * heads, head_dim]``."""
    *lead, heads, head_dim = k.shape
    return jnp.stack([k, v], axis=-2).reshape(*lead, 2 * heads, head_dim)


def encode(k: jax.Array, v: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Keys and values as a cache stores them.

    Every key and every value has a scale of its own, from its own largest magnitude, so what was stored once
    is never rounded again: a token's codes do not depend on its neighbours, or on when it was written.

    Args:
        k, v: ``[..., heads, head_dim]``.
        dtype: of the cache.

    Returns:
        The elements ``[..., 2 * heads, head_dim]`` in that dtype, and if it is 8-bit their scales, float32
        ``[..., 2 * heads]``: the largest magnitude over 127 (int8) or 448 (float8_e4m3fn), 1 where that is
        zero or subnormal, NaN where an element is not finite. Codes are the elements times the scales'
        reciprocals, rounded to nearest, ties to even.
    """
    values = interleave(k, v)
    largest = LARGEST_CODE.get(jnp.dtype(dtype))
    if largest is None:
        return values.astype(dtype), None
    values = values.astype(jnp.float32)
    # Products only: of a division XLA may or may not make one, and a tie would be rounded the other way.
    scales = jnp.max(jnp.abs(values), axis=-1) * jnp.float32(1.0 / largest)
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    scales = jnp.where(jnp.isinf(scales), jnp.nan, scales)
    codes = jnp.clip(values * (1.0 / scales)[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        codes = jnp.where(jnp.isnan(codes), 0.0, jnp.round(codes))  # the scale is what tells
    return codes.astype(dtype), scales


def gather_pages[Cache: (jax.Array, KVPages)](kv_pages: Cache, page_ids: jax.Array) -> Cache:
    """Copies whole pages out of a cache, bit for bit, with their scales if they have any.

    Args:
        kv_pages: one layer's cache.
        page_ids: int32 ``[n]``, each in ``[0, num_pages)``.

    Returns:
        A cache of ``n`` pages; an id out of range gives zeros.
    """

    def gather(array: jax.Array) -> jax.Array:
        return array.at[page_ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    return jax.tree.map(gather, kv_pages)


def scatter_pages[Cache: (jax.Array, KVPages)](kv_pages: Cache, page_ids: jax.Array, pages: Cache) -> Cache:
    """Writes whole pages into a cache, in place if the caller donates it; the inverse of `gather_pages`.

    Args:
        kv_pages: one layer's cache.
        page_ids: int32 ``[n]``, all different; an id out of range is skipped, so that a list can be padded.
        pages: a cache of ``n`` pages, of the same layout.

    Returns:
        The cache with those pages replaced.

    Raises:
        ValueError: if ``pages`` has another shape, dtype or layout than the cache's pages.
    """
    if jax.tree.structure(pages) != jax.tree.structure(kv_pages):
        raise ValueError("pages is of another layout: must be the cache's, with scales if that has them")

    def scatter(array: jax.Array, new: jax.Array) -> jax.Array:
        expected = (*page_ids.shape, *array.shape[1:])
        if new.shape != expected or new.dtype != array.dtype:
            raise ValueError(f"pages is {new.dtype}{list(new.shape)}: must be {array.dtype}{list(expected)}")
        return array.at[page_ids].set(new, mode="drop", wrap_negative_indices=False)

    return jax.tree.map(scatter, kv_pages, pages)
