"""Seconds from starting a process to the first token of an answer, with a cold and a warm compile cache.

    python bench/startup.py --model smollm2-135m-instruct

Each run is a fresh ``jaxserve chat``, timed from outside until its first byte on stdout. For the ``cold``
case the cache folder is a new one that links to the models of the real one but has no compiled programs;
the ``warm`` case runs again with the folder that the cold run left. Flags that this script does not know go
to ``jaxserve chat``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.results import Results, add_output_flag, jax_device
from jaxserve.config import EngineConfig

_COMPILED = "xla"  # where the engine keeps compiled programs, below its cache folder


def seconds_to_first_byte(cache: Path, message: str, flags: list[str]) -> float:
    """Runs one chat to its end; returns when its answer began. Raises RuntimeError if there was none."""
    command = [sys.executable, "-m", "jaxserve.cli.main", "chat", message, "--max-tokens", "4"]
    command += ["--cache-dir", str(cache), *flags]
    with tempfile.TemporaryFile() as errors:  # progress bars: nobody reads them while we wait for stdout
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode or not first:
            errors.seek(0)
            why = errors.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {why}")
    return seconds


def link_models(source: Path, target: Path) -> None:
    """Makes ``target`` a cache folder with everything that ``source`` has, but for compiled programs."""
    for entry in source.iterdir() if source.is_dir() else ():
        if entry.name != _COMPILED:
            (target / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())


def main(argv: list[str] | None = None) -> int:
    """Measures a cold start, and then warm ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cache-dir", type=Path, help="where the models are (default: the engine's own)")
    parser.add_argument("--message", default="What is the capital of France?")
    parser.add_argument("--repeats", type=int, default=3, help="warm starts (default: 3)")
    add_output_flag(parser)
    args, flags = parser.parse_known_args(argv)
    source = args.cache_dir or EngineConfig().cache_dir
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        link_models(source, cache)
        cold = seconds_to_first_byte(cache, args.message, flags)
        warm = [seconds_to_first_byte(cache, args.message, flags) for _ in range(args.repeats)]
    results = Results("startup", jax_device(), args.output)
    results.add("cold", "first_token_s", cold, "s")
    results.add_repeats("warm", "first_token_s", warm, "s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
