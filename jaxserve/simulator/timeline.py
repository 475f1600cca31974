"""A timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open: trace-event JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.simulator.executor import SimulatedStep
from jaxserve.simulator.simulation import SimulationResult

_STEPS_THREAD = 0
_US = 1e6


def write_timeline(path: Path, result: SimulationResult) -> None:
    """Writes a run whose steps were kept: a process an engine, a track of steps, and one a slot."""
    finished = {request.id: request for request in result.requests}
    events: list[dict[str, Any]] = []
    for engine, steps in enumerate(result.steps):
        events.append(_name("process_name", engine, _STEPS_THREAD, f"engine {engine}"))
        events.append(_name("thread_name", engine, _STEPS_THREAD, "steps"))
        events += [_step_event(engine, step) for step in steps]
        events += _counter_events(engine, steps)
        for request_id, slot, start, end in _stays(steps):
            request = finished[request_id]
            args = {
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.output_tokens,
                "waited_s": request.first_scheduled - request.arrival,
                "preemptions": request.num_preemptions,
            }
            events.append(_complete(engine, slot + 1, request_id, start, end, args))
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _step_event(engine: int, step: SimulatedStep) -> dict[str, Any]:
    plan = step.plan
    args = {
        "step": plan.step,
        "rows": len(plan.rows),
        "tokens": plan.num_tokens,
        "bucket": f"{plan.bucket.tokens} x {plan.bucket.rows}",
        "decode_steps": plan.num_decode_steps,
        "admitted": [admission.request_id for admission in plan.admissions],
        "preempted": list(plan.preempted_ids),
    }
    name = "decode" if plan.bucket.is_decode else "mixed"
    return _complete(engine, _STEPS_THREAD, name, step.start, step.end, args)


def _counter_events(engine: int, steps: Sequence[SimulatedStep]) -> list[dict[str, Any]]:
    return [
        {
            "ph": "C",
            "name": "rows",
            "pid": engine,
            "ts": _US * step.start,
            "args": {
                "decode": step.plan.num_decodes,
                "prefill": len(step.plan.rows) - step.plan.num_decodes,
            },
        }
        for step in steps
    ]


def _stays(steps: Sequence[SimulatedStep]) -> list[tuple[str, int, float, float]]:
    """(request, slot, start, end) of every stay in a slot; a preempted request has several."""
    open_stays: dict[str, tuple[int, float, float]] = {}
    stays: list[tuple[str, int, float, float]] = []
    for step in steps:
        for request_id in step.plan.preempted_ids:
            slot, start, end = open_stays.pop(request_id)
            stays.append((request_id, slot, start, end))
        for row in step.plan.rows:
            _, start, _ = open_stays.get(row.request_id, (row.slot, step.start, 0.0))
            open_stays[row.request_id] = (row.slot, start, step.end)
    stays += [(request_id, *stay) for request_id, stay in open_stays.items()]
    return stays


def _complete(
    pid: int, tid: int, name: str, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    times = {"ts": _US * start, "dur": _US * (end - start)}
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, **times, "args": args}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
