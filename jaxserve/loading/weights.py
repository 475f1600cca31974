"""Streams a checkpoint into parameters: read ahead by a few threads, straight to the devices."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.models.params import Params, ParamSpec, param_specs
from jaxserve.models.sharding import ShardingRules, shardings_for
from jaxserve.models.weights import WeightSource, assemble

# Parameters in host memory at a time. Two threads dequantise while a third parameter goes to the device.
_READERS = 2
_AHEAD = 2
_SHOWN_NAMES = 5
# Tensors that some exporters write and no decoder reads: buffers, and the head where it is the embedding.
_DERIVED = ("rotary_emb.inv_freq", "lm_head.weight", "masked_bias", "attention.bias")


def load_params(
    checkpoint: Checkpoint,
    module: nnx.Module,
    sources: Mapping[str, WeightSource],
    mesh: Mesh,
    rules: ShardingRules,
    *,
    progress: bool = True,
) -> Params:
    """A model's parameters by path, on their devices.

    The host holds at most `_READERS` + `_AHEAD` parameters at a time, whatever the model's size.

    Args:
        checkpoint: where the tensors are.
        module: declares the parameters: paths, shapes, dtypes, logical axes.
        sources: the family's weight map.
        mesh: the devices.
        rules: how logical axes are cut over them.
        progress: show a bar in bytes.

    Raises:
        CheckpointError: if tensors are missing, of the wrong shape, or left over; the message names them.
    """
    specs = param_specs(module)
    shardings = shardings_for(specs, mesh, rules)
    check_names(checkpoint, specs, sources)
    if isinstance(checkpoint, OrbaxCheckpoint):
        loaded = checkpoint.restore(specs, shardings)
    else:
        loaded = _stream(checkpoint, specs, sources, shardings)
    params: Params = {}
    total = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=not progress) as bar:
        for path, array in loaded:
            params[path] = array
            bar.update(specs[path].nbytes)
    return params


def check_names(
    checkpoint: Checkpoint, specs: Mapping[str, ParamSpec], sources: Mapping[str, WeightSource]
) -> None:
    """Raises CheckpointError, naming them, if the checkpoint lacks tensors of the model or has others."""
    wanted = {name for path in specs for name in sources[path].names}
    present = set(checkpoint.names())
    for what, names in (
        ("lacks", wanted - present),
        ("has unknown", {name for name in present - wanted if not name.endswith(_DERIVED)}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN_NAMES])
            more = ", ..." if len(names) > _SHOWN_NAMES else ""
            raise CheckpointError(f"the checkpoint {what} {len(names)} tensors: {shown}{more}")


def _stream(
    checkpoint: Checkpoint,
    specs: Mapping[str, ParamSpec],
    sources: Mapping[str, WeightSource],
    shardings: Mapping[str, NamedSharding],
) -> Iterator[tuple[str, jax.Array]]:
    def read(path: str) -> np.ndarray:
        # In the final dtype from the start: a float32 copy beside a bfloat16 one would be twice too much.
        in_dtype = functools.partial(checkpoint.read, dtype=specs[path].dtype)
        return assemble(sources[path], in_dtype, specs[path])

    ahead: collections.deque[tuple[str, Future[np.ndarray]]] = collections.deque()
    todo = iter(specs)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights") as readers:
        try:
            while True:
                while len(ahead) < _READERS + _AHEAD - 1 and (path := next(todo, None)) is not None:
                    ahead.append((path, readers.submit(read, path)))
                if not ahead:
                    return
                path, value = ahead.popleft()
                array = jax.device_put(value.result(), shardings[path])
                # The host's copy is given up only when the device has its own.
                yield path, jax.block_until_ready(array)
        finally:
            for _, future in ahead:
                future.cancel()
