"""What the numbers mean. One definition of each, used by the simulator and by every bench.

- TTFT: first token - submission. E2E: last token (under static batching: the batch's end) - submission.
- TPOT: (E2E - TTFT) / (output tokens - 1), per request; a request of one token has none.
- ITL: the gaps between the chunks of a stream.
- Output throughput: output tokens / (last end - first submission), prefill included.
- Steady throughput: the same in the middle of the run, its first and last tenth of time left out: filling up
  and draining weigh more the shorter a benchmark is, and nothing in a service that goes on.
- Percentiles interpolate linearly between the two nearest values, as `numpy.percentile` does; those of gaps
  that are counted (ITL in the simulator) take the nearest value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_STEADY_MARGIN = 0.1


class RequestTimes(NamedTuple):
    """One finished request, in seconds on one clock."""

    submitted: float
    first_token: float
    finished: float
    output_tokens: int

    @property
    def ttft(self) -> float:
        return self.first_token - self.submitted

    @property
    def e2e(self) -> float:
        return self.finished - self.submitted

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first, or None where there is only one."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile; 0 for no values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def weighted_percentile(gaps: Sequence[tuple[float, int]], percent: float) -> float:
    """A percentile of values that come with counts; 0 for none."""
    if not gaps:
        return 0.0
    table = np.array(gaps)
    table = table[np.argsort(table[:, 0])]
    cumulated = np.cumsum(table[:, 1])
    if cumulated[-1] <= 0:
        return 0.0
    index = np.searchsorted(cumulated, percent / 100 * cumulated[-1])
    return float(table[min(int(index), len(table) - 1), 0])


def inter_token_latencies(chunk_times: Sequence[float]) -> list[float]:
    """The gaps between the arrival times of a stream's chunks."""
    return [after - before for before, after in itertools.pairwise(chunk_times)]


def throughput(times: Sequence[RequestTimes]) -> float:
    """Output tokens per second of a whole run."""
    seconds = max(t.finished for t in times) - min(t.submitted for t in times)
    return sum(t.output_tokens for t in times) / seconds


def steady_throughput(token_times: Sequence[tuple[float, int]], times: Sequence[RequestTimes]) -> float:
    """Output tokens per second of a run without the first and last tenth of its time.

    Args:
        token_times: (time, number of tokens that came then).
        times: of the run's requests, on the same clock.
    """
    first, last = min(t.submitted for t in times), max(t.finished for t in times)
    margin = _STEADY_MARGIN * (last - first)
    count = sum(tokens for time, tokens in token_times if first + margin <= time <= last - margin)
    return count / (last - first - 2 * margin)


def summary(times: Sequence[RequestTimes]) -> dict[str, tuple[float, str]]:
    """A run's metrics: name -> (value, unit)."""
    ttft, e2e = [t.ttft for t in times], [t.e2e for t in times]
    tpot_ms = [1e3 * t for t in present(t.tpot for t in times)]
    return {
        "output_tok_s": (throughput(times), "tokens/s"),
        "ttft_mean_s": (sum(ttft) / len(ttft), "s"),
        "ttft_p50_s": (percentile(ttft, 50), "s"),
        "ttft_p99_s": (percentile(ttft, 99), "s"),
        "tpot_p50_ms": (percentile(tpot_ms, 50), "ms"),
        "tpot_p99_ms": (percentile(tpot_ms, 99), "ms"),
        "e2e_p50_s": (percentile(e2e, 50), "s"),
        "e2e_p99_s": (percentile(e2e, 99), "s"),
    }


def present(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]
