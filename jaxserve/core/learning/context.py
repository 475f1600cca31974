"""What is known of the load when an epoch begins: the bandit's context, and what a guard must bear."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_MEMORY_S = 20.0  # time constant of what fades
_BIN_S = 10.0
_NUM_BINS = 12
_FEWEST_BINS = 3
_NUM_LENGTHS = 512
LOAD_QUANTILE: Final = 0.9

# Where the logarithms are 0: values of an ordinary chat.
_RATE, _PROMPT, _OUTPUT = 4.0, 1024.0, 128.0
_MOST = 2.0

FEATURES: Final = (
    "one", "arrivals", "prompt_tokens", "output_tokens", "kv_occupancy", "queue", "interactive",
)  # fmt: skip


class Context(NamedTuple):
    """The state of an engine at the start of an epoch.

    Attributes:
        arrivals_s: requests a second.
        prompt_tokens, output_tokens: means of recent requests.
        kv_occupancy: share of the KV pages in use.
        num_waiting: requests in the queue.
        interactive_share: of the arrivals, those of priority 0 or less.
    """

    arrivals_s: float
    prompt_tokens: float
    output_tokens: float
    kv_occupancy: float
    num_waiting: int
    interactive_share: float

    def features(self, num_slots: int) -> Float64Array:
        """`FEATURES`: a one, logarithms within [-2, 2], and shares."""
        return np.array(
            [
                1.0,
                _log_ratio(self.arrivals_s, _RATE),
                _log_ratio(self.prompt_tokens, _PROMPT),
                _log_ratio(self.output_tokens, _OUTPUT),
                self.kv_occupancy,
                self.num_waiting / (self.num_waiting + num_slots),
                self.interactive_share,
            ]
        )


def _log_ratio(value: float, unit: float) -> float:
    """Half the binary logarithm of a ratio."""
    return max(-_MOST, min(_MOST, 0.5 * math.log2(max(value, 1e-9) / unit)))


class Load(NamedTuple):
    """A load that recent ones exceed one time in ten.

    Attributes:
        requests_s, prompt_tokens_s: arriving in a second.
        prompt_tokens, prompt_squares: means of a prompt's length and of its square.
        long_prompt: the 99th percentile.
        output_tokens, short_output: mean and lower quartile.
    """

    requests_s: float
    prompt_tokens_s: float
    prompt_tokens: float
    prompt_squares: float
    long_prompt: float
    output_tokens: float
    short_output: float


def quantile(values: npt.ArrayLike, share: float) -> float:
    """As `numpy.quantile`, in a tenth of its time; of one axis, not empty."""
    ordered = np.sort(np.asarray(values, np.float64))
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


class _Fading:
    """A sum whose terms fade with time."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = 0.0

    def add(self, value: float, now: float) -> None:
        self._sum = self.at(now) + value
        self._at = now

    def at(self, now: float) -> float:
        return self._sum * math.exp(-max(0.0, now - self._at) / _MEMORY_S)


@final
class ContextTracker:
    """Is told of arrivals and ends; times are seconds on the engine's clock and never go back."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._arrivals, self._interactive, self._prompts = _Fading(), _Fading(), _Fading()
        self._ends, self._outputs = _Fading(), _Fading()
        self._bins: deque[list[int]] = deque(maxlen=_NUM_BINS + 1)  # number of the bin, requests, tokens
        self._prompt_lengths: deque[int] = deque(maxlen=_NUM_LENGTHS)
        self._output_lengths: deque[int] = deque(maxlen=_NUM_LENGTHS)

    def arrived(self, prompt_tokens: int, priority: int, now: float) -> None:
        if self._start is None:
            self._start = now
        self._arrivals.add(1.0, now)
        self._interactive.add(float(priority <= 0), now)
        self._prompts.add(prompt_tokens, now)
        number = self._bin_of(now, self._start)
        if not self._bins or self._bins[-1][0] != number:
            self._bins.append([number, 0, 0])
        self._bins[-1][1] += 1
        self._bins[-1][2] += prompt_tokens
        self._prompt_lengths.append(prompt_tokens)

    def finished(self, output_tokens: int, now: float) -> None:
        self._ends.add(1.0, now)
        self._outputs.add(output_tokens, now)
        self._output_lengths.append(output_tokens)

    def context(self, now: float, *, kv_occupancy: float, num_waiting: int) -> Context:
        """The context now, from these two and what was told."""
        arrivals, ends = self._arrivals.at(now), self._ends.at(now)
        # At first there has been less time than would fade.
        since = now if self._start is None else self._start
        seen_s = _MEMORY_S * (1.0 - math.exp(-(now - since) / _MEMORY_S))
        return Context(
            arrivals_s=arrivals / seen_s if seen_s > 0.0 else 0.0,
            prompt_tokens=self._prompts.at(now) / arrivals if arrivals > 0.0 else 0.0,
            output_tokens=self._outputs.at(now) / ends if ends > 0.0 else 0.0,
            kv_occupancy=kv_occupancy,
            num_waiting=num_waiting,
            interactive_share=self._interactive.at(now) / arrivals if arrivals > 0.0 else 0.0,
        )

    def load(self, now: float) -> Load | None:
        """The 90 % quantile of the last two minutes' load; None while too little is known."""
        if self._start is None or not self._output_lengths:
            return None
        current = self._bin_of(now, self._start)  # not over yet
        first = max(0, current - _NUM_BINS)
        if current - first < _FEWEST_BINS:
            return None
        counts, tokens = np.zeros((2, current - first))
        for number, count, prompt_tokens in self._bins:
            if first <= number < current:
                counts[number - first], tokens[number - first] = count, prompt_tokens
        prompts, outputs = np.array(self._prompt_lengths, np.float64), np.array(self._output_lengths)
        return Load(
            requests_s=quantile(counts, LOAD_QUANTILE) / _BIN_S,
            prompt_tokens_s=quantile(tokens, LOAD_QUANTILE) / _BIN_S,
            prompt_tokens=float(prompts.mean()),
            prompt_squares=float((prompts**2).mean()),
            long_prompt=quantile(prompts, 0.99),
            output_tokens=float(outputs.mean()),
            short_output=quantile(outputs, 0.25),
        )

    @staticmethod
    def _bin_of(now: float, start: float) -> int:
        return int((now - start) // _BIN_S)
