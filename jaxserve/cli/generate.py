"""`jaxserve generate`: complete a prompt and stream the answer to stdout."""

from __future__ import annotations

import contextlib
import sys

from jaxserve.cli.arguments import command_parser, fail, sampling_params
from jaxserve.cli.backend import add_backend_flags, open_backend, print_stream, read_text
from jaxserve.request import FinishReason
from jaxserve.validation import check_cache_salt, check_client, check_prompt_text


def main(argv: list[str]) -> int:
    """Runs the command; 1 if the engine could not finish the answer."""
    parser = command_parser(
        "generate",
        "Complete a prompt, as it is: without the model's chat template.",
        usage="jaxserve generate [PROMPT] [options]",
    )
    parser.add_argument(
        "prompt", nargs="?", default="-", help="the text to go on from; - or nothing reads stdin"
    )
    add_backend_flags(parser)
    arguments = parser.parse_args(argv)
    params = sampling_params(arguments)
    prompt = read_text("prompt", sys.stdin.read) if arguments.prompt == "-" else arguments.prompt
    check_prompt_text(prompt)  # nothing is loaded for a prompt that cannot be answered
    check_client(arguments.client)
    check_cache_salt(arguments.cache_salt)
    with open_backend(arguments) as backend:
        outputs = backend.stream(prompt, params, client=arguments.client, cache_salt=arguments.cache_salt)
        with contextlib.closing(outputs):
            last = print_stream(outputs)
    if last is None or last.outputs[0].finish_reason is FinishReason.ERROR:
        return fail(f"jaxserve generate: {last.outputs[0].error if last else 'no answer'}") - 1
    return 0
