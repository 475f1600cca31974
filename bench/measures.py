"""The measures of the benches: those of `jaxserve.simulator.measures`, taken from an engine's outputs."""

from __future__ import annotations

from jaxserve.outputs import RequestOutput
from jaxserve.simulator.measures import RequestTimes as RequestTimes
from jaxserve.simulator.measures import inter_token_latencies as inter_token_latencies
from jaxserve.simulator.measures import percentile as percentile
from jaxserve.simulator.measures import present as present
from jaxserve.simulator.measures import steady_throughput as steady_throughput
from jaxserve.simulator.measures import summary as summary
from jaxserve.simulator.measures import throughput as throughput


def request_times(output: RequestOutput) -> RequestTimes:
    """The times of one completion, on the engine's clock. Raises ValueError if it did not run to its end."""
    metrics, completion = output.metrics, output.outputs[0]
    if metrics.first_token_time is None or metrics.finish_time is None:
        reason, error = completion.finish_reason, completion.error
        raise ValueError(f"{output.request_id} did not run to its end: {reason}, {error}")
    return RequestTimes(
        metrics.arrival_time, metrics.first_token_time, metrics.finish_time, len(completion.token_ids)
    )
