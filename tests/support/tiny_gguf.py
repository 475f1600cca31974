"""A tiny model in one file that the whole engine can load: weights, vocabulary and chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.gguf_files import byte_level_metadata, write_gguf
from tests.support.gguf_models import to_gguf

VOCAB_SIZE = 263
CONTEXT_LENGTH = 128


def write_tiny_gguf(path: Path) -> Path:
    """A Llama of two layers over `byte_level_tokens`; its answers are noise, but the same ones every time."""
    metadata, tensors = to_gguf("llama3", "llama")
    embeddings = np.random.RandomState(7).standard_normal((VOCAB_SIZE, 32)).astype(np.float32)
    tensors["token_embd.weight"] = embeddings / np.float32(4)
    metadata |= byte_level_metadata() | {
        "llama.vocab_size": VOCAB_SIZE,
        "llama.context_length": CONTEXT_LENGTH,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    return write_gguf(path, metadata, tensors)
