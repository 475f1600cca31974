"""To Orbax, from Orbax, and to Hugging Face's layout: same weights, same tokenizer, straight to devices."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.cli import main
from jaxserve.errors import CheckpointError, ConfigError, StorageError
from jaxserve.loading.convert import convert
from jaxserve.loading.source import ORBAX_MARKER, ModelSource, open_checkpoint, resolve_model
from jaxserve.loading.tokenizer import load_tokenizer
from jaxserve.loading.unfuse import unfuse
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import param_specs
from jaxserve.models.registry import find_family
from tests.support.decoder_run import load_tiny
from tests.support.faults import files_of_at_most, names_in
from tests.support.gguf_files import byte_level_metadata, write_gguf
from tests.support.gguf_models import to_gguf
from tests.support.load_checkpoint import load
from tests.support.tiny_models import HF_CONFIGS, hf_weights


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> ModelSource:
    metadata, tensors = to_gguf("llama2", "llama")
    template = {
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    }
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "m.gguf", metadata | byte_level_metadata() | template, tensors)
    return resolve_model(str(path), folder)


@pytest.fixture(scope="module")
def orbax(gguf, tmp_path_factory) -> ModelSource:
    return convert(gguf, tmp_path_factory.mktemp("orbax") / "model", "float32", progress=False)


@pytest.mark.parametrize("devices", [1, 2])
def test_orbax_restores_the_same_parameters(orbax, devices):
    _, expected = load_tiny("llama2")
    params = load(open_checkpoint(orbax), devices=devices)
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        assert np.array_equal(params[path], value), path
    qkv = params["layers.1.attention.qkv"]
    assert qkv.addressable_shards[0].data.shape[0] * devices == qkv.shape[0]


def test_orbax_reads_back_tensor_by_tensor(orbax):
    checkpoint = open_checkpoint(orbax)
    expected = hf_weights("llama2")
    assert set(checkpoint.names()) == set(expected)
    for name in (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ):
        assert checkpoint.shape(name) == expected[name].shape
        assert np.array_equal(checkpoint.read(name), expected[name]), name


def test_orbax_to_safetensors_and_in_bfloat16(orbax, tmp_path):
    source = convert(orbax, tmp_path / "hf", "bfloat16", progress=False)
    assert source.kind == "safetensors"
    checkpoint = open_checkpoint(resolve_model(str(tmp_path / "hf"), tmp_path))
    for name, values in hf_weights("llama2").items():
        read = checkpoint.read(name)
        assert read.dtype == jnp.bfloat16
        assert np.array_equal(read, values.astype(jnp.bfloat16)), name


def test_shards_and_index(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.loading.convert._SHARD_BYTES", 20_000)
    convert(gguf, tmp_path / "hf", "float32", "safetensors", progress=False)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    checkpoint = open_checkpoint(resolve_model(str(tmp_path / "hf"), tmp_path))
    for name, values in hf_weights("llama2").items():
        assert np.array_equal(checkpoint.read(name), values), name


def test_the_tokenizer_travels(gguf, orbax, tmp_path):
    hf = convert(orbax, tmp_path / "hf", "float32", progress=False)
    first = load_tokenizer(gguf)
    for source in (orbax, hf):
        tokenizer = load_tokenizer(source)
        assert tokenizer.encode("hello é<|im_end|>", parse_special=True)[-1] == 262
        assert tokenizer.encode("hello é 42") == first.encode("hello é 42")
        assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((262,), 261)
        assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_unfuse_is_the_inverse_of_fuse(name):
    family = find_family(HF_CONFIGS[name])
    config = family.config_from_hf(HF_CONFIGS[name])
    tensors = hf_weights(name)
    specs = param_specs(Decoder(config, jnp.float32))
    for path, source in family.weight_map(config).items():
        value = source.fuse([tensors[tensor] for tensor in source.names])
        assert value.shape == specs[path].shape
        for tensor, values in unfuse(source, value).items():
            assert np.array_equal(values, tensors[tensor]), tensor


def test_refusals(gguf, orbax, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        convert(gguf, tmp_path, "float32", progress=False)
    with pytest.raises(ConfigError, match="dtype='int8': must be one of float32, bfloat16, float16"):
        convert(gguf, tmp_path / "new", "int8", progress=False)
    assert list(tmp_path.iterdir()) == []


# TensorStore's threads outlive the event loop of a save that fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_a_full_disk_leaves_nothing_and_is_named(gguf, orbax, tmp_path, kind, capsys):
    target = tmp_path / "models" / "new"
    source = gguf if kind == "orbax" else orbax
    with files_of_at_most(1_000), pytest.raises(StorageError) as caught:
        convert(source, target, "float32", progress=False)
    assert str(caught.value).startswith(f"{target}: cannot be written: ")
    assert names_in(tmp_path) == ["models"]
    with files_of_at_most(1_000):
        assert main.main(["convert", str(source.path), str(target)]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"jaxserve convert: {target}: cannot be written: ")
    assert names_in(tmp_path) == ["models"]
    assert convert(source, target, "float32", progress=False).kind == kind, "with room it works"


def test_a_damaged_orbax_folder_is_refused(gguf, tmp_path):
    source = convert(gguf, tmp_path / "model", "float32", progress=False)
    marker = source.path / ORBAX_MARKER
    marker.write_text(json.dumps({"version": 99}))
    with pytest.raises(CheckpointError, match="version=99"):
        open_checkpoint(source)
    marker.write_text(json.dumps({"version": 1}))
    for path in (source.path / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="params"):
        load(open_checkpoint(source))
