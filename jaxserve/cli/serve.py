"""`jaxserve serve`: the gRPC server."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import TYPE_CHECKING

from jaxserve.cli.arguments import (
    add_dataclass_flags,
    add_engine_flags,
    command_parser,
    engine_options,
    given,
)
from jaxserve.config import EngineConfig
from jaxserve.server.config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.engine.async_llm import AsyncLLM


def main(argv: list[str]) -> int:
    """Serves until a signal ends it."""
    parser = command_parser(
        "serve",
        "Serve a model over gRPC (jaxserve.v1.Inference, health, reflection).",
        usage="jaxserve serve [options]",
    )
    add_dataclass_flags(parser, ServerConfig, "server options")
    add_engine_flags(parser)
    arguments = parser.parse_args(argv)
    server_config = ServerConfig(**given(arguments, ServerConfig))
    options = engine_options(arguments)
    EngineConfig.from_flat(options)  # a wrong value should not have to wait for the import of jax
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("jaxserve").setLevel(logging.INFO)

    from jaxserve.server.app import serve

    def make_engine() -> AsyncLLM:
        from jaxserve.engine.async_llm import AsyncLLM

        return AsyncLLM(**options)

    loaded = asyncio.run(
        serve(server_config, make_engine, lambda line: print(f"jaxserve: {line}", flush=True))
    )
    if not loaded:
        # The thread that loads is inside XLA: an ordinary exit would destroy what it uses under its feet.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0
