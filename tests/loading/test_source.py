"""Names and paths of models."""

import errno

import pytest

from jaxserve.errors import CheckpointError, ModelNotFoundError, StorageError
from jaxserve.loading import catalogue
from jaxserve.loading.source import resolve_model
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import to_gguf


def test_a_file_and_a_folder_with_one_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", *to_gguf("llama2", "llama"))
    assert (resolve_model(str(path), tmp_path).kind, resolve_model(str(path), tmp_path).path) == (
        "gguf",
        path,
    )
    assert resolve_model(str(tmp_path), tmp_path).path == path


def test_a_catalogue_name_is_pulled(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "pull", lambda name, cache_dir: cache_dir / name)
    source = resolve_model("gemma-3-270m", tmp_path)
    assert (source.name, source.kind, source.path) == ("gemma-3-270m", "gguf", tmp_path / "gemma-3-270m")


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "../../etc",
        "a/../b",
        "org/name/more",
        "org/na me",
        "org/name;rm",
        "-o/x",
        "org/..",
        "x/y.gguf",
        "",
        "a\0b",
    ],
)
def test_odd_names_never_reach_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises((ModelNotFoundError, CheckpointError), match=r"catalogue \(smollm2-135m-instruct"):
        resolve_model(name, tmp_path)


@pytest.mark.parametrize("revision", ["../x", "a b", "-f", ""])
def test_odd_revisions_never_reach_the_hub(tmp_path, monkeypatch, revision):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="revision="):
        resolve_model("org/name", tmp_path, revision)


def test_one_revision_and_only_what_is_needed_from_the_hub(tmp_path, monkeypatch):
    asked = {}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name", tmp_path, "abc123").kind == "safetensors"
    assert (asked["name"], asked["revision"]) == ("org/name", "abc123")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_a_full_disk_is_not_called_a_missing_network(tmp_path, monkeypatch):
    def download(name, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "blob"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(StorageError, match=r"blob: cannot be written: No space left on device$"):
        resolve_model("org/name", tmp_path)


def test_offline_the_message_says_what_to_run(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"hf download org/not-here --revision v1$"):
        resolve_model("org/not-here", tmp_path, "v1")


def test_a_folder_without_a_model_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve_model(str(tmp_path), tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must end in \.gguf"):
        resolve_model(str(tmp_path / "x.bin"), tmp_path)
