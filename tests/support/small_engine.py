"""Sizes of an engine for a tiny model: few programs, which tests' engines share in the compile cache."""

from __future__ import annotations

from typing import Any

SMALL_ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "row_buckets": (6,),
    "token_buckets": (32,),
    "max_model_len": 256,
    "page_size": 8,
    "num_pages": 200,
    "compile_cache": False,
    "use_tqdm": False,
}
