"""JSON objects in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError

_MAX_BYTES = 64 * 2**20  # an index of a model with 100,000 tensors has 10 MB


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: the file.
        missing: what to return if there is no such file; None makes that an error.

    Raises:
        CheckpointError: if the file is missing, too large, or does not hold a JSON object.
    """
    if not path.is_file():
        if missing is None:
            raise CheckpointError(f"{path}: there is no such file")
        return missing
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_BYTES} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value
