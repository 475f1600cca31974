"""`jaxserve train-predictor`: a length head from hidden states that were recorded while serving."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxserve.cli.arguments import CommandParser, command_parser
from jaxserve.config import EngineConfig


def main(argv: list[str]) -> int:
    """Trains, says what was reached, and prints the file's path."""
    arguments = _parser().parse_args(argv)
    options = {} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir}
    config = EngineConfig.from_flat(options)
    from jaxserve.runner.length_head import head_places, save_head
    from jaxserve.runner.length_training import CANDIDATES, TrainingOptions, read_recordings, train_best

    data = read_recordings(arguments.data)
    training = TrainingOptions(layers=arguments.layers, epochs=arguments.epochs, seed=arguments.seed)
    candidates = CANDIDATES if arguments.widths is None else [arguments.widths]
    head = train_best(data, training, print, candidates=candidates)
    path = arguments.output or head_places(None, config.cache_dir, head.model)[0]
    save_head(head, path)
    print(f"hidden layers: {', '.join(map(str, head.training['widths'])) or 'none'}")
    for name in ("requests", "rows", "test_mae_tokens", "survival_mae_tokens", "test_upper_coverage"):
        if name in head.training:
            print(f"{name}: {head.training[name]:.4g}")
    print(path)
    return 0


def _parser() -> CommandParser:
    parser = command_parser(
        "train-predictor", "Train a predictor of output lengths from recordings made with --record-hidden."
    )
    parser.add_argument("data", nargs="+", type=Path, metavar="FOLDER", help="given to --record-hidden")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: in the cache folder, where the engine finds it"
    )
    parser.add_argument(
        "--widths",
        type=_ints,
        metavar="N,N,...",
        help="hidden layers (default: none, or 256,64 if that does better)",
    )
    parser.add_argument(
        "--layers", type=_ints, metavar="N,N,...", help="whose states to read (default: all recorded)"
    )
    parser.add_argument(
        "--epochs", type=_positive, default=100, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--cache-dir", metavar="PATH", help="default: the engine's")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _ints(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(_positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers like 512,64") from None
    return numbers
