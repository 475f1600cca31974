"""What must be refused, and in which words: one table for Python, the command line and gRPC.

All three say the same of a row, because there is one validator. Engine options do not travel over gRPC: its
server takes them from the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.requests import FIELD_PATHS

# Sampling parameters that no flag sets.
_WITHOUT_FLAG = frozenset({"logit_bias", "logprobs"})


class Bad(NamedTuple):
    """Options of which one is not allowed.

    Attributes:
        options: as Python takes them.
        message: of the error, whole.
    """

    options: Mapping[str, Any]
    message: str

    @property
    def field(self) -> str:
        """Whose value it is."""
        return self.message.partition("=")[0]

    @property
    def has_flags(self) -> bool:
        """Whether the command line can say it."""
        return not _WITHOUT_FLAG & self.options.keys()

    def flags(self) -> list[str]:
        """The options on a command line."""
        return [flag for name, value in self.options.items() for flag in _flags(name, value)]

    def request(self, **fields: Any) -> pb.GenerateRequest:
        """The options, which are sampling parameters, in a request."""
        request = pb.GenerateRequest(**fields)
        for name, value in self.options.items():
            group, _, field = FIELD_PATHS[name].partition(".")
            message = getattr(request, group)
            if isinstance(value, dict):
                getattr(message, field).update(value)
            elif isinstance(value, list):
                getattr(message, field).extend(value)
            else:
                setattr(message, field, value)
        return request


def _flags(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "stop":
        return [f"{flag}={text}" for text in value]
    if isinstance(value, list | tuple):
        return [f"{flag}={','.join(map(str, value))}"]
    return [f"{flag}={value}"]


def ids(bad: Bad) -> str:
    """A name for a row in pytest's output."""
    return ",".join(f"{name}={str(value)[:16]}" for name, value in bad.options.items())


def rows(table: list[Bad]) -> list[Any]:
    """The table for `pytest.mark.parametrize`."""
    return [pytest.param(bad, id=ids(bad)) for bad in table]


def _one(name: str, allowed: str, *values: Any) -> list[Bad]:
    return [Bad({name: value}, f"{name}={value!r}: {allowed}") for value in values]


_IDS = "must be an integer in [0, 2147483647]"
_LONG = "x" * 1025

SAMPLING: list[Bad] = [
    *_one("temperature", "must be a finite number in [0, 100]", math.nan, math.inf, -math.inf, -1.0, 1e308),
    *_one("top_p", "must be a finite number in (0, 1]", 0.0, -0.0, 1.1, math.nan, -1.0),
    *_one("top_k", "must be an integer in [-1, 2147483647]", -5, 2**31, 2**63 - 1),
    *_one("min_p", "must be a finite number in [0, 1]", -0.1, 1.5, math.nan),
    *_one("n", "must be an integer in [1, 128]", 0, -1, 10**9, -(2**63)),
    *_one("seed", "must be an integer in [0, 4294967295]", -1, 2**32, 2**63 - 1),
    *_one("repetition_penalty", "must be a finite number in [0.01, 10]", 0.0, math.inf, math.nan, -1.0),
    *_one("presence_penalty", "must be a finite number in [-2, 2]", math.inf, -math.inf, 2.5),
    *_one("frequency_penalty", "must be a finite number in [-2, 2]", math.inf, math.nan, -2.5),
    *_one("max_tokens", "must be an integer in [1, 2147483647]", 0, -1, 2**31, 2**63 - 1),
    *_one("min_tokens", "must be an integer in [0, 2147483647]", -1, 2**63 - 1),
    Bad({"min_tokens": 17, "max_tokens": 16}, "min_tokens=17: must not exceed max_tokens=16"),
    *_one("logprobs", "must be an integer in [0, 20]", -1, 10**6, 2**32),
    Bad({"stop": [""]}, "stop='': must be strings of 1 to 1024 characters"),
    Bad({"stop": ["fine", _LONG]}, f"stop='{'x' * 76}...: must be strings of 1 to 1024 characters"),
    Bad({"stop": ["x"] * 65}, "stop='<65 entries>': must have at most 64 entries"),
    Bad({"stop_token_ids": [-1]}, f"stop_token_ids=-1: {_IDS}"),
    Bad({"stop_token_ids": [1, 2**32]}, f"stop_token_ids=4294967296: {_IDS}"),
    Bad({"stop_token_ids": [1] * 65}, "stop_token_ids='<65 entries>': must have at most 64 entries"),
    Bad({"logit_bias": {-1: 1.0}}, f"logit_bias=-1: {_IDS}"),
    Bad({"logit_bias": {2**32: 1.0}}, f"logit_bias=4294967296: {_IDS}"),
    Bad({"logit_bias": {3: math.nan}}, "logit_bias=nan: must be a finite number in [-100, 100]"),
    Bad({"logit_bias": {3: 101.0}}, "logit_bias=101.0: must be a finite number in [-100, 100]"),
    Bad(
        {"logit_bias": dict.fromkeys(range(100_000), 1.0)},
        "logit_bias='<100000 entries>': must have at most 320 entries",
    ),
]

# For an engine with a vocabulary of 257 and a context of 512, whose token ids are bytes.
AGAINST_THE_MODEL: list[Bad] = [
    Bad({"stop_token_ids": [257]}, "stop_token_ids=257: must be an integer in [0, 256]"),
    Bad({"logit_bias": {257: 1.0}}, "logit_bias=257: must be an integer in [0, 256]"),
    Bad(
        {"min_tokens": 600, "max_tokens": 700},
        "min_tokens=600: must be at most 511 after a prompt of 1",
    ),
]
PROMPTS: list[tuple[str, str]] = [
    ("", "prompt='': must not be empty"),
    ("x" * 512, "prompt_token_ids='<512 tokens>': must have at most 511 tokens here"),
    (
        "x" * 2556,
        "prompt='<2556 characters>': must have at most 511 tokens here, and has at least 512",
    ),
]
# Options of a request besides its parameters, by their names in Python.
OTHER: list[Bad] = [
    *_one("client", "must be empty or 1 to 128 characters of A-Z a-z 0-9 _ . : -", "no spaces", "../etc"),
    Bad({"cache_salt": "x" * 257}, f"cache_salt='{'x' * 76}...: must be a text of at most 256 characters"),
]

_POSITIVE = "must be a positive integer"
_INCREASING = "must be a strictly increasing list of positive integers"
ENGINE: list[Bad] = [
    *_one("max_num_seqs", _POSITIVE, 0, -1, 2**31),
    *_one("max_model_len", _POSITIVE, 0),
    *_one("num_pages", _POSITIVE, -3),
    *_one("max_num_batched_tokens", _POSITIVE, 0),
    *_one("max_queued_requests", _POSITIVE, 0),
    *_one("max_decode_steps", _POSITIVE, 0),
    *_one("tensor_parallel_size", _POSITIVE, 0),
    *_one("probe_interval", _POSITIVE, 0),
    *_one("page_size", "must be a power of two up to 1024", 48, 0, 2048),
    *_one("memory_fraction", "must be a number in [0, 1]", 1.5, -0.1, math.nan),
    *_one("watermark", "must be a number in [0, 1]", 2.0),
    *_one("host_kv_bytes", "must be in [0, 2**50)", -1),
    *_one("preempted_target", "must be a number in (0, 1]", 0.0, 1.1, math.nan),
    *_one("demand_quantile", "must be a number in (0, 1)", 1.0, math.nan),
    *_one("pipeline_depth", "must be 0, 1 or 2", 3, -1),
    *_one("batch_window_s", "must be in [0, 3600]", -1.0, math.inf),
    *_one("max_wait_s", "must be in (0, 86400]", 0.0),
    *_one("ttft_slo_s", "must be in (0, 86400]", math.nan),
    *_one("tpot_slo_s", "must be in (0, 86400]", -1.0),
    *_one("token_buckets", _INCREASING, (8, 4), (0, 8)),
    *_one("row_buckets", _INCREASING, (2, 2)),
    *_one("hidden_layers", _INCREASING, (0,)),
    *_one("learning_epoch_s", "must be in [1, 3600]", 0.5),
    *_one("reward_ttft_weight", "must be in [0, 100]", -1.0),
    Bad(
        {"learning": "frozen"},
        "learning='frozen': needs a learning_log or a learning_prior that says what is known",
    ),
    Bad(
        {"max_num_batched_tokens": 64, "token_buckets": (8, 16)},
        "token_buckets=(8, 16): the last must be max_num_batched_tokens=64, or one of the two be left out",
    ),
]
