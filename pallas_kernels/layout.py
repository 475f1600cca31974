"""How keys and values lie in pages, and the primitives that move whole pages.

Every operation on a KV cache goes through this layout, so that a cache of another precision is another layout
and not another copy of the code.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


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

    Attributes:
        page_size: tokens in a page.
        num_kv_heads: key/value heads in this array (per shard, under `jax.shard_map`).
        head_dim: elements of one key.
        dtype: of the stored elements.
        is_packed: whether a head's key and value are one row.
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    is_packed: bool = False

    def __post_init__(self) -> None:
        for name in ("page_size", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """The shape of one layer's cache with this many pages, the null page included."""
        if self.is_packed:
            return (num_pages, self.page_size, self.num_kv_heads, 2 * self.head_dim)
        return (num_pages, self.page_size, 2 * self.num_kv_heads, self.head_dim)

    def bytes_per_page(self) -> int:
        """Bytes that one page takes in one layer."""
        return math.prod(self.shape(1)) * self.dtype.itemsize

    @classmethod
    def of(cls, kv_pages: jax.Array) -> KVLayout:
        """The layout of an existing cache array that is not packed.

        Raises:
            ValueError: if the array cannot be a KV cache.
        """
        if kv_pages.ndim != 4 or kv_pages.shape[2] % 2:
            raise ValueError(
                f"kv_pages has shape {kv_pages.shape}: "
                "must be [num_pages, page_size, 2 * num_kv_heads, head_dim]"
            )
        _, page_size, doubled_heads, head_dim = kv_pages.shape
        return cls(page_size, doubled_heads // 2, head_dim, kv_pages.dtype)


def unpacked(kv_pages: jax.Array, head_dim: int) -> jax.Array:
    """A cache array in the order that is not packed; the array itself if it is in it already."""
    num_pages, page_size, rows, width = kv_pages.shape
    if width != 2 * head_dim:
        return kv_pages
    return kv_pages.reshape(num_pages, page_size, 2 * rows, head_dim)


def interleave(k: jax.Array, v: jax.Array) -> jax.Array:
    """Keys and values ``[..., heads, head_dim]`` in the layout's order, ``[..., 2 * heads, head_dim]``."""
    *lead, heads, head_dim = k.shape
    return jnp.stack([k, v], axis=-2).reshape(*lead, 2 * heads, head_dim)


def gather_pages(kv_pages: jax.Array, page_ids: jax.Array) -> jax.Array:
    """Copies whole pages out of a cache, bit for bit.

    Args:
        kv_pages: ``[num_pages, page_size, 2 * heads, head_dim]``.
        page_ids: int32 ``[n]``, each in ``[0, num_pages)``.

    Returns:
        ``[n, page_size, 2 * heads, head_dim]``; an id out of range gives zeros.
    """
    return kv_pages.at[page_ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def scatter_pages(kv_pages: jax.Array, page_ids: jax.Array, pages: jax.Array) -> jax.Array:
    """Writes whole pages into a cache, in place if the caller donates it; the inverse of `gather_pages`.

    Args:
        kv_pages: ``[num_pages, page_size, 2 * heads, head_dim]``.
        page_ids: int32 ``[n]``, all different; an id out of range is skipped, so that a list can be padded.
        pages: ``[n, page_size, 2 * heads, head_dim]``, the cache's dtype.

    Returns:
        The cache with those pages replaced.

    Raises:
        ValueError: if ``pages`` has another shape or dtype than the cache's pages.
    """
    expected = (*page_ids.shape, *kv_pages.shape[1:])
    if pages.shape != expected or pages.dtype != kv_pages.dtype:
        raise ValueError(
            f"pages is {pages.dtype}{list(pages.shape)}: must be {kv_pages.dtype}{list(expected)}"
        )
    return kv_pages.at[page_ids].set(pages, mode="drop", wrap_negative_indices=False)
