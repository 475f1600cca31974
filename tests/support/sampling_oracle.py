"""What sampling means, in numpy float64, one row at a time and with sorting, unlike the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def edited_logits(
    logits: Floats,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    stop_ids: Sequence[int] = (),
) -> Floats:
    """Logits after penalties, bias and masked stop tokens."""
    edited = logits.copy()
    for token in {*prompt, *output}:
        edited[token] = (
            edited[token] / repetition_penalty if edited[token] > 0 else edited[token] * repetition_penalty
        )
    for token in set(output):
        edited[token] -= frequency_penalty * list(output).count(token) + presence_penalty
    for token, bias in (logit_bias or {}).items():
        edited[token] += bias
    if len(output) < min_tokens:
        edited[list(stop_ids)] = -np.inf
    return edited


def kept_tokens(
    logits: Floats, *, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> set[int]:
    """Which tokens may be drawn; tokens that tie with the last one kept are kept."""
    probabilities = softmax(logits / temperature)
    order = [int(token) for token in np.argsort(-logits, kind="stable")]
    order = [token for token in order if probabilities[token] >= min_p * probabilities.max()]
    order = [token for token in order if logits[token] > -np.inf]
    if 0 < top_k < len(order):
        order = [token for token in order if logits[token] >= logits[order[top_k - 1]]]
    if top_p < 1.0:
        mass = np.cumsum(probabilities[order]) / probabilities[order].sum()
        last = order[int(np.argmax(mass >= top_p))]
        order = [token for token in order if logits[token] >= logits[last]]
    return set(order)


def distribution(logits: Floats, **filters: float) -> Floats:
    """The probabilities that a draw follows."""
    temperature = filters.get("temperature", 1.0)
    kept = sorted(kept_tokens(logits, **filters))  # type: ignore[arg-type]
    probabilities = np.zeros_like(logits)
    probabilities[kept] = softmax(logits[kept] / temperature)
    return probabilities


def softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
