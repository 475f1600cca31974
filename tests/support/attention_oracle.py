"""Ragged paged attention in numpy float64.

Layout, masks and softmax are spelled out per query and head, so that nothing here can share a mistake with
the vectorised code under test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step's inputs as float64 (already rounded to the dtype under test) and plain integers."""

    q: Array  # [tokens, q_heads, head_dim]
    k: Array  # [tokens, kv_heads, head_dim]
    v: Array
    kv_pages: Array  # [num_pages, page_size, 2 * kv_heads, head_dim]; codes if there are scales
    kv_scales: Array | None  # [num_pages, 2 * kv_heads, page_size]
    kv_dtype: str
    page_table: Ints
    kv_lens: Ints
    cu_q_lens: Ints


def encode(x: Any, kv_dtype: str) -> tuple[Any, float]:
    """A key's or value's codes, and their scale: 1 if that is no code's type."""
    match kv_dtype:
        case "int8":
            scale = np.float32(np.abs(x).max()) * np.float32(1 / 127)
            return np.rint(np.float32(x) * (np.float32(1) / scale)).astype(np.float64), float(scale)
        case "float8_e4m3fn":
            scale = np.float32(np.abs(x).max()) * np.float32(1 / 448)
            codes = np.clip(np.float32(x) * (np.float32(1) / scale), -448, 448)
            return codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), float(scale)
        case _:
            return x, 1.0


def written_cache(step: Step) -> tuple[Array, Array | None]:
    """The cache and its scales after the step's keys and values were written."""
    pages, scales = step.kv_pages.copy(), None if step.kv_scales is None else step.kv_scales.copy()
    page_size = pages.shape[1]
    for row, kv_len in enumerate(step.kv_lens):
        first, last = step.cu_q_lens[row], step.cu_q_lens[row + 1]
        for token in range(first, last):
            position = kv_len - (last - token)
            page = step.page_table[row, position // page_size]
            for head in range(step.k.shape[1]):
                for index, x in ((2 * head, step.k[token, head]), (2 * head + 1, step.v[token, head])):
                    codes, scale = encode(x, step.kv_dtype)
                    pages[page, position % page_size, index] = codes
                    if scales is not None:
                        scales[page, index, position % page_size] = scale
    return pages, scales


def written_pages(step: Step) -> Array:
    """The elements of the cache after the step's keys and values were written."""
    return written_cache(step)[0]


def attend(
    step: Step,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    causal_shift: int = 0,
    window_shift: int = 0,
    wrong_scales: str = "",
) -> Array:
    """The output of every token, zeros for padding; shifts and wrong scales are for tests that must fail."""
    pages, scales = written_cache(step)
    page_size = pages.shape[1]
    if scales is not None:
        pages *= _mistaken(scales, wrong_scales).swapaxes(1, 2)[..., None]
    group = step.q.shape[1] // step.k.shape[1]
    out = np.zeros_like(step.q)
    for row, kv_len in enumerate(step.kv_lens):
        first, last = step.cu_q_lens[row], step.cu_q_lens[row + 1]
        for token in range(first, last):
            position = kv_len - (last - token)
            start = 0 if sliding_window is None else max(0, position - sliding_window + 1 + window_shift)
            last_seen = min(max(position + causal_shift, 0), kv_len - 1)
            seen = range(start, last_seen + 1)
            slots = [(step.page_table[row, p // page_size], p % page_size) for p in seen]
            for head in range(step.q.shape[1]):
                keys = np.array([pages[page, offset, 2 * (head // group)] for page, offset in slots])
                values = np.array([pages[page, offset, 2 * (head // group) + 1] for page, offset in slots])
                scores = keys @ step.q[token, head] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out[token, head] = (weights / weights.sum()) @ values
    return out


def _mistaken(scales: Array, wrong: str) -> Array:
    scales = scales.copy()
    match wrong:
        case "":
            pass
        case "no key scale":  # of a usual size, so that only its differences between tokens are missing
            scales[:, 0::2] = np.nanmean(scales[:, 0::2])
        case "no value scale":
            scales[:, 1::2] = np.nanmean(scales[:, 1::2])
        case "neighbour's":
            moved = np.roll(scales, 1, axis=2)
            scales = np.where(np.isnan(moved), scales, moved)
        case "key's for value":
            scales[:, 1::2] = scales[:, 0::2]
        case _:
            raise ValueError(wrong)
    return scales
