"""Where a layer's KV cache lives on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxserve.models.sharding import KV_DATA_AXES, KV_SCALES_AXES, Placement
from jaxserve.pallas_kernels.layout import KVLayout, KVPages


def cache_specs(cache: KVPages, placement: Placement) -> KVPages:
    """A cache's `PartitionSpec` in place of each array: heads are cut over devices."""
    data: Any = placement.spec(KV_DATA_AXES)
    scales: Any = placement.spec(KV_SCALES_AXES)
    return dataclasses.replace(cache, data=data, scales=None if cache.scales is None else scales)


def cache_shapes(layout: KVLayout, num_pages: int, placement: Placement) -> KVPages:
    """One layer's cache as `jax.ShapeDtypeStruct` with shardings."""

    def place(array: jax.Array, spec: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(placement.mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    shapes = layout.shapes(num_pages)
    return jax.tree.map(place, shapes, cache_specs(shapes, placement))
