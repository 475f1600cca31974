"""Where `generate` and `chat` get their answers: an engine in this process, or a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from jaxserve.cli.arguments import (
    CommandParser,
    add_dataclass_flags,
    add_engine_flags,
    add_sampling_flags,
    engine_options,
    given,
)
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, ValidationError
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.server.config import ConnectionConfig

# `--seed` is the request's here; with it, the engine draws none.
_NOT_HERE = frozenset({"seed"})


class Backend(Protocol):
    """What `jaxserve.LLM` and `jaxserve.Client` have in common."""

    def stream(
        self, prompt: str, params: SamplingParams, /, *, client: str = "", cache_salt: str = ""
    ) -> Generator[RequestOutput]:
        """Cumulative outputs for a text."""
        ...

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        /,
        *,
        client: str = "",
        cache_salt: str = "",
    ) -> Generator[RequestOutput]:
        """Cumulative outputs for a conversation."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def add_backend_flags(parser: CommandParser) -> None:
    """``--server`` and how to reach it, the sampling flags, and the engine's."""
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="ask this jaxserve server instead of loading a model"
    )
    parser.add_argument(
        "--client",
        default="",
        metavar="ID",
        help="whose request it is, for orderings that are fair to clients",
    )
    parser.add_argument(
        "--cache-salt", default="", metavar="TEXT", help="share cached prefixes with this salt only"
    )
    add_dataclass_flags(parser, ConnectionConfig, "connection options (with --server)")
    add_sampling_flags(parser)
    add_engine_flags(parser, without=_NOT_HERE)


def open_backend(arguments: argparse.Namespace) -> Backend:
    """The backend that a command line asks for; use it as a context manager.

    Raises:
        ConfigError: for an option that cannot work, or that only an engine in this process has.
        ModelNotFoundError, CheckpointError: as `jaxserve.LLM`.
    """
    options = engine_options(arguments, without=_NOT_HERE)
    connection = given(arguments, ConnectionConfig)
    if arguments.server is None:
        if connection:
            raise ConfigError(f"{_flag(connection)} is an option of the connection: it needs --server")
        # One prompt at a time needs no more slots than it has completions, and so fewer programs to compile.
        options.setdefault("max_num_seqs", min(max(getattr(arguments, "n", 1), 1), 16))
        EngineConfig.from_flat(options)  # a wrong value should not have to wait for the import of jax
        from jaxserve.engine.llm import LLM

        return LLM(**options)
    model = options.pop("model", "")
    if options:
        raise ConfigError(
            f"{_flag(options)} is an option of the engine: with --server, the server decides it"
        )
    from jaxserve.server.client import Client

    return Client(arguments.server, model=model, **connection)


def _flag(options: Mapping[str, Any]) -> str:
    """The first option as it was typed."""
    return f"--{next(iter(options)).replace('_', '-')}"


def read_text(field: str, read: Callable[[], str]) -> str:
    """What a read of stdin returns. Raises ValidationError for bytes that are not UTF-8."""
    try:
        return read()
    except UnicodeDecodeError as error:
        shown = error.object[max(error.start - 20, 0) : error.start + 20]
        raise ValidationError(
            field, shown, f"must be {error.encoding.upper()} text: {error.reason}"
        ) from None


def print_stream(outputs: Iterator[RequestOutput]) -> RequestOutput | None:
    """Prints an answer as it comes, then a line break; returns the last output.

    One completion is streamed; several are printed one after the other when all are finished.
    """
    shown, last = 0, None
    for output in outputs:
        last = output
        if len(output.outputs) == 1:
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    if last is not None and len(last.outputs) > 1:
        for completion in last.outputs:
            print(f"[{completion.index}] {completion.text.strip()}")
    else:
        print(flush=True)
    return last
