"""A JAX-native serving engine for large language models.

Names are loaded when first used, so that ``import jaxserve`` loads no jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig as EngineConfig
    from jaxserve.engine.async_llm import AsyncLLM as AsyncLLM
    from jaxserve.engine.llm import LLM as LLM
    from jaxserve.outputs import CompletionOutput as CompletionOutput
    from jaxserve.outputs import RequestOutput as RequestOutput
    from jaxserve.request import SamplingParams as SamplingParams
    from jaxserve.server.client import AsyncClient as AsyncClient
    from jaxserve.server.client import Client as Client

_LAZY = {
    "AsyncClient": "jaxserve.server.client",
    "AsyncLLM": "jaxserve.engine.async_llm",
    "Client": "jaxserve.server.client",
    "CompletionOutput": "jaxserve.outputs",
    "EngineConfig": "jaxserve.config",
    "LLM": "jaxserve.engine.llm",
    "RequestOutput": "jaxserve.outputs",
    "SamplingParams": "jaxserve.request",
}

__all__ = [  # noqa: RUF022 - the order in which a reader meets them
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "RequestOutput",
    "CompletionOutput",
    "EngineConfig",
    "Client",
    "AsyncClient",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
