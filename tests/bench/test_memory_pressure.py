"""The bench on memory pressure, small."""

from __future__ import annotations

import pytest

from bench.memory_pressure import Meter, goodput, pages_for, slo_share
from bench.memory_pressure import main as bench
from jaxserve.core.plan import Bucket, ScheduledRow, StepPlan, StepRows
from jaxserve.core.updates import SchedulerStats
from jaxserve.simulator.measures import RequestTimes
from jaxserve.simulator.trace import TraceRequest


def test_goodput_is_the_last_good_rate_and_a_part_of_the_next() -> None:
    assert goodput([(1.0, 1.0), (2.0, 0.95), (3.0, 0.85), (4.0, 0.2)]) == pytest.approx(2.5)
    assert goodput([(1.0, 0.5)]) == 0.0
    assert goodput([(1.0, 0.9), (2.0, 0.9)]) == 2.0


def test_measures_by_hand() -> None:
    times = [RequestTimes(0.0, 1.0, 2.0, 11), RequestTimes(0.0, 3.0, 4.0, 11), RequestTimes(0.0, 1.0, 1.0, 1)]
    assert slo_share(times, 2.0, 0.1) == pytest.approx(2 / 3)
    assert slo_share(times, 2.0, 0.09) == pytest.approx(1 / 3)
    trace = [TraceRequest(0.0, 100, 100), TraceRequest(0.0, 400, 300)]  # 158 tokens one quarter, 558 three
    assert pages_for(trace, 8, 2.0) == 1 + int(8 * (158 + 3 * 558) / 4 / 16 / 2.0)
    meter = Meter(2)
    plan = StepPlan(0, StepRows.of([ScheduledRow("a", 0, 23, 1, True)]), Bucket(1, 1))
    stats = SchedulerStats(5, 1, 0, 2, 0, 8, 0, 0, 0)
    meter.add(2.0, plan, stats)
    meter.add(2.0, plan, stats._replace(num_waiting=0))
    assert (meter.seconds, meter.occupied, meter.efficient) == (2.0, 0.5, 1.5)
    meter.add(1.0, plan, stats._replace(num_running=2))  # no slot is free
    assert (meter.seconds, meter.occupied, meter.paged_seconds, meter.paged) == (3.0, 0.75, 2.0, 0.5)


def test_greedy_is_beaten_where_outputs_are_long(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--requests", "120", "--slots", "32", "--output-factor", "8", "--saturated-only"]
    assert bench([*arguments, "--cases", "noisy+host"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"greedy", "predicted-noisy+host"} == {line.split('"case": "')[1].split('"')[0] for line in lines}
