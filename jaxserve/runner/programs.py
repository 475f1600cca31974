"""Compiles every program of the ladder before the first request; afterwards nothing can compile.

Programs are compiled ahead of time and called as executables: an input of another shape is an error, never a
silent compilation.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.core.batch import NUM_FIELDS
from jaxserve.core.plan import Bucket
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import Params
from jaxserve.models.sharding import Placement
from jaxserve.pallas_kernels.ragged_paged_attention.api import Implementation
from jaxserve.runner.compile_counter import compile_counter
from jaxserve.runner.sampler import SamplingKind
from jaxserve.runner.slots import AdmissionShape, SlotState, packed_shape, write_admissions
from jaxserve.runner.step import Caches, make_step

Compiled = Callable[..., Any]
# Called for each program: its name, and whether it was in the compile cache.
OnCompiled = Callable[[str, bool], object]
type _Key = tuple[Bucket, SamplingKind] | AdmissionShape


class Programs:
    """The compiled steps of each bucket, and the compiled admissions, one a shape.

    Attributes:
        kinds: which programs a bucket has.
    """

    def __init__(
        self,
        module: Decoder,
        placement: Placement,
        implementation: Implementation,
        *,
        buckets: Iterable[Bucket],
        admission_shapes: Iterable[AdmissionShape],
        params_of: Callable[[Bucket], Params],
        caches: Caches,
        slots: SlotState,
        branches_on_host: bool,
        on_compiled: OnCompiled,
        hidden_layers: tuple[int, ...] = (),
    ) -> None:
        replicated = placement.sharding()
        jobs: dict[_Key, Callable[[], jax.stages.Lowered]] = {}
        # Where a branch makes the host wait for the device, steps that need none get programs without any.
        self.kinds = _kinds(branches_on_host)
        for bucket, kind in itertools.product(buckets, self.kinds):
            step = jax.jit(
                make_step(
                    module,
                    bucket,
                    placement,
                    implementation,
                    kind=kind,
                    exits_early=not branches_on_host,
                    hidden_layers=hidden_layers,
                ),
                donate_argnums=(1, 2),
                out_shardings=(jax.tree.map(lambda array: array.sharding, caches), replicated, replicated),
            )
            inputs = jax.ShapeDtypeStruct((NUM_FIELDS, bucket.rows), jnp.int32, sharding=replicated)
            jobs[bucket, kind] = _job(step, params_of(bucket), caches, slots, inputs)
        write = jax.jit(write_admissions, donate_argnums=0, out_shardings=replicated)
        for shape in admission_shapes:
            packed = jax.ShapeDtypeStruct(packed_shape(slots, shape), jnp.int32, sharding=replicated)
            jobs[shape] = _job(write, slots, packed)
        self._compiled = _compile_all(jobs, on_compiled)

    def step(self, bucket: Bucket, kind: SamplingKind = SamplingKind.ANY) -> Compiled:
        """The program of a bucket, for steps whose rows ask for no more than ``kind``."""
        return self._compiled[bucket, kind if kind in self.kinds else SamplingKind.ANY]

    def admit(self, shape: AdmissionShape) -> Compiled:
        """The program that writes rows of requests into the slots."""
        return self._compiled[shape]


def _kinds(branches_on_host: bool) -> tuple[SamplingKind, ...]:
    return tuple(SamplingKind) if branches_on_host else (SamplingKind.ANY,)


def count_programs(
    buckets: Iterable[Bucket], admission_shapes: Iterable[AdmissionShape], *, branches_on_host: bool
) -> int:
    """How many programs `Programs` compiles, for a progress bar."""
    return len(set(buckets)) * len(_kinds(branches_on_host)) + len(set(admission_shapes))


def _job(function: Any, *args: Any) -> Callable[[], jax.stages.Lowered]:
    return lambda: function.lower(*args)


def _name(key: _Key) -> str:
    if isinstance(key, AdmissionShape):
        return f"program for {key.requests} admissions of {key.tokens} tokens"
    bucket, kind = key
    steps = f" x {bucket.decode_steps}" if bucket.decode_steps > 1 else ""
    what = "decode" if bucket.is_decode else "mixed"
    return (
        f"{what} step of {bucket.tokens} tokens in {bucket.rows} rows{steps} ({kind.name.lower()} sampling)"
    )


def _compile_all(
    jobs: dict[_Key, Callable[[], jax.stages.Lowered]], on_compiled: OnCompiled
) -> dict[_Key, Compiled]:
    """Traces one after the other (Python), compiles side by side (XLA releases the interpreter)."""

    counter = compile_counter()

    def compile_one(key: _Key, lowered: jax.stages.Lowered) -> Compiled:
        before = counter.misses_here
        compiled = lowered.compile()
        on_compiled(_name(key), counter.misses_here == before)
        return compiled

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            futures = {key: pool.submit(compile_one, key, lower()) for key, lower in jobs.items()}
            return {key: future.result() for key, future in futures.items()}
        except BaseException:  # Ctrl-C must not wait for what has not begun
            pool.shutdown(cancel_futures=True)
            raise
