"""How the shared suite runs each implementation of ragged paged attention on this machine."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator

import jax
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention import mosaic_tpu, triton
from jaxserve.pallas_kernels.ragged_paged_attention.api import RAGGED_PAGED_ATTENTION
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_gpu import attention as mosaic_gpu
from jaxserve.pallas_kernels.ragged_paged_attention.mosaic_tpu_blocks import Blocks
from tests.support.tpu_interpreter import simulated_tpu

IMPLEMENTATIONS = tuple(RAGGED_PAGED_ATTENTION.implementations)

# Kernels for another machine than this one are simulated; the simulator copies its arguments.
_BACKENDS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu", "triton": "gpu"}
SIMULATED = tuple(name for name, backend in _BACKENDS.items() if jax.default_backend() != backend)

# In one jitted program the GPU simulator's callbacks could wait for threads that wait for them.
EAGER = ("mosaic_gpu",) if "mosaic_gpu" in SIMULATED else ()

# Dtypes that an implementation refuses.
REFUSED_DTYPES = {"mosaic_tpu": ("float16",), "mosaic_gpu": ("float32",)}

# 8-bit caches that an implementation takes.
KV_DTYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("reference", "xla", "mosaic_tpu"), ("int8", "float8_e4m3fn")),
    "mosaic_gpu": ("int8", "float8_e4m3fn") if "mosaic_gpu" in SIMULATED else (),
    "triton": ("int8",),
}
# Those that take them in pages of 32 tokens or more, and heads of 128 elements or fewer.
LARGE_PAGES_ONLY = ("mosaic_gpu",)

# Cuts rows where the load says so: another batch rounds a row differently.
LOAD_DEPENDENT = ("mosaic_gpu",)


def takes(implementation: str, dtype: str) -> bool:
    """Whether an implementation takes arrays of a dtype."""
    return dtype not in REFUSED_DTYPES.get(implementation, ())


def finest_dtype(implementation: str) -> str:
    """The most precise dtype that an implementation takes."""
    return "float32" if takes(implementation, "float32") else "bfloat16"


@contextlib.contextmanager
def able_to_run(implementation: str) -> Generator[None]:
    """Inside, the implementation can be traced and run; its results must be read inside too."""
    gpu_kernels = {"mosaic_gpu": mosaic_gpu, "triton": triton}
    if implementation in SIMULATED and implementation in gpu_kernels:
        with pytest.MonkeyPatch.context() as patch:
            module = gpu_kernels[implementation]
            interpreted = functools.partial(module.ragged_paged_attention, interpret=True)
            patch.setattr(module, "ragged_paged_attention", interpreted)
            yield
        return
    if implementation != "mosaic_tpu":
        yield
        return
    simulated = simulated_tpu() if implementation in SIMULATED else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, simulated:
        patch.setattr(mosaic_tpu, "choose_blocks", small_blocks)
        yield


def small_blocks(layout, group, q_bytes, metadata) -> Blocks:
    """So small that every spec has many blocks, of keys and of queries, and the ring goes round."""
    return Blocks(kv_pages=2, q_tokens=min(8, metadata.max_q_len), depth=3)
