"""The `jaxserve` command: finds the subcommand, runs it, turns known errors into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from jaxserve.cli.arguments import CommandParser, fail, suggestion
from jaxserve.errors import JaxserveError

# Name -> (module, one line of help). Modules are imported when used: `--help` must not wait for jax.
COMMANDS = {
    "chat": ("jaxserve.cli.chat", "talk with a model, here or on a server"),
    "generate": ("jaxserve.cli.generate", "complete a prompt, here or on a server"),
    "serve": ("jaxserve.cli.serve", "serve a model over gRPC"),
    "health": ("jaxserve.cli.health", "ask a server whether it is ready"),
    "pull": ("jaxserve.cli.pull", "fetch a model into the cache folder"),
    "convert": ("jaxserve.cli.convert", "convert a checkpoint (GGUF, safetensors, Orbax)"),
    "compile": ("jaxserve.cli.compile", "plan and compile for devices that are not here"),
    "train-predictor": ("jaxserve.cli.train_predictor", "learn output lengths from recorded hidden states"),
    "simulate": ("jaxserve.cli.simulate", "try scheduling policies on a trace, without a device"),
    "bench": ("jaxserve.cli.bench", "compare batching modes (in a checkout of the repository)"),
    "doctor": ("jaxserve.cli.doctor", "show versions, devices and folders"),
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns its exit code.

    0 is success, 1 a failure that the command itself reports, 2 a wrong option, configuration, model or
    address (one line on stderr; ``--debug`` adds the traceback), 130 Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith("-"):
        return _help_or_version(arguments)
    name, *rest = arguments
    if name not in COMMANDS:
        return fail(f"jaxserve: no command {name!r}{suggestion(name, COMMANDS)}; see jaxserve --help")
    command = importlib.import_module(COMMANDS[name][0]).main
    if "--debug" in rest:
        return command([argument for argument in rest if argument != "--debug"])
    return _run(name, command, rest)


def _run(name: str, command: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return command(arguments)
    except BrokenPipeError:
        # The reader of our output has left; Python would complain about it once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (JaxserveError, OSError) as error:  # no server, no room, no permission
        return fail(f"jaxserve {name}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED


def _help_or_version(arguments: list[str]) -> int:
    parser = CommandParser(
        prog="jaxserve",
        usage="jaxserve COMMAND [options]",
        description="A JAX-native serving engine for large language models.",
    )
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items())
    parser.epilog = f"commands:\n{listing}\n\njaxserve COMMAND --help shows a command's options."
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    if parser.parse_args(arguments).version:
        from importlib.metadata import version

        print(f"jaxserve {version('jaxserve-engine')}")
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
