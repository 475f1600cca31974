"""Parameters: declared once with shape, dtype and logical axes; a module holds no memory until bound.

A layer declares each weight by `declare`. Building a `Decoder` therefore costs nothing: its parameters are
shapes. The arrays live in a flat dict {path: array}, which is what checkpoints stream into and what a jitted
step takes as its argument; `bind` makes a module that computes with them, inside or outside of a trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.errors import CheckpointError
from jaxserve.models.pairs import is_paired

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """What a parameter is before it has values.

    Attributes:
        shape: of the whole array, over all devices.
        dtype: of the array, a numpy dtype.
        axes: for each dimension the logical axis that it is, which `jaxserve.models.sharding` may map to a
            mesh axis, or None for one that is never sharded.
        mean, std: of random values for runs without a checkpoint; std 0 makes constants.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    mean: float
    std: float

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


def declare(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    axes: tuple[str | None, ...],
    *,
    mean: float = 0.0,
    std: float = 0.0,
) -> nnx.Param[Any]:
    """Declares a parameter; it holds a shape until `bind` gives it an array."""
    assert len(shape) == len(axes), (shape, axes)
    spec = ParamSpec(shape, jax.numpy.dtype(dtype), axes, mean, std)
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


def param_specs(module: nnx.Module) -> dict[str, ParamSpec]:
    """All parameters of a module by path (``layers.0.attention.qkv``), in an order that never changes."""
    flat = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    return {_path(keys): param.get_metadata()["spec"] for keys, param in flat.items()}


def bind[M: nnx.Module](module: M, params: Mapping[str, jax.Array]) -> M:
    """A module like this one whose parameters are the given arrays (or tracers); the given one is unchanged.

    bfloat16 parameters may come as pairs (`jaxserve.models.pairs`), if the module will see one row.

    Raises:
        CheckpointError: if a parameter is missing, unknown, or has another shape or dtype.
    """
    graph, state = nnx.split(module)
    flat = list(nnx.to_flat_state(state))
    unknown = set(params) - {_path(keys) for keys, _ in flat}
    if unknown:
        raise CheckpointError(f"unknown parameter {min(unknown)!r}")
    bound = [(keys, param.replace(_checked(_path(keys), param, params))) for keys, param in flat]
    return nnx.merge(graph, nnx.from_flat_state(bound))


def _checked(path: str, param: Any, params: Mapping[str, jax.Array]) -> jax.Array:
    spec: ParamSpec = param.get_metadata()["spec"]
    if path not in params:
        raise CheckpointError(f"parameter {path!r} is missing")
    array = params[path]
    if is_paired(array) and spec.dtype == jax.numpy.bfloat16:
        spec = dataclasses.replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] // 2), dtype=array.dtype)
    if array.shape != spec.shape or array.dtype != spec.dtype:
        raise CheckpointError(
            f"parameter {path!r} is {array.dtype}{list(array.shape)}, "
            f"the model needs {spec.dtype}{list(spec.shape)}"
        )
    return array


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in keys)
