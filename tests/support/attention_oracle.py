"""Ragged paged attention in numpy float64.

Layout, masks and softmax are spelled out per query and head, so that nothing here can share a mistake with
the vectorised code under test.
"""

from __future__ import annotations

import dataclasses

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
    kv_pages: Array  # [num_pages, page_size, 2 * kv_heads, head_dim]
    page_table: Ints
    kv_lens: Ints
    cu_q_lens: Ints


def written_pages(step: Step) -> Array:
    """The cache after the step's keys and values were written."""
    pages = step.kv_pages.copy()
    page_size = pages.shape[1]
    for row, kv_len in enumerate(step.kv_lens):
        first, last = step.cu_q_lens[row], step.cu_q_lens[row + 1]
        for token in range(first, last):
            position = kv_len - (last - token)
            page = step.page_table[row, position // page_size]
            for head in range(step.k.shape[1]):
                pages[page, position % page_size, 2 * head] = step.k[token, head]
                pages[page, position % page_size, 2 * head + 1] = step.v[token, head]
    return pages


def attend(
    step: Step,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    causal_shift: int = 0,
    window_shift: int = 0,
) -> Array:
    """The output of every token, zeros for padding; the two shifts are for tests that must fail."""
    pages = written_pages(step)
    page_size = pages.shape[1]
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
