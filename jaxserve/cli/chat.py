"""`jaxserve chat`: one question, or a conversation."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from io import BufferedReader
from typing import cast

from jaxserve.cli.arguments import command_parser, sampling_params
from jaxserve.cli.backend import Backend, add_backend_flags, open_backend, print_stream, read_text
from jaxserve.errors import ValidationError
from jaxserve.request import SamplingParams
from jaxserve.validation import check_cache_salt, check_client, check_unicode

_HELP = "/new starts over, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


def main(argv: list[str]) -> int:
    """Runs the command: answers the message if there is one, else converses until the input ends."""
    parser = command_parser(
        "chat", f"Talk with a model. In a conversation {_HELP}.", usage="jaxserve chat [MESSAGE] [options]"
    )
    parser.add_argument("message", nargs="?", help="ask this and exit; without it, converse")
    parser.add_argument("--system", metavar="TEXT", help="instructions that the conversation starts with")
    add_backend_flags(parser)
    arguments = parser.parse_args(argv)
    params = sampling_params(arguments)
    _check_input(arguments.message, arguments.system)
    check_client(arguments.client)
    check_cache_salt(arguments.cache_salt)
    with open_backend(arguments) as backend:
        conversation = Conversation(
            backend, params, arguments.system, client=arguments.client, cache_salt=arguments.cache_salt
        )
        if arguments.message is not None:
            conversation.say(arguments.message)
        else:
            converse(conversation)
    return 0


def _check_input(message: str | None, system: str | None) -> None:
    """Nothing is loaded for a conversation that cannot begin. Raises ValidationError."""
    for field, text in (("message", message), ("system", system)):
        if text is not None:
            check_unicode(field, text)
    if message is None and not sys.stdin.isatty() and not cast(BufferedReader, sys.stdin.buffer).peek(1):
        raise ValidationError("message", "", "must be given as an argument, or on stdin, which is empty")


class Conversation:
    """Messages so far, and the backend that answers them."""

    def __init__(
        self,
        backend: Backend,
        params: SamplingParams,
        system: str | None,
        *,
        client: str = "",
        cache_salt: str = "",
    ) -> None:
        self._backend = backend
        self._params = params
        self._options = {"client": client, "cache_salt": cache_salt}
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._start)

    def restart(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._start)

    def say(self, text: str) -> None:
        """Prints the answer to a message and remembers both; an answer that is cut off is forgotten."""
        asked = [*self.messages, {"role": "user", "content": text}]
        outputs = self._backend.stream_chat(asked, self._params, **self._options)
        with contextlib.closing(outputs):
            last = print_stream(outputs)
        if last is not None:
            self.messages = [*asked, {"role": "assistant", "content": last.outputs[0].text}]


def converse(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Reads messages until the input ends; errors of one message do not end the conversation."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives `input` line editing and a history
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"({_HELP})")
    while True:
        try:
            text = read_text("message", lambda: read("> " if is_terminal else "")).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            conversation.restart()
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            try:
                conversation.say(text)
            except KeyboardInterrupt:
                print()
            except ValidationError as error:
                print(error, file=sys.stderr)
