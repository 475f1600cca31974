"""Drawing tokens on a GPU: the sampler as XLA compiles it against the kernel, and whether they draw the same.

    python bench/drawing.py --output bench/results/drawing.jsonl

Logits of a vocabulary of 128,256, normal with deviation 3; temperature 0.8, top-p 0.95. ``us`` is wall time a
call of fifty that are dispatched one after the other; ``same`` the share of rows with the same token.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.results import Results, add_output_flag, jax_device
from jaxserve.runner.sampler import SamplingState, draw

_VOCAB = 128_256
_CALLS = 50


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8, 64, 256))
    add_output_flag(parser)
    args = parser.parse_args()
    results = Results("drawing", output=args.output, device=jax_device())
    for rows in args.rows:
        spread = np.random.default_rng(rows).standard_normal((rows, _VOCAB)) * 3.0
        logits, state = jnp.asarray(spread, jnp.float32), _state(rows)
        position = jnp.full(rows, 77, jnp.int32)
        draws = {by: jax.jit(functools.partial(draw, uses_kernel=by == "kernel")) for by in ("xla", "kernel")}
        tokens = {by: np.asarray(fn(logits, state, position).token_ids) for by, fn in draws.items()}
        results.add(f"draw-r{rows}", "same", float(np.mean(tokens["xla"] == tokens["kernel"])), "share")
        for by, fn in draws.items():
            seconds = _time(functools.partial(fn, logits, state, position))
            results.add(f"draw-r{rows}-{by}", "us", seconds * 1e6, "us")


def _state(rows: int) -> SamplingState:
    zeros = {field.name: jnp.zeros(rows, jnp.int32) for field in dataclasses.fields(SamplingState)}
    wanted = {"temperature": jnp.full(rows, 0.8), "top_p": jnp.full(rows, 0.95), "min_p": jnp.zeros(rows)}
    return SamplingState(**zeros | wanted | {"seed": jnp.arange(rows, dtype=jnp.uint32)})


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    results = [call() for _ in range(_CALLS)]
    jax.block_until_ready(results[-1])
    return (time.perf_counter() - start) / _CALLS


if __name__ == "__main__":
    main()
