"""Small GGUF files for tests, written by the `gguf` package and, for K-quants, packed here by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

F32 = GGMLQuantizationType.F32

# Every byte once, a merged word, special tokens: enough for a byte-level tokenizer.
WORDS = ["he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What convert_hf_to_gguf.py does to the rows of Llama's q and k."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: GGMLQuantizationType = F32,
) -> Path:
    """Writes a file; matrices are stored as ``kind``, vectors as float32."""
    architecture = metadata.get("general.architecture", "llama")
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 else F32
        writer.add_tensor(name, quants.quantize(tensor.astype(np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def byte_level_tokens() -> list[str]:
    """GPT-2's 256 byte characters in byte order, then the words, then three special tokens."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    alphabet = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    return [*alphabet, *WORDS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level_metadata(pre: str = "smollm") -> dict[str, Any]:
    """Tokenizer metadata of the vocabulary of `byte_level_tokens` (263 tokens)."""
    tokens = byte_level_tokens()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * 260 + [int(TokenType.CONTROL)] * 3,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 261,
        "tokenizer.ggml.eos_token_id": 262,
    }


def sentencepiece_metadata(add_space_prefix: bool = True) -> dict[str, Any]:
    """Tokenizer metadata of a SentencePiece vocabulary with byte fallback."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    normal = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "lo"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(normal)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *byte_tokens, *normal],
        "tokenizer.ggml.scores": [0.0] * 259 + [-100.0] * 5 + [-float(rank) for rank in range(6)],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def llama_metadata(hf: Mapping[str, Any], architecture: str = "llama") -> dict[str, Any]:
    """Architecture metadata of a Hugging Face config, as the converter writes it."""
    return {
        "general.architecture": architecture,
        f"{architecture}.block_count": hf["num_hidden_layers"],
        f"{architecture}.context_length": hf["max_position_embeddings"],
        f"{architecture}.embedding_length": hf["hidden_size"],
        f"{architecture}.feed_forward_length": hf["intermediate_size"],
        f"{architecture}.attention.head_count": hf["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": hf["num_key_value_heads"],
        f"{architecture}.attention.key_length": hf["head_dim"],
        f"{architecture}.attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        f"{architecture}.rope.freq_base": float(hf.get("rope_theta", 10000.0)),
    }
