"""`jaxserve convert`: a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path

from jaxserve.cli.arguments import command_parser
from jaxserve.config import EngineConfig


def main(argv: list[str]) -> int:
    """Converts and prints the new folder's path."""
    parser = command_parser(
        "convert", "Write a model as an Orbax checkpoint, which loads straight to devices, or as safetensors."
    )
    parser.add_argument("source", metavar="SRC", help="catalogue name, .gguf file, folder, or hub name")
    parser.add_argument("target", metavar="DST", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--to", choices=("orbax", "safetensors"), help="default: orbax, or safetensors from Orbax"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="precision of the weights written (default: %(default)s)",
    )
    parser.add_argument("--revision", metavar="TEXT", help="hub branch, tag or commit")
    parser.add_argument(
        "--cache-dir", metavar="PATH", help="where fetched models are kept; default: the engine's"
    )
    arguments = parser.parse_args(argv)
    config = EngineConfig.from_flat({} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir})
    from jaxserve.loading.convert import convert
    from jaxserve.loading.source import resolve_model

    source = resolve_model(arguments.source, config.cache_dir, arguments.revision)
    print(convert(source, arguments.target, arguments.dtype, arguments.to).path)
    return 0
