from __future__ import annotations

import numpy as np
import pytest

from bench.measures import (
    RequestTimes,
    inter_token_latencies,
    percentile,
    request_times,
    steady_throughput,
    summary,
    throughput,
)
from jaxserve.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_definitions_by_hand() -> None:
    one = RequestTimes(submitted=10.0, first_token=10.5, finished=12.5, output_tokens=5)
    assert (one.ttft, one.e2e, one.tpot) == (0.5, 2.5, 0.5)
    assert RequestTimes(0.0, 1.0, 1.0, 1).tpot is None
    other = RequestTimes(11.0, 11.25, 14.0, 11)
    assert throughput([one, other]) == 16 / 4.0
    metrics = summary([one, other])
    assert metrics["output_tok_s"] == (4.0, "tokens/s")
    assert metrics["ttft_mean_s"] == (0.375, "s")
    assert metrics["tpot_p50_ms"] == (pytest.approx(1e3 * (0.5 + 0.275) / 2), "ms")
    assert metrics["e2e_p50_s"] == (2.75, "s")


def test_steady_throughput_leaves_out_both_ends() -> None:
    times = [RequestTimes(10.0, 11.0, 20.0, 1)]
    token_times = [(10.5, 100), (11.0, 3), (15.0, 4), (19.0, 1), (19.5, 100)]
    assert steady_throughput(token_times, times) == 8 / 8.0


def test_a_run_of_single_tokens_has_no_tpot() -> None:
    assert summary([RequestTimes(0.0, 1.0, 1.0, 1)])["tpot_p99_ms"] == (0.0, "ms")


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(3).exponential(size=101).tolist()
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == np.percentile(values, percent)
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([], 50) == 0.0


def test_gaps_between_chunks() -> None:
    assert inter_token_latencies([1.0, 1.5, 3.5]) == [0.5, 2.0]
    assert inter_token_latencies([1.0]) == []


def test_an_unfinished_request_has_no_times() -> None:
    completion = CompletionOutput(0, token_ids=[1, 2], error="it broke")
    output = RequestOutput("r", None, [1], [completion], True, RequestMetrics(0.0, 0.1, 0.2, None))
    with pytest.raises(ValueError, match="r did not run to its end: None, it broke"):
        request_times(output)
    done = RequestOutput("r", None, [1], [completion], True, RequestMetrics(0.0, 0.1, 0.2, 0.9))
    assert request_times(done) == (0.0, 0.2, 0.9, 2)
