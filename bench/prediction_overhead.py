"""What looking at hidden states costs a decode step: the same engine with and without, alternating."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax

from bench.results import Results
from jaxserve import LLM, SamplingParams
from jaxserve.core.probing import Probe
from jaxserve.runner.model_runner import ModelRunner

_PROMPT = "Tell me a very long story about a fox."
_LAUNCHES = 200


def measure(
    results: Results, head: Path, slots: int, new_tokens: int, rounds: int, options: dict[str, Any]
) -> None:
    """Emits seconds of a step with and without probes, and what a probe itself takes.

    Args:
        head: made by `jaxserve train-predictor`.
        slots: rows of a step.
        new_tokens: of each request.
        rounds: runs of each engine, alternating; the first of each is not counted.
    """
    common: dict[str, Any] = {"max_num_seqs": slots, "max_model_len": 1024, "use_tqdm": False, **options}
    cases: dict[str, dict[str, Any]] = {
        "mean": {"length_predictor": "mean"},
        "fused and head": {"length_predictor": "fused", "length_head": str(head)},
    }
    llms = {case: LLM(**common, **more) for case, more in cases.items()}
    try:
        step_ms: dict[str, list[float]] = {case: [] for case in cases}
        for turn in range(rounds + 1):
            for case, llm in llms.items():
                seconds = _decode_step_s(llm, slots, new_tokens)
                if turn:
                    step_ms[case].append(1e3 * seconds)
        for case, values in step_ms.items():
            results.add_repeats(f"{slots} slots, {case}", "step_ms", values, "ms")
        pairs = zip(step_ms["fused and head"], step_ms["mean"], strict=True)
        results.add_repeats(
            f"{slots} slots", "step_time_ratio", [with_it / without for with_it, without in pairs], "ratio"
        )
        _measure_probe(results, llms["fused and head"], slots, statistics.median(step_ms["mean"]))
    finally:
        for llm in llms.values():
            llm.close()


def _decode_step_s(llm: LLM, slots: int, new_tokens: int) -> float:
    """Seconds of a step that decodes all slots: the difference of a long and a short run, over its steps."""
    took: list[float] = []
    for count in (new_tokens, 2):
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([_PROMPT] * slots, params, use_tqdm=False)
        took.append(time.perf_counter() - start)
    return (took[0] - took[1]) / (new_tokens - 2)


def _measure_probe(results: Results, llm: LLM, slots: int, step_ms: float) -> None:
    """A probe of every slot, alone on the device, waited for; and how many there were."""
    core: Any = llm.engine.loop.core
    runner: ModelRunner = core._executor
    probes = [Probe(slot, 10, 10) for slot in range(slots)]
    took: list[float] = []
    for _ in range(_LAUNCHES):
        start = time.perf_counter()
        handle = runner.launch_probe(probes)
        jax.block_until_ready(handle.log_remaining)
        took.append(1e3 * (time.perf_counter() - start))
    stats = llm.engine.stats()
    launches = stats["length_prediction"]["launches"] / stats["num_steps"]
    results.add_repeats(f"{slots} slots", "probe_ms", took, "ms")
    results.add(f"{slots} slots", "probes_launched", launches, "per step")
    share = statistics.median(took) * launches / step_ms
    results.add(f"{slots} slots", "probe_share_of_step", share, "share")
    results.add(f"{slots} slots", "predict_stage_ms", stats["stage_ms_per_step"]["predict"], "ms per step")
    results.add(f"{slots} slots", "learn_stage_ms", stats["stage_ms_per_step"]["learn"], "ms per step")
