"""The real TPU compiler on a machine without a TPU: libtpu compiles for any topology."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.platforms.tpu import topology_devices

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --group tpu-compile"
)

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")


@functools.cache
def devices(topology: str) -> tuple[Any, ...]:
    """The devices of a topology."""
    return tuple(topology_devices(topology))


def lower_on_one(generation: str, function: Any, *args: Any, donate: int) -> Any:
    """Lowers a function of arrays, or trees of them, for one device."""
    mesh = Mesh(np.array(devices(generation)[:1]), ("x",))
    on_device = NamedSharding(mesh, PartitionSpec())
    here = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_device), args)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate).lower(*here)
