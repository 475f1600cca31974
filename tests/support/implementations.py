"""How the shared suite runs each implementation of ragged paged attention on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import jax
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu
from jaxserve.pallas_kernels.ragged_paged_attention.api import RAGGED_PAGED_ATTENTION
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import Blocks
from tests.support.tpu_interpreter import simulated_tpu

IMPLEMENTATIONS = tuple(RAGGED_PAGED_ATTENTION.implementations)

# Kernels for another machine than this one are simulated; the simulator copies its arguments.
SIMULATED = () if jax.default_backend() == "tpu" else ("mosaic_tpu",)

# Dtypes that an implementation refuses.
REFUSED_DTYPES = {"mosaic_tpu": ("float16",)}


def takes(implementation: str, dtype: str) -> bool:
    """Whether an implementation takes arrays of a dtype."""
    return dtype not in REFUSED_DTYPES.get(implementation, ())


@contextlib.contextmanager
def able_to_run(implementation: str) -> Generator[None]:
    """Inside, the implementation can be traced and run; its results must be read inside too."""
    if implementation != "mosaic_tpu":
        yield
        return
    simulated = simulated_tpu() if implementation in SIMULATED else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, simulated:
        patch.setattr(mosaic_tpu, "choose_blocks", small_blocks)
        yield


def small_blocks(layout, group, metadata) -> Blocks:
    """So small that every spec has many blocks, of keys and of queries, and the ring goes round."""
    return Blocks(kv_pages=2, q_tokens=min(8, metadata.max_q_len), depth=3)
