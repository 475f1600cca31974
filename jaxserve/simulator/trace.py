"""Request traces: arrival times and lengths, from files or drawn with a seed."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from jaxserve.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens
_FORMATS = "must be .csv or .jsonl, plain or .gz"


class TraceRequest(NamedTuple):
    """One request of a trace.

    ``block_hashes`` has a number for each block of ``block_size`` tokens of the prompt, the last perhaps not
    full: equal numbers at one place mean equal prompts up to the end of that block. Prompts without any have
    nothing in common with others.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: str = ""
    priority: int = 0
    block_hashes: tuple[int, ...] = ()
    block_size: int = MOONCAKE_BLOCK


def read_trace(path: Path, most: int | None = None) -> list[TraceRequest]:
    """The first ``most`` requests of a trace (default: all), in order of arrival.

    CSV has the columns ``arrival_s, prompt_tokens, output_tokens`` (Azure's traces as published, renamed);
    JSON lines have ``timestamp`` (ms), ``input_length``, ``output_length`` and perhaps ``hash_ids``
    (Mooncake), or the CSV's names.
    Optional in both: ``client``, ``priority``.

    Raises:
        ConfigError: for a file that is missing or has another format.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".jsonl")):
        raise ConfigError(f"trace {path}: {_FORMATS}")
    try:
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            rows = _csv_rows(file) if name.endswith(".csv") else _json_rows(file)  # type: ignore[arg-type]
            requests = [row for row, _ in zip(rows, range(2**31 if most is None else most), strict=False)]
    except KeyError as error:
        raise ConfigError(f"trace {path}: has no column {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"trace {path}: {type(error).__name__}: {error}") from None
    return sorted(requests, key=lambda request: request.arrival_s)


def _csv_rows(file: TextIO) -> Iterator[TraceRequest]:
    return (_named_row(row) for row in csv.DictReader(file))


def _json_rows(file: TextIO) -> Iterator[TraceRequest]:
    for line in file:
        row = json.loads(line)
        if "timestamp" in row:
            yield TraceRequest(
                row["timestamp"] / 1e3,
                row["input_length"],
                row["output_length"],
                block_hashes=tuple(map(int, row.get("hash_ids", ()))),
            )
        else:
            yield _named_row(row)


def _named_row(row: dict[str, str]) -> TraceRequest:
    prompt, output = int(row["prompt_tokens"]), int(row["output_tokens"])
    client, priority = row.get("client") or "", int(row.get("priority") or 0)
    return TraceRequest(float(row["arrival_s"]), max(1, prompt), max(1, output), client, priority)


def repeated(trace: Sequence[TraceRequest], count: int) -> list[TraceRequest]:
    """The first ``count`` requests of the trace played again and again."""
    if not trace:
        raise ConfigError("trace: has no requests")
    period_s = (trace[-1].arrival_s - trace[0].arrival_s) * len(trace) / max(1, len(trace) - 1)
    return [
        trace[i % len(trace)]._replace(arrival_s=trace[i % len(trace)].arrival_s + i // len(trace) * period_s)
        for i in range(count)
    ]


def at_rate(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same pattern from time 0, times multiplied by one factor: the mean rate is ``rate`` a second."""
    start, span = trace[0].arrival_s, trace[-1].arrival_s - trace[0].arrival_s
    factor = (len(trace) - 1) / rate / span if span > 0 else 0.0
    return [request._replace(arrival_s=(request.arrival_s - start) * factor) for request in trace]


def at_once(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The same requests, all there from the start."""
    return [request._replace(arrival_s=0.0) for request in trace]


def poisson(trace: Sequence[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """The same requests at a mean of ``rate`` a second, independent of each other."""
    rng, now, moved = random.Random(seed), 0.0, list[TraceRequest]()
    for request in trace:
        moved.append(request._replace(arrival_s=now))
        now += rng.expovariate(rate)
    return moved


def uniform(prompts: tuple[int, int], outputs: tuple[int, int], count: int, seed: int) -> list[TraceRequest]:
    """Prompt and output lengths U(low, high), both ends included; all at once."""
    rng = random.Random(seed)
    return [TraceRequest(0.0, rng.randint(*prompts), rng.randint(*outputs)) for _ in range(count)]
