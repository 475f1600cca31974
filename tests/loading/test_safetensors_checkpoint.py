"""Folders in Hugging Face's layout: whole, in shards, and broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import CheckpointError
from jaxserve.loading.safetensors_checkpoint import INDEX_NAME, SafetensorsCheckpoint

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([1.5, -2.0], np.float16),
    "c": np.array([[0.5, 3.0]], ml_dtypes.bfloat16),
}


def whole(folder):
    (folder / "config.json").write_text('{"architectures": ["X"]}')
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def sharded(folder, mapping=None):
    (folder / "config.json").write_text("{}")
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "two.safetensors")
    mapping = (
        {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        if mapping is None
        else mapping
    )
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": mapping}))
    return folder


@pytest.mark.parametrize("make", [whole, sharded])
def test_values_shapes_and_dtypes(tmp_path, make):
    checkpoint = SafetensorsCheckpoint(make(tmp_path))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    for name, values in TENSORS.items():
        read = checkpoint.read(name)
        assert (checkpoint.shape(name), read.dtype) == (values.shape, values.dtype)
        assert read.tolist() == values.tolist()


def test_config_is_read(tmp_path):
    assert SafetensorsCheckpoint(whole(tmp_path)).hf_config == {"architectures": ["X"]}


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: this shard"):
        SafetensorsCheckpoint(tmp_path)


def test_a_tensor_that_only_the_index_has_is_named(tmp_path):
    folder = sharded(tmp_path, {"a": "one.safetensors", "d": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors: lacks 1 tensors of the index, e\.g\. 'd'"):
        SafetensorsCheckpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"], "c": TENSORS["c"]}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in one"):
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "one.bin", 3])
def test_an_index_cannot_point_out_of_the_folder(tmp_path, file):
    with pytest.raises(CheckpointError, match=r"must be a \*\.safetensors"):
        SafetensorsCheckpoint(sharded(tmp_path, {"a": file}))


@pytest.mark.parametrize("length", [0, 4, 40, 200])
def test_truncated_files_are_named(tmp_path, length):
    path = whole(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file, or truncated"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (2**62).to_bytes(8, "little"), (3).to_bytes(8, "little") + b"[1]"]
)
def test_corrupt_headers_are_refused(tmp_path, header):
    path = whole(tmp_path) / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path):
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    (whole(tmp_path) / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 12)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SafetensorsCheckpoint(tmp_path)


def test_unread_dtypes_are_named(tmp_path):
    save_file({"q": np.arange(3, dtype=np.int8)}, whole(tmp_path) / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="'q' is I8; read are F32, F16, BF16"):
        checkpoint.read("q")


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="tensor 'zz' is missing"):
        SafetensorsCheckpoint(whole(tmp_path)).read("zz")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_broken_config_is_named(tmp_path, text):
    (whole(tmp_path) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_several_files_need_an_index(tmp_path):
    (sharded(tmp_path) / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        SafetensorsCheckpoint(tmp_path)
