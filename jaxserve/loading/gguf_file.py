"""The container format of GGUF files: header, metadata, tensor directory, checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader wraps every
string in numpy objects (6 s to open a file with 49,152 tokens, 29 s with 262,144) and trusts the counts that
it finds; here they take 0.1 to 0.5 s. Dequantisation is the package's.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxserve.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_CHUNK_VALUES = 2**18
_MAX_NAME_BYTES = 65535
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, int]] = {  # metadata value type -> struct code, bytes
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    7: ("?", 1),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
_SMALLEST_ENTRY = 8 + 4 + 1  # bytes of a metadata entry with an empty key and a one-byte value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
SUPPORTED_TYPES = frozenset(
    getattr(GGMLQuantizationType, name)
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)


@dataclasses.dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor directory.

    Attributes:
        name: as in the file.
        shape: outermost dimension first, as numpy has it (the file stores the reverse).
        type: how the values are stored.
        start, nbytes: where they lie in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int


class GGUFFile:
    """A memory-mapped GGUF file.

    Attributes:
        path: the file.
        metadata: key -> str, int, float, bool or a list of them (numbers as a numpy array).
        tensors: name -> directory entry, in the file's order.

    Raises:
        CheckpointError: if the file is no GGUF, is truncated, or contradicts itself.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(f"{path}: {size} bytes are too few for a GGUF file")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._bytes, path)
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file (no magic number)")
        version = cursor.scalar("I", 4)
        if version not in _VERSIONS:
            raise CheckpointError(f"{path}: GGUF version {version} is not among {_VERSIONS} (or big-endian)")
        num_tensors, num_entries = cursor.scalar("Q", 8), cursor.scalar("Q", 8)
        cursor.check_count(num_tensors, _SMALLEST_TENSOR, "tensors")
        cursor.check_count(num_entries, _SMALLEST_ENTRY, "metadata entries")
        self.metadata = _read_metadata(cursor, num_entries)
        self.tensors = _read_directory(cursor, num_tensors, self.metadata)

    def dequantize(self, name: str, dtype: npt.DTypeLike | None = None) -> np.ndarray:
        """A tensor's values.

        Args:
            name: as in the file.
            dtype: of the result; by default float32, or as stored for F16 and BF16.

        Raises:
            CheckpointError: if there is no such tensor.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        raw = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start)
        if tensor.type == GGMLQuantizationType.BF16:
            import ml_dtypes

            stored = raw.view(ml_dtypes.bfloat16)
        elif tensor.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            stored = raw.view("<f4" if tensor.type == GGMLQuantizationType.F32 else "<f2")
        else:
            return _dequantize(raw, tensor, np.dtype(dtype or np.float32))
        return stored.reshape(tensor.shape).astype(dtype or stored.dtype, copy=False)


def _dequantize(raw: np.ndarray, tensor: GGUFTensor, dtype: np.dtype[Any]) -> np.ndarray:
    """Some rows at a time: the package's temporaries stay in the cache, not in memory beside the result."""
    columns = tensor.shape[-1]
    rows = raw.reshape(-1, raw.size * columns // math.prod(tensor.shape))
    values = np.empty((len(rows), columns), dtype)
    step = max(1, _CHUNK_VALUES // columns)
    for start in range(0, len(rows), step):
        values[start : start + step] = quants.dequantize(rows[start : start + step], tensor.type)
    return values.reshape(tensor.shape)


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset, self.size = data, path, 0, len(data)

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > self.size:
            raise CheckpointError(f"{self.path}: truncated: the header goes past the end of the file")
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def scalar(self, code: str, size: int) -> Any:
        return struct.unpack("<" + code, self.take(size))[0]

    def string(self) -> str:
        length = self.scalar("Q", 8)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a string in the header is not UTF-8: {error}") from None

    def name(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        if not 0 < length <= _MAX_NAME_BYTES:
            raise CheckpointError(
                f"{self.path}: a {what} of {length} bytes; allowed are 1 to {_MAX_NAME_BYTES}"
            )
        self.offset -= 8
        return self.string()

    def check_count(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > self.size - self.offset:
            raise CheckpointError(f"{self.path}: {count} {what} cannot fit in the file: corrupt or truncated")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("metadata key")
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.scalar("I", 4), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string()
    if kind in _SCALARS:
        return cursor.scalar(*_SCALARS[kind])
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.path}: metadata {key!r} has the unknown type {kind}")
    inner, count = cursor.scalar("I", 4), cursor.scalar("Q", 8)
    if inner == _STRING:
        cursor.check_count(count, 8, f"strings of {key!r}")
        return [cursor.string() for _ in range(count)]
    if inner not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: metadata {key!r} is an array of the unknown type {inner}")
    code, size = _SCALARS[inner]
    cursor.check_count(count, size, f"values of {key!r}")
    values = np.frombuffer(cursor.take(count * size), "<" + code if inner != _BOOL else np.uint8)
    return values.astype(bool) if inner == _BOOL else values


def _read_directory(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.path}: general.alignment={alignment!r}: must be a power of two")
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(count):
        name = cursor.name("tensor name")
        num_dims = cursor.scalar("I", 4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} has {num_dims} dimensions, not 1 to {_MAX_DIMS}"
            )
        dims = tuple(cursor.scalar("Q", 8) for _ in range(num_dims))
        entries.append((name, dims[::-1], cursor.scalar("I", 4), cursor.scalar("Q", 8)))
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise CheckpointError(f"{cursor.path}: tensor {name!r} occurs twice")
        if offset % alignment:
            raise CheckpointError(f"{cursor.path}: tensor {name!r} is not aligned to {alignment} bytes")
        kind, nbytes = _storage(cursor.path, name, shape, type_id, cursor.size)
        tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, nbytes)
    _check_extents(cursor, tensors)
    return tensors


def _storage(
    path: Path, name: str, shape: tuple[int, ...], type_id: int, limit: int
) -> tuple[GGMLQuantizationType, int]:
    """The storage type of a tensor and its size in bytes."""
    kind = next((kind for kind in SUPPORTED_TYPES if kind.value == type_id), None)
    if kind is None:
        known = {kind.value: kind.name for kind in GGMLQuantizationType}
        allowed = ", ".join(sorted(kind.name for kind in SUPPORTED_TYPES))
        raise CheckpointError(
            f"{path}: tensor {name!r} is stored as {known.get(type_id, type_id)}; read are {allowed}"
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} cannot be stored as {kind.name}"
        )
    nbytes = block_bytes
    for n in (*shape[:-1], shape[-1] // block):
        nbytes *= n
        if nbytes > limit:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} is larger than the file: truncated?"
            )
    return kind, nbytes


def _check_extents(cursor: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    previous: GGUFTensor | None = None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start + tensor.nbytes > cursor.size:
            raise CheckpointError(
                f"{cursor.path}: truncated: tensor {tensor.name!r} ends at byte "
                f"{tensor.start + tensor.nbytes} of {cursor.size}"
            )
        if previous is not None and previous.start + previous.nbytes > tensor.start:
            raise CheckpointError(f"{cursor.path}: tensors {previous.name!r} and {tensor.name!r} overlap")
        previous = tensor
