"""`jaxserve pull`: fetch a model before it is needed."""

from __future__ import annotations

from jaxserve.cli.arguments import command_parser
from jaxserve.config import EngineConfig


def main(argv: list[str]) -> int:
    """Fetches the model if it is not here and prints where it is."""
    parser = command_parser("pull", "Fetch a model into the cache folder and print its path.")
    parser.add_argument("name", help="a name of the catalogue, or a hub name like org/name")
    parser.add_argument("--revision", metavar="TEXT", help="hub branch, tag or commit")
    parser.add_argument("--cache-dir", metavar="PATH", help="default: the engine's")
    arguments = parser.parse_args(argv)
    config = EngineConfig.from_flat({} if arguments.cache_dir is None else {"cache_dir": arguments.cache_dir})
    from jaxserve.loading.source import resolve_model

    print(resolve_model(arguments.name, config.cache_dir, arguments.revision).path)
    return 0
