"""What is asked of the engine: prompts and forced output lengths, from real data or drawn with a seed.

Real data are read where they lie (``--traces FOLDER``): request traces as ``NAME.csv.gz`` with the columns
``arrival_s, prompt_tokens, output_tokens``, and prompts as ``prompts/NAME.jsonl.gz`` with a ``prompt`` each.
Without them lengths and prompts are synthetic; a workload's name says which it is.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.results import ROOT
from jaxserve.errors import ConfigError
from jaxserve.simulator.trace import TraceRequest, read_trace

DEFAULT_TRACES = ROOT.parent / "shared" / "traces"
CONVERSATION = "azure2023_conv"
_PROMPT_FILES = ("gpteacher", "humaneval", "arena_hard")
# Stands in for azure2023_conv where that is missing: medians, and sigmas of the logarithm.
_SYNTHETIC_PROMPT = (1014.0, 1.0)
_SYNTHETIC_OUTPUT = (115.0, 1.0)
_SYNTHETIC_RATE = 5.89  # its requests per second


class Encoder(Protocol):
    """What makes token ids of texts, e.g. `jaxserve.loading.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, /) -> list[int]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One request to make. With a temperature, tokens are drawn by its place in the workload as a seed.

    Attributes:
        output_tokens: that are generated, whatever the model would say; at most, if it ``stops``.
        stops: whether the answer ends where the model ends it.
    """

    prompt_token_ids: list[int]
    output_tokens: int
    arrival_s: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    stops: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests, in order of arrival."""

    name: str
    items: list[Item]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(item.prompt_token_ids) + item.output_tokens for item in self.items)

    @property
    def output_tokens(self) -> int:
        return sum(item.output_tokens for item in self.items)


def find_traces(folder: Path | None) -> Path | None:
    """The folder of real data: the one given, else the usual place if there is one. Raises ConfigError."""
    if folder is None:
        return DEFAULT_TRACES if DEFAULT_TRACES.is_dir() else None
    if not folder.is_dir():
        raise ConfigError(f"traces={folder}: there is no such folder")
    return folder


def read_prompts(path: Path) -> list[str]:
    """The distinct prompts of a file, in order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(dict.fromkeys(json.loads(line)["prompt"] for line in file))


def scaled(length: float, k: float) -> int:
    """A length divided by k, rounded, at least 1."""
    return max(1, round(length / k))


def uniform_lengths(low: int, high: int, count: int, seed: int) -> list[int]:
    """Output lengths drawn from U(low, high), both ends included."""
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(count)]


class PromptSource:
    """Prompts of any length: real ones by a seeded draw where there are any, else random token ids."""

    def __init__(self, encoder: Encoder, traces: Path | None, seed: int) -> None:
        self._encoder = encoder
        self._rng = random.Random(seed)
        self._texts: list[str] = []
        if traces is not None:
            paths = [traces / "prompts" / f"{name}.jsonl.gz" for name in _PROMPT_FILES]
            self._texts = [text for path in paths if path.is_file() for text in read_prompts(path)]

    @property
    def is_real(self) -> bool:
        return bool(self._texts)

    def natural(self, most_tokens: int) -> list[int]:
        """One prompt as it is, but no longer than ``most_tokens``."""
        if not self._texts:
            return self._random_ids(self._rng.randint(min(8, most_tokens), min(64, most_tokens)))
        while not (ids := self._encoder.encode(self._rng.choice(self._texts))):
            continue
        return ids[:most_tokens]

    def exactly(self, num_tokens: int) -> list[int]:
        """As many prompts, one after the other, as make ``num_tokens`` tokens."""
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += self.natural(num_tokens - len(ids))
        return ids

    def _random_ids(self, count: int) -> list[int]:
        # From 256 up in a vocabulary that has so many: ordinary tokens where special ones come first.
        first = 256 if self._encoder.vocab_size > 512 else 0
        return [self._rng.randrange(first, self._encoder.vocab_size) for _ in range(count)]


def uniform_workload(
    prompts: PromptSource, outputs: tuple[int, int], count: int, seed: int, most_prompt_tokens: int
) -> Workload:
    """Outputs U(low, high), prompts as they come; all at once, or at the times of `with_poisson_arrivals`."""
    lengths = uniform_lengths(*outputs, count, seed)
    items = [Item(prompts.natural(most_prompt_tokens), length) for length in lengths]
    return Workload(f"uniform-{outputs[0]}-{outputs[1]}" + ("" if prompts.is_real else "-synthetic"), items)


def conversation_workload(
    prompts: PromptSource,
    traces: Path | None,
    count: int,
    seed: int,
    *,
    prompt_scale: float,
    output_scale: float,
) -> Workload:
    """Lengths and arrival times of the Azure conversation trace, lengths divided by the scales."""
    path = None if traces is None else traces / f"{CONVERSATION}.csv.gz"
    is_real = path is not None and path.is_file()
    rows = read_trace(path, count) if path is not None and is_real else synthetic_trace(count, seed)
    items = [
        Item(
            prompts.exactly(scaled(row.prompt_tokens, prompt_scale)),
            scaled(row.output_tokens, output_scale),
            row.arrival_s,
        )
        for row in rows
    ]
    return Workload("azure-conv" if is_real else "azure-conv-synthetic", items)


def synthetic_trace(count: int, seed: int) -> list[TraceRequest]:
    """Poisson arrivals and log-normal lengths that resemble the Azure conversation trace."""
    rng = random.Random(seed)

    def draw(median: float, sigma: float, most: int) -> int:
        return max(1, min(most, round(median * rng.lognormvariate(0.0, sigma))))

    now, rows = 0.0, list[TraceRequest]()
    for _ in range(count):
        rows.append(TraceRequest(now, draw(*_SYNTHETIC_PROMPT, 4096), draw(*_SYNTHETIC_OUTPUT, 800)))
        now += rng.expovariate(_SYNTHETIC_RATE)
    return rows


def with_poisson_arrivals(workload: Workload, rate: float, seed: int) -> Workload:
    """The same requests at a mean of ``rate`` a second, independent of each other."""
    rng = random.Random(seed)
    now, items = 0.0, list[Item]()
    for item in workload.items:
        items.append(dataclasses.replace(item, arrival_s=now))
        now += rng.expovariate(rate)
    return dataclasses.replace(workload, items=items)


def stretched(workload: Workload, rate: float) -> Workload:
    """The same arrival pattern, times multiplied by one factor so that the mean rate is ``rate`` a second."""
    items: Sequence[Item] = workload.items
    span = items[-1].arrival_s - items[0].arrival_s
    factor = (len(items) - 1) / rate / span if span > 0 else 0.0
    moved = [dataclasses.replace(i, arrival_s=(i.arrival_s - items[0].arrival_s) * factor) for i in items]
    return dataclasses.replace(workload, items=moved)


def at_once(workload: Workload) -> Workload:
    """The same requests, all there from the start."""
    return dataclasses.replace(
        workload, items=[dataclasses.replace(item, arrival_s=0.0) for item in workload.items]
    )
