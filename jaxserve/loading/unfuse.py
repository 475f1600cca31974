"""The inverse of `jaxserve.models.weights`: from a parameter back to the tensors that it was fused from."""

from __future__ import annotations

import numpy as np

from jaxserve.models.weights import FuseGateUp, FuseHeads, SplitHeads, WeightSource, fuse_whole


def unfuse(source: WeightSource, value: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors by name, such that ``source.fuse`` of them, in order, is ``value``.

    Raises:
        TypeError: for a way of fusing whose inverse is not known.
    """
    match source.fuse:
        case _ if source.fuse is fuse_whole:
            tensors = [value]
        case FuseGateUp():  # [F / block, 2, block, D]
            tensors = [value[:, part].reshape(-1, *value.shape[3:]) for part in (0, 1)]
        case SplitHeads():  # [D, Hkv, g, hd]
            tensors = [value.reshape(value.shape[0], -1)]
        case FuseHeads():  # [Hkv, g + 2, hd, ...]
            rest = value.shape[3:]
            tensors = [part.reshape(-1, *rest) for part in (value[:, :-2], value[:, -2], value[:, -1])]
        case other:
            raise TypeError(f"no inverse of {other!r} is known")
    return dict(zip(source.names, tensors, strict=True))
