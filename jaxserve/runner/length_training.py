"""Trains a length head on recordings of hidden states (`jaxserve.engine.hidden_recording`).

Requests are divided by the digest of their prompt, so that no prompt is in two parts: 70 % to learn from,
15 % to stop early by, 15 % to judge by. The loss is the pinball loss of each quantile on
``log(1 + remaining)``; a request that was cut only says that it would have been longer, so that it costs what
the prediction lacks, and nothing beyond (a one-sided loss). Same data and seed, same head.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ConfigError
from jaxserve.runner.length_head import (
    QUANTILES,
    HeadParams,
    LengthHead,
    counts,
    init_params,
    log_remaining,
)

RECORDING_FORMAT = "1"
# Hidden layers to try: with few requests a linear probe is better, with thousands a small MLP
# (docs/prediction.md).
CANDIDATES: Final[tuple[tuple[int, ...], ...]] = ((), (256, 64))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How a head is trained.

    Attributes:
        widths: of the hidden layers; none: a linear probe, which needs fewer requests (`train_best`).
        layers: whose states to read, of those recorded; None: all.
        learning_rate: at its largest; a cosine takes it to zero.
        weight_decay: AdamW's.
        dropout: share of the inputs that a batch does not see.
        batch_size: rows.
        epochs: at most.
        patience: epochs without a better loss on the second part, after which training ends.
        seed: of the initial weights, batches and dropout.
        shuffles_labels: deals out lengths at random: what is learnt then is what the data say without the
            states. For tests of the pipeline.
    """

    widths: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.3
    batch_size: int = 256
    epochs: int = 100
    patience: int = 10
    seed: int = 0
    shuffles_labels: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Dataset:
    """States and what came after them.

    Attributes:
        model: identity of the model that was served.
        layers: whose states they are.
        states: float16 [rows, layers, D].
        generated, prompt_tokens, remaining: int32 [rows]; ``remaining`` of a request that was cut is what it
            had until then.
        room: int32 [rows], tokens that its ``max_tokens`` left it. For judging what was served, not to learn
            from.
        stopped: bool [rows], whether the request ended by itself.
        request: int64 [rows], equal for rows of one request.
        prompt: int64 [rows], equal for equal prompts.
    """

    model: str
    layers: tuple[int, ...]
    states: npt.NDArray[Any]
    generated: npt.NDArray[Any]
    prompt_tokens: npt.NDArray[Any]
    remaining: npt.NDArray[Any]
    room: npt.NDArray[Any]
    stopped: npt.NDArray[Any]
    request: npt.NDArray[Any]
    prompt: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.generated)

    def rows(self, chosen: npt.NDArray[Any]) -> Dataset:
        """Some of the rows."""
        arrays = {
            field.name: getattr(self, field.name)[chosen]
            for field in dataclasses.fields(self)
            if field.name not in ("model", "layers")
        }
        return dataclasses.replace(self, **arrays)

    def with_layers(self, layers: Sequence[int]) -> Dataset:
        """The states of some layers only. Raises ConfigError for one that was not recorded."""
        for layer in layers:
            if layer not in self.layers:
                raise ConfigError(f"layers={tuple(layers)}: recorded were {self.layers}")
        columns = [self.layers.index(layer) for layer in layers]
        return dataclasses.replace(self, layers=tuple(layers), states=self.states[:, columns])

    @property
    def counts(self) -> npt.NDArray[Any]:
        return counts(self.generated, self.prompt_tokens)

    @property
    def log_remaining(self) -> npt.NDArray[Any]:
        return np.log1p(self.remaining).astype(np.float32)


class Parts(NamedTuple):
    """A data set divided by prompt."""

    train: Dataset
    validation: Dataset
    test: Dataset


def read_recordings(folders: Iterable[Path]) -> Dataset:
    """All shards of some folders as one data set.

    Raises:
        ConfigError: if there are none, or they are of different models or layers.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("shard-*.safetensors"))]
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    metadata: dict[str, str] = {}
    num_requests = 0
    for path in paths:
        found, arrays = _read_shard(path)
        if metadata and found != metadata:
            raise ConfigError(f"{path}: of another model, layers or format than {paths[0]}")
        metadata = found
        request = arrays["request"]
        length = arrays["output_tokens"][request]
        values = {
            "states": arrays["states"],
            "generated": arrays["generated"],
            "prompt_tokens": arrays["prompt_tokens"][request],
            "remaining": length - arrays["generated"],
            "room": arrays["max_tokens"][request] - arrays["generated"],
            "stopped": arrays["stopped"][request] > 0,
            "request": request.astype(np.int64) + num_requests,
            "prompt": arrays["prompt"][request],
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        num_requests += len(arrays["prompt"])
    if not paths:
        raise ConfigError("data: no shards; record some with --record-hidden FOLDER")
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return Dataset(metadata["model"], tuple(json.loads(metadata["layers"])), **joined)


def _read_shard(path: Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a recording ({error})") from None
    if metadata.get("format") != RECORDING_FORMAT:
        raise ConfigError(f"{path}: not a recording of this version")
    return metadata, arrays


def divided(data: Dataset, shares: tuple[float, float] = (0.70, 0.15), rotation: float = 0.0) -> Parts:
    """By prompt: the same prompt is always in the same part.

    Args:
        shares: of the first two parts.
        rotation: in [0, 1), turns which prompts are in which part, for cross-validation.
    """
    # Digests are spread evenly over 64 bits.
    place = (data.prompt.astype(np.uint64).astype(np.float64) / 2.0**64 + rotation) % 1.0
    first, second = shares[0], sum(shares)
    return Parts(
        data.rows(place < first),
        data.rows((place >= first) & (place < second)),
        data.rows(place >= second),
    )


def loss(predicted: jax.Array, target: jax.Array, stopped: jax.Array) -> jax.Array:
    """Mean pinball loss over rows and quantiles; rows that were cut cost what lies below their target.

    Args:
        predicted: float32 [n, 3].
        target: float32 [n], log(1 + remaining).
        stopped: bool [n].
    """
    levels = jnp.array(QUANTILES)[None]
    lacking = target[:, None] - predicted
    whole = jnp.maximum(levels * lacking, (levels - 1.0) * lacking)
    cut = levels * jnp.maximum(lacking, 0.0)
    return jnp.mean(jnp.where(stopped[:, None], whole, cut))


def train(
    data: Dataset,
    options: TrainingOptions,
    report: Callable[[str], object] = lambda line: None,
    *,
    divide: Callable[[Dataset], Parts] = divided,
) -> tuple[LengthHead, Parts]:
    """Trains a head; returns it with the parts that the data were divided into.

    Args:
        report: is given a line an epoch.
        divide: the data into parts.

    Raises:
        ConfigError: if there are too few requests, or layers that were not recorded.
    """
    if options.layers is not None:
        data = data.with_layers(options.layers)
    if options.shuffles_labels:
        data = _with_shuffled_lengths(data, options.seed)
    parts = divide(data)
    for name, part in zip(Parts._fields, parts, strict=True):
        if len(part) == 0:
            raise ConfigError(f"data: {len(np.unique(data.request))} requests leave none for {name}")
    params, history = _fit(parts, options, report)
    training = {
        **{name: value for name, value in dataclasses.asdict(options).items() if name != "layers"},
        "requests": len(np.unique(data.request)),
        "rows": len(data),
        "epochs_run": len(history),
        "validation_loss": min(history),
        **judge(params, parts),
    }
    return LengthHead(data.layers, jax.tree.map(np.asarray, params), data.model, training), parts


def train_best(
    data: Dataset,
    options: TrainingOptions,
    report: Callable[[str], object] = lambda line: None,
    *,
    candidates: Sequence[tuple[int, ...]] = CANDIDATES,
) -> LengthHead:
    """The head of the widths that do best on the part that training ends by. Raises as `train`.

    Args:
        candidates: widths to try instead of the options'.
    """
    heads: list[LengthHead] = []
    for widths in candidates:
        report(f"hidden layers: {', '.join(map(str, widths)) or 'none'}")
        heads.append(train(data, dataclasses.replace(options, widths=widths), report)[0])
    return min(heads, key=lambda head: head.training["validation_loss"])


def _fit(
    parts: Parts, options: TrainingOptions, report: Callable[[str], object]
) -> tuple[HeadParams, list[float]]:
    train_set = parts.train
    state_size = train_set.states.shape[1] * train_set.states.shape[2]
    key = jax.random.key(options.seed)
    key, drawn = jax.random.split(key)
    params = init_params(drawn, state_size, options.widths)
    # Starts at the median: what is left to learn is who differs from it, and how.
    last = len(params) // 2 - 1
    middle = float(np.median(train_set.log_remaining))
    params[f"{last}.bias"] = params[f"{last}.bias"].at[1].set(middle)
    batch = min(options.batch_size, len(train_set))
    num_batches = max(len(train_set) // batch, 1)
    schedule = optax.cosine_decay_schedule(options.learning_rate, options.epochs * num_batches)
    optimizer = optax.adamw(schedule, weight_decay=options.weight_decay)
    update = jax.jit(functools.partial(_update, optimizer, options.dropout))
    evaluate = jax.jit(lambda p, s, c, t, w: loss(log_remaining(p, s, c), t, w))
    state = optimizer.init(params)
    best, best_params, history = np.inf, params, list[float]()
    rng = np.random.default_rng(options.seed)
    held = parts.validation
    held_arrays = (held.states, held.counts, held.log_remaining, held.stopped)
    columns = (train_set.states, train_set.counts, train_set.log_remaining, train_set.stopped)
    since_best = 0
    for epoch in range(options.epochs):
        order = rng.permutation(len(train_set))
        for start in range(0, num_batches * batch, batch):
            chosen = order[start : start + batch]
            key, drawn = jax.random.split(key)
            params, state = update(params, state, drawn, *(column[chosen] for column in columns))
        history.append(float(evaluate(params, *held_arrays)))
        report(f"epoch {epoch + 1}: validation loss {history[-1]:.4f}")
        if history[-1] < best:
            best, best_params, since_best = history[-1], params, 0
        else:
            since_best += 1
            if since_best >= options.patience:
                break
    return best_params, history


def _update(
    optimizer: optax.GradientTransformation,
    dropout: float,
    params: HeadParams,
    state: optax.OptState,
    key: jax.Array,
    states: jax.Array,
    token_counts: jax.Array,
    target: jax.Array,
    stopped: jax.Array,
) -> tuple[HeadParams, optax.OptState]:
    kept = jax.random.bernoulli(key, 1.0 - dropout, states.shape)
    seen = jnp.where(kept, states.astype(jnp.float32) / (1.0 - dropout), 0.0)
    grads = jax.grad(lambda p: loss(log_remaining(p, seen, token_counts), target, stopped))(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, whatever this process allows
        updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state  # type: ignore[return-value]


def predict(params: Mapping[str, Any], data: Dataset) -> npt.NDArray[Any]:
    """Quantiles of remaining tokens, float32 [rows, 3]."""
    found = jax.jit(log_remaining)(dict(params), data.states, data.counts)
    return np.expm1(np.asarray(found))


def judge(params: Mapping[str, Any], parts: Parts) -> dict[str, float]:
    """What a head does on the part that it has not seen, beside what the survivors' median does.

    In tokens, of lengths as they were served: a request that was cut had what it had, and both are clipped to
    what its limit left.
    """
    test = parts.test
    quantiles = np.minimum(predict(params, test), test.room[:, None])
    baseline = np.minimum(survival_medians(parts.train, test.generated), test.room)
    return {
        "test_mae_tokens": float(np.mean(np.abs(quantiles[:, 1] - test.remaining))),
        "survival_mae_tokens": float(np.mean(np.abs(baseline - test.remaining))),
        "test_upper_coverage": float(np.mean(test.remaining <= quantiles[:, 2])),
    }


def survival_medians(data: Dataset, generated: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Median of what remained after ``generated`` tokens of those requests that came so far, float64 [n].

    Args:
        data: requests to learn from; each counts once, with its own length.
        generated: tokens that are there, int [n].
    """
    _, first = np.unique(data.request, return_index=True)
    lengths = np.sort((data.generated + data.remaining)[first])
    medians = {
        t: statistics.median(beyond - t) if len(beyond := lengths[lengths > t]) else 1.0
        for t in set(generated.tolist())
    }
    return np.array([medians[t] for t in generated.tolist()], np.float64)


def _with_shuffled_lengths(data: Dataset, seed: int) -> Dataset:
    """Every request keeps its states and gets the remaining length of another row of the same progress."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(data))
    for t in np.unique(data.generated):
        rows = np.flatnonzero(data.generated == t)
        order[rows] = rng.permutation(rows)
    return dataclasses.replace(
        data, remaining=data.remaining[order], room=data.room[order], stopped=data.stopped[order]
    )
