"""Programs that read the hidden states of running requests (`jaxserve.core.probing`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.probing import Probe, ProbeResult
from jaxserve.models.sharding import Placement
from jaxserve.runner.length_head import NUM_COUNTS, LengthHead, counts, log_remaining, normed
from jaxserve.runner.slots import take

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What an engine's probes read.

    Attributes:
        layers: whose states steps keep, counted from 1, increasing.
        head: predicts from those of its own layers, if given.
        records: whether probes return the states.
    """

    layers: tuple[int, ...]
    head: LengthHead | None
    records: bool


class ProbeHandle(NamedTuple):
    """A probe on its way: device arrays, padded."""

    num_probes: int
    states: jax.Array | None
    log_remaining: jax.Array | None


class ProbePrograms:
    """Compiled for a handful of rows and for all slots, before the first request.

    Args:
        options: what to read.
        hidden: the slots' states [slots, layers, D]; shape, dtype and sharding count.
        placement: of the engine's arrays; these are on every device alike.
    """

    def __init__(self, options: ProbeOptions, hidden: jax.Array, placement: Placement) -> None:
        replicated = placement.sharding()
        num_slots = hidden.shape[0]
        self._num_slots = num_slots
        params = {} if options.head is None else dict(options.head.params)
        self._params: Mapping[str, jax.Array] = jax.device_put(params, replicated)
        function = jax.jit(make_probe(options), out_shardings=replicated)
        self._sizes = tuple(sorted({min(8, num_slots), num_slots}))
        self._compiled: dict[int, Compiled] = {}
        for size in self._sizes:
            slots = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=replicated)
            token_counts = jax.ShapeDtypeStruct((size, NUM_COUNTS), jnp.float32, sharding=replicated)
            self._compiled[size] = function.lower(self._params, hidden, slots, token_counts).compile()

    def launch(self, hidden: jax.Array, probes: Sequence[Probe]) -> ProbeHandle:
        """Reads states behind the step that writes them; at most one probe a slot."""
        size = next(size for size in self._sizes if size >= len(probes))
        slots = np.full(size, self._num_slots, np.int32)  # padding reads zeros
        generated, prompt_tokens = np.zeros(size), np.zeros(size)
        for row, probe in enumerate(probes):
            slots[row], generated[row], prompt_tokens[row] = probe
        states, quantiles = self._compiled[size](
            self._params, hidden, slots, counts(generated, prompt_tokens)
        )
        for array in (states, quantiles):
            if array is not None:
                array.copy_to_host_async()
        return ProbeHandle(len(probes), states, quantiles)

    def read(self, handle: ProbeHandle) -> ProbeResult:
        """What a probe found."""
        return ProbeResult(*(
            None if array is None else np.asarray(array)[: handle.num_probes]
            for array in (handle.states, handle.log_remaining)
        ))  # fmt: skip


def make_probe(
    options: ProbeOptions,
) -> Callable[
    [Mapping[str, jax.Array], jax.Array, jax.Array, jax.Array], tuple[jax.Array | None, jax.Array | None]
]:
    """The function that `ProbePrograms` compiles.

    Its arguments: the head's parameters, hidden states [slots, layers, D], slots int32 [n], counts float32
    [n, NUM_COUNTS]. It returns states float16 [n, layers, D] and quantiles float32 [n, 3], or None for
    either.
    """
    columns = [] if options.head is None else [options.layers.index(layer) for layer in options.head.layers]

    def probe(
        params: Mapping[str, jax.Array], hidden: jax.Array, slots: jax.Array, token_counts: jax.Array
    ) -> tuple[jax.Array | None, jax.Array | None]:
        # In float16, as they are recorded: the head sees in service what it saw in training.
        states = normed(take(hidden, slots)).astype(jnp.float16)
        quantiles = log_remaining(params, states[:, jnp.array(columns)], token_counts) if columns else None
        return states if options.records else None, quantiles

    return probe
