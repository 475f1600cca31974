"""How much host memory a load takes, watched from another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.packaging.checkout import ROOT
from tests.support.tiny_checkpoint import write_tiny_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
PARAMS_PER_LAYER = 512 * (4 * 512 + 3 * 1408)
BYTES = 200 * 2**20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs Linux's /proc to see a process's memory"
)


def write_checkpoint(folder: Path, dtype: type) -> Path:
    """About `BYTES` of a Llama in many small layers."""
    folder.mkdir()
    num_layers = BYTES // (PARAMS_PER_LAYER * np.dtype(dtype).itemsize)
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": np.ones((4096, 512), dtype),
        "model.norm.weight": np.ones(512, dtype),
    }
    for layer in range(num_layers):
        there = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{there}{name}.weight"] = np.ones(512, dtype)
        for name in "qkvo":
            tensors[f"{there}self_attn.{name}_proj.weight"] = np.ones((512, 512), dtype)
        for name in ("gate", "up"):
            tensors[f"{there}mlp.{name}_proj.weight"] = np.ones((1408, 512), dtype)
        tensors[f"{there}mlp.down_proj.weight"] = np.ones((512, 1408), dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    return folder


class Loader:
    """The watched process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def anonymous_bytes(self) -> int:
        """Memory of its own: neither mapped files, which the system takes back, nor code."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def load(self, folder: Path, dtype: str) -> tuple[int, int]:
        """Loads a checkpoint; returns its parameters' bytes and the most memory that it took meanwhile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        before = peak = self.anonymous_bytes()
        answers: list[str] = []
        reader = threading.Thread(target=lambda out=self._process.stdout: answers.append(out.readline()))
        self._process.stdin.write(f"{folder} {dtype}\n")
        self._process.stdin.flush()
        reader.start()
        while reader.is_alive():
            peak = max(peak, self.anonymous_bytes())
            time.sleep(0.001)
        assert self._process.stdout.readline() == "gone\n"
        return int(answers[0]), peak - before


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    tiny = write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    command = [sys.executable, "-m", "tests.support.load_and_wait"]
    # So that what is freed is the system's again at once, and the next load begins where the last began.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        loader = Loader(process)
        loader.load(tiny, "float32")  # whatever is made once, JAX's threads among it, is there from now on
        yield loader
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(np.float32, "float32"), (ml_dtypes.bfloat16, "bfloat16"), (np.float32, "bfloat16")],
    ids=["float32", "bfloat16", "float32 as bfloat16"],
)
def test_a_load_takes_little_more_than_the_parameters(
    loader: Loader, tmp_path: Path, stored: type, dtype: str
) -> None:
    num_bytes, peak = loader.load(write_checkpoint(tmp_path / "model", stored), dtype)
    assert num_bytes > 0.45 * BYTES
    print(f"{num_bytes / 2**20:.0f} MiB of parameters, {peak / 2**20:.0f} MiB at most")
    assert num_bytes * 0.9 < peak, "the parameters themselves must have been seen"
    assert peak < 1.5 * num_bytes
