"""Length prediction on a real model's answers to real prompts.

    python -m bench.prediction collect --prompts FOLDER --data build/answers  # again and again
    python -m bench.prediction heads --data build/answers --output results.jsonl
    python -m bench.prediction service --prompts FOLDER --data build/answers --output results.jsonl
    python -m bench.prediction live --prompts FOLDER --trace FILE --data build/answers --output results.jsonl
    python -m bench.prediction overhead --data build/answers --output results.jsonl  # on a quiet machine

``FOLDER`` holds gpteacher, gsm8k, arena_hard and humaneval as ``NAME.jsonl.gz``, an object with ``prompt``
and ``prompt_tokens`` a line. Cases, besides those in `prediction_judging`:

- ``head, layers ...``: trained on the states of those layers; ``..., no states``: the same network with all
  states zero, which sees only how many tokens there are; ``..., shuffled``: with lengths dealt out at random.
- ``service ...``: what the engine would have predicted.
- ``live ...``: what that gains, served near saturation (`prediction_live`).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bench.prediction_data import collect, collected, prompt_ids, questions, shards
from bench.prediction_judging import Asked, cross_validated, report_head, report_service
from bench.prediction_live import measure_live
from bench.prediction_overhead import measure
from bench.results import Results, add_output_flag, float_list, host_device, int_list, jax_device
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.config import EngineConfig
from jaxserve.loading.source import resolve_model
from jaxserve.loading.tokenizer import load_tokenizer
from jaxserve.runner.length_head import save_head
from jaxserve.runner.length_training import Dataset, TrainingOptions, read_recordings, train

_OWN_OPTIONS = frozenset(
    {"record_hidden", "hidden_layers", "probe_interval", "length_predictor", "length_head", "max_num_seqs",
     "max_model_len", "seed"}
)  # fmt: skip
_BEST_LAYERS = (20,)
_CASES = ("chosen", "mlp", "layers", "controls")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand."""
    arguments = _parser().parse_args(argv)
    options = engine_options(arguments, without=_OWN_OPTIONS)
    if arguments.command == "collect":
        count = collect(
            arguments.prompts, arguments.data, arguments.seconds, options,
            slots=arguments.slots, max_tokens=arguments.max_tokens,
        )  # fmt: skip
        print(count, "requests so far")
    elif arguments.command == "heads":
        _heads(arguments)
    elif arguments.command == "service":
        _service(arguments)
    elif arguments.command == "live":
        measure_live(arguments, options, Results("prediction", jax_device(), arguments.output))
    else:
        _overhead(arguments, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    for name in ("collect", "heads", "service", "live", "overhead"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True, help="folder of collected answers")
        if name in ("collect", "service", "live"):
            command.add_argument("--prompts", type=Path, required=True, help="folder of prompts")
        if name != "collect":
            command.add_argument(
                "--layers", type=int_list, default=_BEST_LAYERS, help="that the head reads (default: 20)"
            )
            command.add_argument(
                "--requests", type=int, metavar="N", help="so many of the collected (default: all)"
            )
            add_output_flag(command)
        if name == "collect":
            command.add_argument("--seconds", type=float, default=90.0, help="of serving")
            command.add_argument("--slots", type=int, default=16, help="requests that run at once")
            command.add_argument(
                "--max-tokens", type=int, default=192, help="where answers are cut (default: 192)"
            )
        if name == "heads":
            command.add_argument(
                "--cases",
                type=_case_list,
                default=_CASES,
                metavar="NAME,...",
                help=f"of {', '.join(_CASES)} (default: all)",
            )
        if name == "live":
            command.add_argument("--trace", type=Path, help="CSV whose arrival times are taken")
            command.add_argument("--served", type=int, metavar="N", help="so many (default: the second half)")
            command.add_argument("--loads", type=float_list, default=(0.94, 1.0), help="shares of saturation")
        if name in ("live", "overhead"):
            command.add_argument("--slots", type=int, default=16)
            command.add_argument("--rounds", type=int, default=7 if name == "overhead" else 3)
        if name == "overhead":
            command.add_argument("--new-tokens", type=int, default=100)
        add_engine_flags(command, without=_OWN_OPTIONS)
    return parser


def _read(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], Dataset]:
    """The answers that count, and their states."""
    records = collected(arguments.data)[: arguments.requests]
    data = read_recordings(shards([arguments.data]))
    return records, data.rows(np.isin(data.prompt, [record["prompt"] for record in records]))


def _heads(arguments: argparse.Namespace) -> None:
    results = Results("prediction", host_device(), arguments.output)
    records, data = _read(arguments)
    stopped = sum(record["finish_reason"] == "stop" for record in records)
    results.add(
        "answers", "requests", len(records), "requests", max_tokens=max(r["max_tokens"] for r in records)
    )
    results.add("answers", "stopped", stopped / len(records), "share")
    results.add("answers", "output_tokens", sum(r["output_tokens"] for r in records) / len(records), "tokens")
    results.add("answers", "states", len(data), "rows", layers=data.layers)
    chosen = TrainingOptions(layers=arguments.layers)
    named = f"head, layers {_names(arguments.layers)}"
    variants: dict[str, list[tuple[str, Dataset, TrainingOptions]]] = {
        "chosen": [(named, data, chosen)],
        "mlp": [(f"{named}, MLP of 256 and 64", data, dataclasses.replace(chosen, widths=(256, 64)))],
        "layers": [
            (f"head, layers {_names(layers)}", data, dataclasses.replace(chosen, layers=layers))
            for layers in (*((layer,) for layer in data.layers), data.layers)
            if layers != arguments.layers
        ],
        "controls": [
            (f"{named}, no states", dataclasses.replace(data, states=np.zeros_like(data.states)), chosen),
            (f"{named}, shuffled", data, dataclasses.replace(chosen, shuffles_labels=True)),
        ],
    }
    for case in arguments.cases:
        for name, seen, options in variants[case]:
            report_head(results, name, data, cross_validated(seen, options))


def _case_list(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in _CASES:
            raise argparse.ArgumentTypeError(f"{name!r}: must be one of {', '.join(_CASES)}")
    return names


def _names(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


def _service(arguments: argparse.Namespace) -> None:
    records, data = _read(arguments)
    judged = cross_validated(data, TrainingOptions(layers=arguments.layers))
    config = EngineConfig()
    tokenizer = load_tokenizer(resolve_model(config.model.model, config.cache_dir), None)
    texts = questions(arguments.prompts)
    asked: list[Asked] = []
    for record in records:
        question = texts[record["index"]]
        rows = np.flatnonzero(data.prompt == record["prompt"])
        rows = rows[np.argsort(data.generated[rows])]
        asked.append(
            Asked(
                prompt_token_ids=prompt_ids(tokenizer, question),
                client=question.source,
                max_tokens=record["max_tokens"],
                output_tokens=record["output_tokens"],
                stopped=record["finish_reason"] == "stop",
                probes=[(int(data.generated[row]), judged.log_quantiles[row].tolist()) for row in rows],
            )
        )
    report_service(Results("prediction", host_device(), arguments.output), asked)


def _overhead(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    _, data = _read(arguments)
    head, _ = train(data, TrainingOptions(layers=arguments.layers))
    path = arguments.data / "length_head"
    save_head(head, path)
    results = Results("prediction", jax_device(), arguments.output)
    measure(results, path, arguments.slots, arguments.new_tokens, arguments.rounds, options)


if __name__ == "__main__":
    raise SystemExit(main())
