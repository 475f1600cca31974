"""What every kind of checkpoint offers: a Hugging Face config, tensors in Hugging Face's names and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Checkpoint(Protocol):
    """A checkpoint opened for reading; tensors are read one at a time, from any thread."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The model's ``config.json``; for a GGUF file, one made of its metadata."""
        ...

    def names(self) -> Sequence[str]:
        """Names of all tensors, as Hugging Face spells them (``model.layers.0.self_attn.q_proj.weight``)."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if there is none of that name."""
        ...

    def read(self, name: str, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        """A tensor's values; may be a read-only view of the file.

        Args:
            name: one of `names`.
            dtype: of the result, rounded once; by default as stored (float32 for quantised tensors).

        Raises:
            CheckpointError: if there is no such tensor or its bytes cannot be read.
        """
        ...
