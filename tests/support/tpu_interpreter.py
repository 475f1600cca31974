"""Runs Pallas TPU kernels on the CPU, with JAX's simulation of DMA, semaphores and memory, and finds races.

The simulator reads and writes buffers through indices only. Here it also learns views: a load or store
through a reference that was reshaped, or whose 16-bit elements are read as 32-bit words, as the compiled
kernel does it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax._src.pallas.mosaic.interpret.shared_memory import Semaphore
from jax._src.pallas.mosaic.interpret.utils import to_range
from jax._src.state import indexing
from jax._src.state.types import BitcastTransform, ReshapeTransform
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def simulated_tpu(*, may_race: bool = False, **options: Any) -> Generator[None]:
    """Pallas TPU kernels that are traced in here run in the simulator; what has begun ends in here too.

    Args:
        may_race: a data race is no error; `races_found` tells.
        options: of `pltpu.InterpretParams`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "get", _with_views_read(simulator.get))
        patch.setattr(simulator, "swap", _with_views_written(simulator.swap, simulator.get))
        patch.setattr(Semaphore, "wait", _without_patience(Semaphore.wait))
        pltpu.reset_tpu_interpret_mode_state()
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **options)):
            yield
        if not may_race:
            assert not races_found(), "the kernel reads or writes memory that a copy may still be using"


def races_found() -> bool:
    """Whether the last simulated kernel had a data race."""
    return simulator.races is not None and simulator.races.races_found


def _without_patience(wait: Any) -> Any:
    """On one core nothing can arrive any more when no copy is left to run: hardware would hang."""

    def wait_or_fail(semaphore, *args, **kwargs):
        def hang(timeout):
            raise RuntimeError("the kernel waits for a copy that it has not started")

        semaphore.cv.wait = hang
        return wait(semaphore, *args, **kwargs)

    return wait_or_fail


def _with_views_read(get: Any) -> Any:
    @functools.wraps(get)
    def read(token, device, core, space, buffer, transforms, *args, **kwargs):
        indices, views = _split(transforms)
        token, value = get(token, device, core, space, buffer, indices, *args, **kwargs)
        for view in views:
            value = _apply(value, view)
        return token, np.asarray(value, order="C")

    read.__wrapped__ = get.__wrapped__  # the simulator's own copies call that: they know no views
    return read


def _with_views_written(swap: Any, get: Any) -> Any:
    def write(token, device, core, space, buffer, transforms, value, mask, *args, **kwargs):
        indices, views = _split(transforms)
        if not views:
            return swap(token, device, core, space, buffer, transforms, value, mask, *args, **kwargs)
        views = [view for view in views if not isinstance(view, indexing.NDIndexer)]
        shapes = [get(token, device, core, space, buffer, indices)[1]]
        for view in views:
            shapes.append(_apply(shapes[-1], view))
        old, value = shapes[-1], np.asarray(value)
        assert value.shape == old.shape, "only a whole view can be stored to: a part could not be undone"
        for whole, view in zip(shapes[-2::-1], views[::-1], strict=True):
            value = _undo(value, view, whole)
        token, _ = swap(token, device, core, space, buffer, indices, value, mask, *args, **kwargs)
        return token, old

    return write


def _split(transforms: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Indices of the buffer, and the views (with indices of those) behind them."""
    for count, transform in enumerate(transforms):
        if isinstance(transform, BitcastTransform | ReshapeTransform):
            return tuple(transforms[:count]), tuple(transforms[count:])
    return tuple(transforms), ()


def _apply(value: np.ndarray, view: Any) -> np.ndarray:
    if isinstance(view, ReshapeTransform):
        return value.reshape(view.shape)
    if isinstance(view, BitcastTransform):
        return _words(value, np.dtype(view.dtype))
    assert isinstance(view, indexing.NDIndexer), view
    return value[to_range((jax.tree.map(int, view),))]


def _undo(value: np.ndarray, view: Any, whole: np.ndarray) -> np.ndarray:
    if isinstance(view, ReshapeTransform):
        return value.reshape(whole.shape)
    halves = value.view(whole.dtype).reshape(*value.shape, 2)
    return np.swapaxes(halves, -1, -2).reshape(whole.shape)


def _words(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Two 16-bit rows, or four of 8 bits, as one of 32 bits, the lowest first: how a TPU packs rows."""
    assert dtype.itemsize == 4
    count = 4 // value.dtype.itemsize
    *lead, rows, lanes = value.shape
    parts = np.moveaxis(value.reshape(*lead, rows // count, count, lanes), -2, -1)
    return np.ascontiguousarray(parts).view(dtype)[..., 0]
