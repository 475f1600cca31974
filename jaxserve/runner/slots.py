"""Slot arrays: what the device remembers of every running request between steps.

The host sends a whole row once, when a request takes a slot, and from then on only new pages. A sampled
token is written where the next step reads its input, so it feeds that step without visiting the host.

    slot s    tokens[s]      | prompt .......... | generated ... | next | unused ......|
                             0            prompt_len          start + n
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.plan import Admission
from jaxserve.runner.sampler import SamplingState, sampling_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SlotState:
    """Donated to, and returned by, every program.

    Attributes:
        tokens: int32 [slots, max_model_len + 1].
        page_table: int32 [slots, max pages of a request].
        sampling: arrays [slots, ...].
        hidden: [slots, layers, D] in the model's dtype, each slot's residual stream where it sampled last;
            None unless somebody asks for it.
    """

    tokens: jax.Array
    page_table: jax.Array
    sampling: SamplingState
    hidden: jax.Array | None = None


def empty_slots(num_slots: int, max_model_len: int, page_size: int) -> SlotState:
    """Host arrays of slots that nobody holds; `jax.device_put` them."""
    shape = AdmissionShape(num_slots, max_model_len + 1)
    return jax.tree.map(np.asarray, _rows([], shape, -(-max_model_len // page_size))[1])


def slot_bytes(max_model_len: int, page_size: int) -> int:
    """Of one slot, on each device; without hidden states."""
    return sum(array.nbytes for array in jax.tree.leaves(empty_slots(1, max_model_len, page_size)))


class AdmissionShape(NamedTuple):
    """How many requests a program admits at once, and how many tokens each may have by then."""

    requests: int
    tokens: int


_SHORT = 8192  # most prompts are no longer; rows of a model with a long context are half a megabyte


def admission_shapes(num_slots: int, max_model_len: int) -> tuple[AdmissionShape, ...]:
    """Requests are admitted one at a time or a handful, and most of them send the device short rows."""
    requests = (1, 8) if num_slots >= 8 else (1,)
    whole = max_model_len + 1
    tokens = (_SHORT, whole) if whole > _SHORT else (whole,)
    return tuple(AdmissionShape(r, t) for t in tokens for r in requests)


def choose_admission(shapes: Sequence[AdmissionShape], admissions: Sequence[Admission]) -> AdmissionShape:
    """The smallest shape for the first of these requests, as many as a shape can take."""
    requests = min(len(admissions), max(shape.requests for shape in shapes))
    tokens = max(len(admission.token_ids) for admission in admissions[:requests])
    return min(shape for shape in shapes if shape.requests >= requests and shape.tokens >= tokens)


def pack_admissions(
    admissions: list[Admission], shape: AdmissionShape, *, num_slots: int, num_pages: int
) -> np.ndarray:
    """What requests that take slots put there, int32 [requests, words]: one copy to the device, not 16.

    A row is the slot's index and then the bits of every array's row, in the order of `SlotState`'s leaves.
    Padding has index ``num_slots``, which is out of range, so that writing it does nothing. ``num_pages`` is
    a request's.
    """
    slots, rows = _rows(admissions, shape, num_pages)
    index = np.full((shape.requests, 1), num_slots, np.int32)
    index[: len(slots), 0] = slots
    leaves = [np.asarray(leaf).view(np.int32).reshape(shape.requests, -1) for leaf in jax.tree.leaves(rows)]
    return np.concatenate([index, *leaves], axis=1)


def packed_shape(state: SlotState, shape: AdmissionShape) -> tuple[int, int]:
    """Of what `pack_admissions` returns."""
    return shape.requests, 1 + shape.tokens + sum(_widths(state)[1:])


def _widths(state: SlotState) -> list[int]:
    """Words that each array of a slot takes, tokens first."""
    return [math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(_admitted(state))]


def write_admissions(state: SlotState, packed: jax.Array) -> SlotState:
    """Puts what `pack_admissions` made into slots; jitted with ``state`` donated.

    Hidden states stay, and tokens behind those of the request: a step writes either before anybody reads it.
    """
    (tokens, *leaves), structure = jax.tree.flatten(_admitted(state))
    widths = _widths(state)[1:]
    index, new_tokens, *parts = jnp.split(
        packed, np.cumsum([1, packed.shape[1] - 1 - sum(widths), *widths[:-1]]).tolist(), axis=1
    )
    slot = index[:, 0]
    written = [
        old.at[slot].set(
            jax.lax.bitcast_convert_type(part, old.dtype).reshape(-1, *old.shape[1:]), mode="drop"
        )
        for old, part in zip(leaves, parts, strict=True)
    ]
    tokens = tokens.at[slot, : new_tokens.shape[1]].set(new_tokens, mode="drop")
    return dataclasses.replace(jax.tree.unflatten(structure, [tokens, *written]), hidden=state.hidden)


def _admitted(state: SlotState) -> SlotState:
    """What of a slot an admission writes."""
    return dataclasses.replace(state, hidden=None)


def _rows(admissions: list[Admission], shape: AdmissionShape, num_pages: int) -> tuple[list[int], SlotState]:
    tokens = np.zeros(shape, np.int32)
    page_table = np.zeros((shape.requests, num_pages), np.int32)
    for row, admission in enumerate(admissions):
        tokens[row, : len(admission.token_ids)] = admission.token_ids
        page_table[row, : len(admission.page_ids)] = admission.page_ids
    sampling = sampling_rows(admissions, shape.requests)
    return [admission.slot for admission in admissions], SlotState(tokens, page_table, sampling)  # type: ignore[arg-type]


def take(state: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a slot array; an index out of range (padding) reads zeros."""
    return state.at[index].get(mode="fill", fill_value=0)


def take_sampling(state: SamplingState, index: jax.Array) -> SamplingState:
    """The sampling parameters of some slots."""
    return jax.tree.map(lambda array: take(array, index), state)


def update_pages(page_table: jax.Array, updates: jax.Array) -> jax.Array:
    """Writes new pages; ``updates`` is int32 [3, n] of slot, index, page, with padding slots out of range."""
    slot, index, page = updates
    return page_table.at[slot, index].set(page, mode="drop")


def write_sampled(
    tokens: jax.Array, slot: jax.Array, position: jax.Array, ids: jax.Array, samples: jax.Array
) -> jax.Array:
    """Writes each sampled id where its slot's next step reads it; rows that did not sample write nothing."""
    return tokens.at[jnp.where(samples, slot, tokens.shape[0]), position].set(ids, mode="drop")


def write_hidden(
    hidden: jax.Array, slot: jax.Array, states: Sequence[jax.Array], samples: jax.Array
) -> jax.Array:
    """Writes what each layer had at the position that was sampled from, [R, D] a layer."""
    rows = jnp.stack(states, axis=1).astype(hidden.dtype)
    return hidden.at[jnp.where(samples, slot, hidden.shape[0])].set(rows, mode="drop")
