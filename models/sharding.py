"""Where arrays live on a mesh: parameters name logical axes, rules map those to mesh axes.

One device is a mesh of one; nothing else in the code knows how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.params import ParamSpec

TENSOR_AXIS = "tensor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardingRules:
    """Which mesh axis, if any, each logical axis is cut along.

    Attributes:
        kv_heads: groups of attention heads; must divide evenly.
        ffn: columns of the feed-forward layer; must divide evenly.
        vocab: rows of the embedding and the head; kept whole where they do not divide evenly.
    """

    kv_heads: str | None = TENSOR_AXIS
    ffn: str | None = TENSOR_AXIS
    vocab: str | None = TENSOR_AXIS

    def partition_spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The spec of an array with these logical axes; None is never cut."""
        mapping = {"kv_heads": self.kv_heads, "ffn": self.ffn, "vocab": self.vocab, None: None}
        return PartitionSpec(*(mapping[axis] for axis in axes))


# Logical axes of what is not a parameter; an array that names none is whole on every device.
HEADS_AXES = (None, "kv_heads", None)  # queries, keys and values of a step: [tokens, heads, head_dim]
# The arrays of a `jaxserve.pallas_kernels.layout.KVPages`.
KV_DATA_AXES = (None, None, "kv_heads", None)
KV_SCALES_AXES = (None, "kv_heads", None)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """A mesh and the rules by which arrays are cut over it."""

    mesh: Mesh
    rules: ShardingRules = ShardingRules()

    def spec(self, axes: Sequence[str | None] = ()) -> PartitionSpec:
        """The spec of an array with these logical axes; with none, of one that is whole everywhere."""
        return self.rules.partition_spec(axes)

    def sharding(self, axes: Sequence[str | None] = ()) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))


def make_mesh(tensor_parallel_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first ``tensor_parallel_size`` devices along the axis "tensor".

    Raises:
        ConfigError: if there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size}: must be at most {len(devices)}, the devices here"
        )
    return Mesh(np.array(devices[:tensor_parallel_size]), (TENSOR_AXIS,))


def check_divisible(config: DecoderConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises ConfigError if the mesh cannot cut the model evenly, naming the sizes that could."""
    for name, size, axis in (
        ("num_key_value_heads", config.num_kv_heads, rules.kv_heads),
        ("intermediate_size", config.intermediate_size, rules.ffn),
    ):
        parts = _axis_size(mesh, axis)
        if size % parts:
            allowed = [
                n for n in range(1, parts) if config.num_kv_heads % n == config.intermediate_size % n == 0
            ]
            raise ConfigError(
                f"tensor_parallel_size={parts}: must divide {name}={size}; "
                f"this model allows {', '.join(map(str, allowed))}"
            )


def sharding_for(spec: ParamSpec, mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """The sharding of a parameter.

    Raises:
        ConfigError: if an axis other than vocab does not divide evenly, or a rule names no axis of the mesh.
    """
    axes = list(spec.axes)
    for i, (axis, size) in enumerate(zip(spec.axes, spec.shape, strict=True)):
        parts = _axis_size(mesh, rules.partition_spec((axis,))[0])
        if size % parts == 0:
            continue
        if axis != "vocab":
            raise ConfigError(f"{axis}={size}: must be a multiple of {parts}, the devices it is cut over")
        axes[i] = None
    return NamedSharding(mesh, rules.partition_spec(axes))


def shardings_for(
    specs: Mapping[str, ParamSpec], mesh: Mesh, rules: ShardingRules
) -> dict[str, NamedSharding]:
    """`sharding_for` of every parameter, by path."""
    return {path: sharding_for(spec, mesh, rules) for path, spec in specs.items()}


def _axis_size(mesh: Mesh, axis: str | None) -> int:
    if axis is None:
        return 1
    if axis not in mesh.shape:
        raise ConfigError(f"mesh axis {axis!r}: must be one of {', '.join(map(str, mesh.axis_names))}")
    return mesh.shape[axis]
