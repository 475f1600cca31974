"""The GGUF container: values of every storage type, and files that lie about themselves."""

import struct
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_file import GGUFFile
from tests.support.gguf_files import write_gguf

# Largest error of a block of 32 (16 for Q6_K) as a share of its range: half a step of the grid.
STEP = {Kind.Q4_0: 1 / 15, Kind.Q4_1: 1 / 28, Kind.Q5_0: 1 / 31, Kind.Q5_1: 1 / 60, Kind.Q8_0: 1 / 250}


def matrix(rows: int = 6, columns: int = 96) -> np.ndarray:
    values = np.random.default_rng(7).standard_normal((rows, columns)).astype(np.float32)
    values[1, :32] = 0.0  # a block without a scale
    values[2] *= 1000.0
    return values


@pytest.mark.parametrize("kind", STEP, ids=lambda kind: kind.name)
def test_block_quants_come_back_within_half_a_step(tmp_path, kind):
    values = matrix()
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", {}, {"w": values}, kind))
    read = file.dequantize("w")
    assert read.dtype == np.float32
    blocks, got = values.reshape(-1, 32), read.reshape(-1, 32)
    spread = np.maximum(np.ptp(blocks, axis=1), 2 * np.abs(blocks).max(axis=1))
    assert (np.abs(got - blocks).max(axis=1) <= STEP[kind] * spread + 1e-6).all()
    assert (got[3] == 0).all()  # row 1, first block


@pytest.mark.parametrize(("kind", "bits"), [(Kind.F32, 24), (Kind.F16, 11), (Kind.BF16, 8)])
def test_floats_come_back_rounded_once(tmp_path, kind, bits):
    values = matrix()
    read = GGUFFile(write_gguf(tmp_path / "m.gguf", {}, {"w": values}, kind)).dequantize("w")
    assert read.dtype.itemsize == {24: 4, 11: 2, 8: 2}[bits]
    np.testing.assert_allclose(read.astype(np.float32), values, rtol=2.0**-bits, atol=1e-7)


def unpack_4bit(packed: np.ndarray) -> list[int]:
    """Q4_K's order: 32 low nibbles, then the 32 high ones, per 32 bytes."""
    out: list[int] = []
    for start in range(0, 128, 32):
        part = packed[start : start + 32]
        out += [int(b) & 15 for b in part] + [int(b) >> 4 for b in part]
    return out


def scales_and_minima(packed: np.ndarray) -> tuple[list[int], list[int]]:
    """Q4_K's and Q5_K's twelve bytes: eight 6-bit scales and eight 6-bit minima (get_scale_min_k4)."""
    q = [int(byte) for byte in packed]
    scales = [q[j] & 63 for j in range(4)] + [(q[j + 4] & 15) | ((q[j - 4] >> 6) << 4) for j in range(4, 8)]
    minima = [q[j + 4] & 63 for j in range(4)] + [(q[j + 4] >> 4) | ((q[j] >> 6) << 4) for j in range(4, 8)]
    return scales, minima


def decode_k(kind: Kind, block: np.ndarray) -> list[float]:
    """One block of 256 values, written from the struct definitions of ggml-common.h, value by value."""
    if kind is Kind.Q6_K:
        low, high, scale = block[:128], block[128:192], block[192:208].view(np.int8)
        d = float(block[208:210].view(np.float16)[0])
        out = [0.0] * 256
        for half in (0, 1):
            for i in range(32):
                a, b, h = int(low[64 * half + i]), int(low[64 * half + 32 + i]), int(high[32 * half + i])
                for k, q in enumerate((a & 15, b & 15, a >> 4, b >> 4)):
                    value = (q | ((h >> 2 * k & 3) << 4)) - 32
                    out[128 * half + 32 * k + i] = d * float(scale[8 * half + 2 * k + i // 16]) * value
        return out
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    scales, minima = scales_and_minima(block[4:16])
    nibbles = unpack_4bit(block[16:] if kind is Kind.Q4_K else block[48:])
    if kind is Kind.Q5_K:
        nibbles = [q | ((int(block[16 + i % 32]) >> (i // 32) & 1) << 4) for i, q in enumerate(nibbles)]
    return [d * scales[i // 32] * q - dmin * minima[i // 32] for i, q in enumerate(nibbles)]


@pytest.mark.parametrize(("kind", "size"), [(Kind.Q4_K, 144), (Kind.Q5_K, 176), (Kind.Q6_K, 210)])
def test_k_quants_against_a_decoder_written_here(tmp_path, kind, size):
    random = np.random.default_rng(size)
    raw = random.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    for block in raw.reshape(-1, size):
        where = 208 if kind is Kind.Q6_K else 0
        count = 1 if kind is Kind.Q6_K else 2
        block[where : where + 2 * count] = random.uniform(0.01, 2, count).astype(np.float16).view(np.uint8)
    path = raw_file(tmp_path, raw.tobytes(), dims=(512, 3), kind=kind.value)
    expected = [decode_k(kind, block) for block in raw.reshape(-1, size)]
    np.testing.assert_allclose(
        GGUFFile(path).dequantize("w").reshape(-1, 256), expected, rtol=1e-5, atol=1e-4
    )


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def raw_file(
    folder,
    data=b"\0" * 64,
    *,
    dims=(16,),
    kind=0,
    offset=0,
    head=None,
    entries=b"",
    num_entries=0,
    num_tensors=1,
):
    """A file written byte by byte, so that any part of it can be wrong."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_entries) if head is None else head
    tensor = string("w") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    header = head + entries + tensor * num_tensors
    header += b"\0" * (-len(header) % 32)
    path = folder / "raw.gguf"
    path.write_bytes(header + data)
    return path


HUGE = 2**62
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no magic": ({"head": struct.pack("<4sIQQ", b"GGML", 3, 1, 0)}, "not a GGUF"),
    "version": ({"head": struct.pack("<4sIQQ", b"GGUF", 77, 1, 0)}, "version 77"),
    "too many tensors": ({"head": struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0)}, "tensors cannot fit"),
    "too many entries": ({"head": struct.pack("<4sIQQ", b"GGUF", 3, 1, HUGE)}, "entries cannot fit"),
    "key too long": ({"entries": struct.pack("<Q", HUGE) + b"\0" * 40, "num_entries": 1}, "metadata key of"),
    "unknown value type": (
        {"entries": string("k") + struct.pack("<I", 99) + b"\0" * 8, "num_entries": 1},
        "unknown type 99",
    ),
    "array too long": (
        {"entries": string("k") + struct.pack("<IIQ", 9, 4, HUGE), "num_entries": 1},
        "cannot fit",
    ),
    "array of arrays": (
        {"entries": string("k") + struct.pack("<IIQ", 9, 9, 1), "num_entries": 1},
        "array of the unknown type 9",
    ),
    "string too long": (
        {"entries": string("k") + struct.pack("<IQ", 8, HUGE) + b"\0" * 8, "num_entries": 1},
        "truncated",
    ),
    "not UTF-8": (
        {"entries": string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", "num_entries": 1},
        "not UTF-8",
    ),
    "key twice": (
        {"entries": (string("k") + struct.pack("<IB", 0, 1)) * 2, "num_entries": 2},
        "occurs twice",
    ),
    "no dimensions": ({"dims": ()}, "0 dimensions"),
    "nine dimensions": ({"dims": (1,) * 9}, "9 dimensions"),
    "zero rows": ({"dims": (16, 0)}, "cannot be stored"),
    "overflowing size": ({"dims": (2**40, 2**40)}, "larger than the file"),
    "row not of blocks": ({"dims": (33, 2), "kind": 2}, "cannot be stored as Q4_0"),
    "unknown storage": ({"kind": 999}, "stored as 999; read are"),
    "unsupported storage": ({"kind": 10}, "stored as Q2_K; read are"),
    "offset past the end": ({"offset": 64}, "truncated"),
    "offset not aligned": ({"offset": 3}, "not aligned"),
    "tensor twice": ({"num_tensors": 2}, "'w' occurs twice"),
    "alignment": (
        {"entries": string("general.alignment") + struct.pack("<II", 4, 33), "num_entries": 1},
        "general.alignment=33",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_the_reason(tmp_path, case):
    options, reason = BROKEN[case]
    with pytest.raises(CheckpointError, match=reason):
        GGUFFile(raw_file(tmp_path, **options))


def test_every_truncation_is_refused(tmp_path):
    whole = write_gguf(
        tmp_path / "m.gguf", {"a.b": [1, 2], "c": "text"}, {"w": matrix()}, Kind.Q4_1
    ).read_bytes()
    GGUFFile(tmp_path / "m.gguf")
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 300, 7), len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(cut)


def test_overlapping_tensors_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, {"a": matrix(), "b": matrix()})
    data = path.read_bytes()
    offset = struct.pack("<Q", matrix().nbytes)
    at = data.index(offset, data.index(b"b" + struct.pack("<I", 2)))
    path.write_bytes(data[:at] + struct.pack("<Q", 32) + data[at + 8 :])
    with pytest.raises(CheckpointError, match="overlap"):
        GGUFFile(path)


def test_metadata_of_every_kind(tmp_path):
    metadata = {"s": "é", "i": 7, "f": 0.5, "b": True, "words": ["a", "", "日"], "numbers": [1.5, -2.5]}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", metadata, {"w": matrix()}))
    read = {key: file.metadata[key] for key in metadata}
    assert read.pop("numbers").tolist() == [1.5, -2.5]
    assert read == {key: value for key, value in metadata.items() if key != "numbers"}


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="'nope' is missing"):
        GGUFFile(write_gguf(tmp_path / "m.gguf", {}, {"w": matrix()})).dequantize("nope")
