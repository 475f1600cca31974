"""A process that loads checkpoints when it is told to, so that its parent can watch its memory.

Reads lines ``FOLDER DTYPE``; answers each with the bytes of the parameters when they are on the device, and
with another line when they are gone again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp

from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint
from tests.support.load_checkpoint import load


def main() -> None:
    """Answers until the input ends."""
    for line in sys.stdin:
        folder, dtype = line.split()
        params = load(SafetensorsCheckpoint(Path(folder)), jnp.dtype(dtype))
        print(sum(array.nbytes for array in params.values()), flush=True)
        del params
        print("gone", flush=True)


if __name__ == "__main__":
    main()
