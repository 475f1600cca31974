"""Streaming a checkpoint into parameters: right values, right places, little memory, clear complaints."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import CheckpointError
from jaxserve.loading.gguf_checkpoint import GGUFCheckpoint
from tests.support.decoder_run import load_tiny
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import to_gguf
from tests.support.load_checkpoint import load
from tests.support.tiny_models import HF_CONFIGS, hf_weights


class DictCheckpoint:
    """Tensors from a dict; counts how many arrays are alive at once."""

    def __init__(self, name, tensors=None):
        self.hf_config = HF_CONFIGS[name]
        self.tensors = dict(hf_weights(name) if tensors is None else tensors)
        self.threads = set()
        self.order = []

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name, dtype=None):
        self.threads.add(threading.get_ident())
        self.order.append(name)
        return self.tensors[name].astype(dtype)


@pytest.mark.parametrize("name", ["llama2", "qwen2", "gemma3"])
def test_parameters_equal_those_loaded_one_by_one(name):
    _, expected = load_tiny(name)
    params = load(DictCheckpoint(name))
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        assert np.array_equal(params[path], value), path


def test_a_gguf_file_gives_the_same_parameters(tmp_path):
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", *to_gguf("llama2", "llama")))
    _, expected = load_tiny("llama2")
    params = load(checkpoint)
    for path, value in expected.items():
        assert np.array_equal(params[path], value), path


def test_casts_to_bfloat16_and_cuts_over_devices():
    whole, cut = load(DictCheckpoint("llama2"), jnp.bfloat16), load(DictCheckpoint("llama2"), jnp.bfloat16, 2)
    _, exact = load_tiny("llama2")
    for path, value in whole.items():
        assert value.dtype == jnp.bfloat16
        assert np.array_equal(value, cut[path]), path
        assert np.array_equal(value, np.asarray(exact[path]).astype(jnp.bfloat16)), path
    qkv = cut["layers.0.attention.qkv"]
    assert qkv.addressable_shards[0].data.shape[0] * 2 == qkv.shape[0]


def test_reads_ahead_of_the_device_but_not_far(monkeypatch):
    checkpoint = DictCheckpoint("llama2")
    read_when_put = []
    from jaxserve.loading import weights

    put = weights.jax.device_put

    def recording_put(value, sharding):
        read_when_put.append(len(checkpoint.order))
        return put(value, sharding)

    monkeypatch.setattr(weights.jax, "device_put", recording_put)
    load(checkpoint)
    assert len(checkpoint.order) == len(checkpoint.tensors)
    assert threading.get_ident() not in checkpoint.threads
    # After n parameters went out, at most n + 3 were read, of at most three tensors each.
    assert all(count <= 3 * (number + 3) for number, count in enumerate(read_when_put, start=1))
    assert read_when_put[0] < len(checkpoint.tensors)


def test_missing_tensors_are_listed():
    tensors = hf_weights("llama2")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"lacks 2 tensors: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm"
    ):
        load(DictCheckpoint("llama2", tensors))


def test_unknown_tensors_are_listed_and_derived_ones_ignored():
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    assert load(DictCheckpoint("llama2", hf_weights("llama2") | buffers))
    with pytest.raises(CheckpointError, match=r"has unknown 1 tensors: model\.layers\.7\.extra"):
        load(DictCheckpoint("llama2", hf_weights("llama2") | {"model.layers.7.extra": np.ones(5)}))


def test_a_tensor_of_another_shape_is_named():
    tensors = hf_weights("llama2") | {"model.norm.weight": np.ones(33, np.float32)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[33\]: must make up \[32\]"):
        load(DictCheckpoint("llama2", tensors))


def test_an_error_while_reading_stops_the_load():
    checkpoint = DictCheckpoint("llama2")

    def read(name, dtype=None):
        raise CheckpointError(f"disk: {name}")

    checkpoint.read = read
    with pytest.raises(CheckpointError, match="disk: model"):
        load(checkpoint)
