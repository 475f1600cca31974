"""The engine's configuration: frozen, nested, the only place with defaults; `jaxserve` flags are its fields.

``None`` or ``"auto"`` means "let the platform choose"; `jaxserve.runner.resolve` fills every such field once
the model is known, and logs what it chose.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxserve.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "int8", "fp8"]
Batching = Literal["continuous", "static", "dynamic"]
Ordering = Literal["fcfs", "priority", "strict_priority", "sjf", "mlfq", "fair", "lpm", "dlpm", "spf"]
Composition = Literal["chunked", "slo", "phase", "partition"]
Capacity = Literal["watermark", "predicted"]
Victim = Literal["auto", "latest", "least_urgent", "most_remaining", "value"]
# A policy of one's own, by its file and class; `jaxserve.core.policies.own` loads it.
OWN_POLICY = re.compile(r".+\.py:[A-Za-z_]\w*")
Attention = Literal["auto", "reference", "xla", "mosaic_gpu", "triton", "mosaic_tpu"]
Device = Literal["auto", "cpu", "gpu", "tpu"]
Prediction = Literal["mean", "fused"]
Learning = Literal["off", "on", "frozen"]


def _option(default: Any, description: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": description})


def _default_cache_dir() -> Path:
    root = os.environ.get("JAXSERVE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxserve"
    )
    return Path(root).expanduser()


def compile_without_devices() -> None:
    """Tells JAX and libtpu, before they are loaded, that this process only compiles: it looks for no TPU."""
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, in which precision."""

    model: str = _option(
        "smollm2-135m-instruct", "name in the catalogue, local folder, .gguf file, or hub name"
    )
    tokenizer: str | None = _option(None, "folder or tokenizer.json to use instead of the model's own")
    revision: str | None = _option(None, "hub revision (branch, tag or commit) used for every file")
    dtype: DType = _option("auto", "precision of weights and activations, and of KV (see kv_cache_dtype)")
    max_model_len: int | None = _option(
        None, "longest prompt + output in tokens; default: the model's own, as memory allows"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    page_size: int | None = _option(
        None, "tokens in a KV page, a power of two; default: 16, on GPUs 64, on TPUs 128"
    )
    kv_cache_dtype: KVCacheDType = _option(
        "auto",
        "precision of KV: the model's (auto), or 8 bits with a scale for each token and head (fp8 is e4m3)",
    )
    num_pages: int | None = _option(None, "KV pages; default: as many as fit in memory_fraction")
    memory_fraction: float = _option(
        0.9,
        "share of the device's memory to use (on CPU: of a third of what is free, 1 GiB at most)",
    )
    watermark: float = _option(
        0.01, "share of the pages that admission leaves free for running requests to grow"
    )
    host_kv_bytes: int = _option(
        0, "bytes of host memory for KV pages of preempted requests and cold prefixes; 0 computes them again"
    )
    enable_prefix_caching: bool = _option(
        True, "keep the pages of finished requests, and share them with requests that begin alike"
    )
    enable_prefix_preloading: bool = _option(
        False,
        "keep what conversations leave, and load it from the host, for as long as the next turn is likely",
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Who runs when. Each policy is one of the names, or ``FILE.py:CLASS`` of the user's own."""

    batching: Batching | str = _option(
        "continuous", "iteration-level (continuous), fixed batches (static), or windows (dynamic)"
    )
    ordering: Ordering | str = _option("fcfs", "order of the waiting queue")
    composition: Composition | str = _option("chunked", "how much of a step goes to prompts")
    capacity: Capacity | str = _option(
        "watermark", "who may run: whoever fits now (watermark), or while the predicted peak fits (predicted)"
    )
    demand_quantile: float = _option(
        0.75, "predicted: quantile of the page demand that must fit; more admits fewer"
    )
    preempted_target: float = _option(
        0.02, "predicted: preemptions for each request at which its margin rests; 1: there is no margin"
    )
    victim: Victim | str = _option(
        "auto", "who gives up its pages when none is left; auto goes with the ordering"
    )
    max_num_seqs: int | None = _option(None, "slots: requests that run at once")
    max_num_batched_tokens: int | None = _option(None, "token budget of one step; longer prompts are chunked")
    pipeline_depth: int = _option(
        1, "steps launched before their predecessor's result is read; 0 is synchronous"
    )
    max_decode_steps: int = _option(
        1,
        "tokens of a row in one launch while nobody can be admitted; 1: never more; a page's tokens at most",
    )
    batch_window_s: float = _option(0.05, "dynamic batching: seconds to wait for a batch to fill")
    max_queued_requests: int = _option(4096, "waiting requests beyond which new ones are refused")
    max_wait_s: float = _option(
        8.0, "sjf, mlfq, priority, lpm: who has waited so long goes first (7.5 times that for priority > 0)"
    )
    ttft_slo_s: float = _option(1.0, "priority, phase, learning: objective for the time to the first token")
    tpot_slo_s: float = _option(0.05, "slo, phase, learning: objective for the time between tokens")
    decision_log: str | None = _option(None, "file for JSON lines that say why requests run when they run")
    record: str | None = _option(None, "file for a recording that `jaxserve simulate --replay` plays again")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictionConfig:
    """How long answers will be."""

    length_predictor: Prediction = _option(
        "mean",
        "what answers' lengths are predicted from: the mean of those before, or everything that is known "
        "(client, conversation, template, prefix, hidden states) by online error",
    )
    length_head: str | None = _option(
        None,
        "file made by `jaxserve train-predictor`, or none; default: the one made for this model, if any",
    )
    record_hidden: str | None = _option(
        None, "folder for hidden states and lengths, which `jaxserve train-predictor` learns from"
    )
    hidden_layers: tuple[int, ...] | None = _option(
        None, "layers whose states are recorded, counted from 1; default: the last"
    )
    probe_interval: int = _option(20, "output tokens between two looks at a request's hidden state")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """Choosing token budget, ordering and KV pressure while the engine runs."""

    learning: Learning = _option(
        "off", "choose among safe configurations by what they were worth (on), or by what is known (frozen)"
    )
    learning_log: str | None = _option(
        None, "file of every choice and its inputs; one that is there is gone through first, and continued"
    )
    learning_prior: str | None = _option(
        None, "file made by `jaxserve simulate --write-prior`: what configurations are worth, to begin with"
    )
    learning_epoch_s: float = _option(20.0, "seconds that a choice stands")
    reward_ttft_weight: float = _option(0.5, "what the excess of P99 TTFT over ttft_slo_s takes off a reward")
    reward_tpot_weight: float = _option(0.5, "what the excess of P99 TPOT over tpot_slo_s takes off a reward")
    reward_energy_weight: float = _option(
        0.0, "what joules a token, as a share of the usual, take off a reward; needs a meter"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tensor_parallel_size: int = _option(1, "devices that share every layer (heads and FFN columns)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """How steps are compiled and run."""

    device: Device = _option("auto", "platform to run on")
    attention: Attention = _option(
        "auto", "attention implementation; a name that cannot serve the model is an error"
    )
    token_buckets: tuple[int, ...] | None = _option(
        None, "token counts compiled for steps with prefill; the last is max_num_batched_tokens"
    )
    row_buckets: tuple[int, ...] | None = _option(None, "row counts compiled for pure decode steps")
    bundle: Path | None = _option(
        None, "folder made by `jaxserve compile`: its programs and sizes are used, nothing is compiled"
    )
    compile_cache: bool = _option(True, "keep compiled programs in the cache folder for the next start")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    prediction: PredictionConfig = dataclasses.field(default_factory=PredictionConfig)
    learning: LearningConfig = dataclasses.field(default_factory=LearningConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    runner: RunnerConfig = dataclasses.field(default_factory=RunnerConfig)
    seed: int = _option(0, "seed of the seeds drawn for requests that bring none")
    cache_dir: Path = dataclasses.field(
        default_factory=_default_cache_dir,
        metadata={"help": "folder for models and compiled programs (JAXSERVE_CACHE)"},
    )

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_flat(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Builds a config from flat option names, e.g. ``{"dtype": "float32", "max_num_seqs": 8}``.

        Raises:
            ConfigError: for a name that no section has.
        """
        sections = {
            field.name: field.default_factory for field in dataclasses.fields(cls) if field.name in SECTIONS
        }
        values: dict[str, Any] = {}
        rest = dict(options)
        if isinstance(rest.get("model"), os.PathLike):
            rest["model"] = os.fspath(rest["model"])
        if rest.get("bundle") is not None:
            rest["bundle"] = Path(rest["bundle"]).expanduser()
        for name, section in sections.items():
            names = {field.name for field in dataclasses.fields(section)}  # type: ignore[arg-type]
            mine = {key: rest.pop(key) for key in list(rest) if key in names}
            values[name] = section(**mine)  # type: ignore[operator]
        for name in ("seed", "cache_dir"):
            if name in rest:
                values[name] = rest.pop(name)
        if "cache_dir" in values:
            values["cache_dir"] = Path(values["cache_dir"]).expanduser()
        if rest:
            known = sorted(name for name, _ in flat_fields())
            raise ConfigError(f"unknown option {next(iter(rest))!r}; known: {', '.join(known)}")
        return cls(**values)


SECTIONS = ("model", "cache", "scheduler", "prediction", "learning", "parallel", "runner")


def flat_fields() -> list[tuple[str, dataclasses.Field[Any]]]:
    """All options as (name, field), in order; the command line is generated from this."""
    flat: list[tuple[str, dataclasses.Field[Any]]] = []
    for field in dataclasses.fields(EngineConfig):
        if field.name in SECTIONS:
            flat += [(inner.name, inner) for inner in dataclasses.fields(field.default_factory)]  # type: ignore[arg-type]
        else:
            flat.append((field.name, field))
    return flat


def check(config: EngineConfig) -> None:
    """Raises ConfigError for the first value that cannot work on any platform."""
    model, cache, scheduler, prediction, parallel, runner = (
        config.model,
        config.cache,
        config.scheduler,
        config.prediction,
        config.parallel,
        config.runner,
    )
    for name, value, choices in (
        ("dtype", model.dtype, DType),
        ("kv_cache_dtype", cache.kv_cache_dtype, KVCacheDType),
        ("length_predictor", prediction.length_predictor, Prediction),
        ("learning", config.learning.learning, Learning),
        ("attention", runner.attention, Attention),
        ("device", runner.device, Device),
    ):
        _require_choice(name, value, get_args(choices))
    for name, value, choices in (
        ("batching", scheduler.batching, Batching),
        ("ordering", scheduler.ordering, Ordering),
        ("composition", scheduler.composition, Composition),
        ("capacity", scheduler.capacity, Capacity),
        ("victim", scheduler.victim, Victim),
    ):
        _require_policy(name, value, get_args(choices))
    _require(
        isinstance(model.model, str) and bool(model.model),
        "model",
        model.model,
        "must be a non-empty name or path",
    )
    for name, value in (
        ("max_model_len", model.max_model_len),
        ("num_pages", cache.num_pages),
        ("max_num_seqs", scheduler.max_num_seqs),
        ("max_num_batched_tokens", scheduler.max_num_batched_tokens),
        ("max_queued_requests", scheduler.max_queued_requests),
        ("max_decode_steps", scheduler.max_decode_steps),
        ("probe_interval", prediction.probe_interval),
        ("tensor_parallel_size", parallel.tensor_parallel_size),
    ):
        _require(
            value is None or (_is_int(value) and 1 <= value < 2**31),
            name,
            value,
            "must be a positive integer",
        )
    _check_cache(cache)
    _check_scheduler(scheduler)
    _check_learning(config.learning)
    for name, file in (
        ("decision_log", scheduler.decision_log),
        ("record", scheduler.record),
        ("length_head", prediction.length_head),
        ("record_hidden", prediction.record_hidden),
        ("learning_log", config.learning.learning_log),
        ("learning_prior", config.learning.learning_prior),
    ):
        _require(file is None or (isinstance(file, str) and bool(file)), name, file, "must be a path")
    _require_increasing("hidden_layers", prediction.hidden_layers)
    _check_ladders(runner, scheduler.max_num_batched_tokens)


def _check_cache(cache: CacheConfig) -> None:
    size = cache.page_size
    _require(
        size is None or (_is_int(size) and 1 <= size <= 1024 and size & (size - 1) == 0),
        "page_size",
        size,
        "must be a power of two up to 1024",
    )
    for name, share in (("memory_fraction", cache.memory_fraction), ("watermark", cache.watermark)):
        _require(_is_number(share) and 0.0 <= share <= 1.0, name, share, "must be a number in [0, 1]")
    host_bytes = cache.host_kv_bytes
    _require(
        _is_int(host_bytes) and 0 <= host_bytes < 2**50, "host_kv_bytes", host_bytes, "must be in [0, 2**50)"
    )
    for name, flag in (
        ("enable_prefix_caching", cache.enable_prefix_caching),
        ("enable_prefix_preloading", cache.enable_prefix_preloading),
    ):
        _require(isinstance(flag, bool), name, flag, "must be true or false")


def _check_scheduler(scheduler: SchedulerConfig) -> None:
    quantile = scheduler.demand_quantile
    _require(
        _is_number(quantile) and 0.0 < quantile < 1.0,
        "demand_quantile",
        quantile,
        "must be a number in (0, 1)",
    )
    target = scheduler.preempted_target
    _require(
        _is_number(target) and 0.0 < target <= 1.0, "preempted_target", target, "must be a number in (0, 1]"
    )
    _require(
        scheduler.pipeline_depth in (0, 1, 2), "pipeline_depth", scheduler.pipeline_depth, "must be 0, 1 or 2"
    )
    _require(
        _is_number(scheduler.batch_window_s) and 0.0 <= scheduler.batch_window_s <= 3600.0,
        "batch_window_s",
        scheduler.batch_window_s,
        "must be in [0, 3600]",
    )
    for name, seconds in (
        ("max_wait_s", scheduler.max_wait_s),
        ("ttft_slo_s", scheduler.ttft_slo_s),
        ("tpot_slo_s", scheduler.tpot_slo_s),
    ):
        _require(_is_number(seconds) and 0.0 < seconds <= 86400.0, name, seconds, "must be in (0, 86400]")


def _check_learning(learning: LearningConfig) -> None:
    epoch_s = learning.learning_epoch_s
    _require(
        _is_number(epoch_s) and 1.0 <= epoch_s <= 3600.0, "learning_epoch_s", epoch_s, "must be in [1, 3600]"
    )
    for name, weight in (
        ("reward_ttft_weight", learning.reward_ttft_weight),
        ("reward_tpot_weight", learning.reward_tpot_weight),
        ("reward_energy_weight", learning.reward_energy_weight),
    ):
        _require(_is_number(weight) and 0.0 <= weight <= 100.0, name, weight, "must be in [0, 100]")
    _require(
        learning.learning != "frozen" or bool(learning.learning_log or learning.learning_prior),
        "learning",
        learning.learning,
        "needs a learning_log or a learning_prior that says what is known",
    )


def _check_ladders(runner: RunnerConfig, budget: int | None) -> None:
    """Raises ConfigError for buckets that are no ladder, or end elsewhere than the token budget."""
    for name, ladder in (("token_buckets", runner.token_buckets), ("row_buckets", runner.row_buckets)):
        _require_increasing(name, ladder)
    if budget is not None and runner.token_buckets is not None:
        _require(
            runner.token_buckets[-1] == budget,
            "token_buckets",
            runner.token_buckets,
            f"the last must be max_num_batched_tokens={budget}, or one of the two be left out",
        )


def _require_increasing(name: str, numbers: object) -> None:
    good = numbers is None or (
        isinstance(numbers, tuple | list)
        and len(numbers) > 0
        and all(_is_int(n) and n >= 1 for n in numbers)
        and list(numbers) == sorted(set(numbers))
    )
    _require(good, name, numbers, "must be a strictly increasing list of positive integers")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r}: {allowed}")


def _require_policy(name: str, value: object, choices: tuple[str, ...]) -> None:
    if isinstance(value, str) and OWN_POLICY.fullmatch(value):
        file = value.rpartition(":")[0]
        _require(Path(file).expanduser().is_file(), name, value, f"there is no file {file}")
    else:
        _require(value in choices, name, value, f"must be one of {', '.join(choices)}, or FILE.py:CLASS")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, f"must be one of {', '.join(choices)}")
