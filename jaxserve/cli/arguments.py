"""Command-line arguments: a parser with one-line errors, and flags made from the fields of dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, override

from jaxserve import config
from jaxserve.request import SamplingParams

USAGE_ERROR = 2
_SAMPLING_HELP = {
    "n": "completions of each prompt",
    "temperature": "0 takes the most probable token; higher is more varied",
    "top_p": "sample from the most probable tokens that make up this share",
    "top_k": "sample from this many most probable tokens; 0 from all",
    "min_p": "drop tokens less probable than this share of the most probable one",
    "repetition_penalty": "above 1 discourages tokens that have appeared",
    "presence_penalty": "above 0 discourages tokens that the output has",
    "frequency_penalty": "above 0 discourages tokens by how often the output has them",
    "seed": "same seed, same answer; default: a new one each time",
    "max_tokens": "longest answer; default: all that the context length allows",
    "min_tokens": "shortest answer",
    "stop": "end the answer before this text; may be given several times",
    "stop_token_ids": "end the answer after one of these token ids",
    "ignore_eos": "go on after the model's own end of text",
    "include_stop_str_in_output": "keep the stop text in the answer",
    "skip_special_tokens": "leave special tokens out of the text",
}
# At a terminal an answer should be repeatable and as long as the model makes it.
SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": None}
# Parameters of programs, not of people: their results are not shown at a terminal.
SAMPLING_WITHOUT_FLAG = frozenset({"logit_bias", "logprobs"})


class CommandParser(argparse.ArgumentParser):
    """Errors are one line on stderr, exit code 2; no abbreviations; wrong flags get a suggestion."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    @override
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            flag = extra[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"no option {flag!r}{suggestion(flag, known)}; see {self.prog} --help")
        return parsed

    @override
    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{self.prog}: {message}"))


def command_parser(name: str, description: str, **options: Any) -> CommandParser:
    """The parser of one subcommand."""
    parser = CommandParser(prog=f"jaxserve {name}", description=description, **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def fail(line: str) -> int:
    """Prints a line on stderr; returns the exit code of a usage error."""
    print(line, file=sys.stderr)
    return USAGE_ERROR


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` if something known is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def add_engine_flags(parser: CommandParser, without: Collection[str] = ()) -> None:
    """One flag for each option of `jaxserve.config.EngineConfig`, but for those left out by the caller."""
    hints: dict[str, Any] = dict(get_type_hints(config.EngineConfig))
    for section in config.SECTIONS:
        hints |= get_type_hints(hints[section])
    group = parser.add_argument_group("engine options")
    for name, field in config.flat_fields():
        if name not in without:
            _add_flag(group, field, hints[name], field.metadata["help"])


def engine_options(arguments: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """The engine options that were given, as `EngineConfig.from_flat` takes them."""
    names = [name for name, _ in config.flat_fields() if name not in without]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_dataclass_flags(parser: CommandParser, kind: type, title: str, without: Collection[str] = ()) -> None:
    """One flag for each field of a dataclass whose fields have ``help`` metadata."""
    group, hints = parser.add_argument_group(title), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        _add_flag(group, field, hints[field.name], field.metadata["help"])


def given(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a dataclass that were given as flags."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_sampling_flags(parser: CommandParser) -> None:
    """One flag for each parameter of `SamplingParams` that makes sense at a terminal."""
    group, hints = parser.add_argument_group("sampling options"), get_type_hints(SamplingParams)
    for field in dataclasses.fields(SamplingParams):
        if field.name == "stop":
            group.add_argument(
                "--stop", action="append", default=argparse.SUPPRESS, help=_SAMPLING_HELP["stop"]
            )
        elif field.name == "stop_token_ids":
            _add_flag(group, field, tuple[int, ...], _SAMPLING_HELP[field.name])
        elif field.name not in SAMPLING_WITHOUT_FLAG:
            _add_flag(group, field, hints[field.name], _SAMPLING_HELP[field.name], SAMPLING_DEFAULTS)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of a command line. Raises ValidationError."""
    return SamplingParams(**(SAMPLING_DEFAULTS | given(arguments, SamplingParams)))


def _add_flag(
    group: Any,
    field: dataclasses.Field[Any],
    hint: Any,
    text: str,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    default = defaults.get(field.name, _default_of(field))
    if default not in (None, "", ()):
        text += f" (default: {_shown(default)})"
    options: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
        "dest": field.name,
    }
    flag = f"--{field.name.replace('_', '-')}"
    kinds = [part for part in get_args(hint) if part is not types.NoneType] if _is_union(hint) else [hint]
    kind = kinds[0]
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif get_origin(kind) is Literal:
        names = get_args(kind)
        if str in kinds:  # a name or FILE.py:CLASS, which the configuration checks
            group.add_argument(flag, metavar=f"{{{','.join(names)},FILE.py:CLASS}}", **options)
        else:
            group.add_argument(flag, choices=names, **options)
    elif get_origin(kind) is tuple:
        group.add_argument(flag, type=_int_list, metavar="N,N,...", **options)
    elif kind in (int, float):
        group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", **options)
    else:
        assert kind in (str, Path), f"{field.name}: no flag for {kind}"
        group.add_argument(flag, type=kind, metavar="TEXT" if kind is str else "PATH", **options)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return str(default)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _int_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers like 8,16,32") from None
