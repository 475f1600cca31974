"""How an implementation is picked, and what is refused before any runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.dispatch import NoImplementationError, Operation
from jaxserve.pallas_kernels.layout import KVPages
from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention

HERE = __name__


def double(x: int) -> int:
    return 2 * x


def only_even(x: int) -> int:
    if x % 2:
        raise NotImplementedError(f"x={x}: must be even")
    return x // 2


def never(x: int) -> int:
    raise NotImplementedError("never")


def broken(x: int) -> int:
    raise TypeError("a bug")


@pytest.fixture
def operation(monkeypatch: pytest.MonkeyPatch) -> Operation:
    functions = {"double": double, "only_even": only_even, "never": never, "broken": broken}
    monkeypatch.setattr(Operation, "_load", lambda self, name: functions[name])
    order = {"cpu": ("only_even", "double"), "gpu": ("never", "only_even"), "tpu": ("broken", "double")}
    return Operation("halve", dict.fromkeys(functions, ""), order)


def test_auto_takes_the_first_that_accepts(operation: Operation) -> None:
    assert operation(10, implementation="auto", platform="cpu") == 5
    assert operation(11, implementation="auto", platform="cpu") == 22
    assert operation(10, implementation="auto", platform="gpu") == 5


def test_the_choice_is_logged_once_with_what_was_refused(
    operation: Operation, caplog: pytest.LogCaptureFixture
) -> None:
    operation = dataclasses.replace(operation, name="another")
    with caplog.at_level("INFO"):
        for _ in range(2):
            operation(12, implementation="auto", platform="gpu")
            operation(12, implementation="double", platform="gpu")
    assert [record.getMessage() for record in caplog.records] == ["another on gpu: only_even (never)"]


def test_all_refusals_come_in_one_group(operation: Operation) -> None:
    with pytest.raises(NoImplementationError, match="no implementation of halve on gpu") as caught:
        operation(11, implementation="auto", platform="gpu")
    assert [str(refusal) for refusal in caught.value.exceptions] == ["never", "x=11: must be even"]
    assert caught.value.exceptions[1].__notes__ == ["from the 'only_even' implementation of halve"]


def test_a_name_never_falls_back(operation: Operation) -> None:
    with pytest.raises(NotImplementedError, match="x=11: must be even"):
        operation(11, implementation="only_even", platform="cpu")


def test_a_bug_is_not_a_refusal(operation: Operation) -> None:
    with pytest.raises(TypeError, match="a bug"):
        operation(11, implementation="auto", platform="tpu")


def arguments(**changes: Any) -> dict[str, Any]:
    """A step of two rows and four tokens."""
    metadata = AttentionMetadata(
        page_table=jnp.zeros((2, 3), jnp.int32),
        kv_lens=jnp.array([5, 1], jnp.int32),
        cu_q_lens=jnp.array([0, 3, 4], jnp.int32),
        max_q_len=3,
    )
    fields = {field.name for field in dataclasses.fields(AttentionMetadata)}
    metadata = dataclasses.replace(metadata, **{n: v for n, v in changes.items() if n in fields})
    given: dict[str, Any] = {
        "q": jnp.zeros((4, 6, 8)),
        "k": jnp.zeros((4, 2, 8)),
        "v": jnp.zeros((4, 2, 8)),
        "kv_pages": jnp.zeros((7, 16, 4, 8)),
        "scale": 1.0,
        "implementation": "reference",
    }
    return given | {n: v for n, v in changes.items() if n not in fields} | {"metadata": metadata}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((4, 48))}, r"q has shape \(4, 48\): must be \[tokens, heads, head_dim\]"),
        ({"q": jnp.zeros((4, 6, 8), jnp.int32)}, "q is int32: must be float32, bfloat16 or float16"),
        ({"q": jnp.zeros((4, 5, 8))}, "q has 5 heads: must be a multiple of the 2 kv heads"),
        ({"k": jnp.zeros((4, 3, 8))}, r"k has shape \(4, 3, 8\): must be \(4, 2, 8\)"),
        ({"v": jnp.zeros((3, 2, 8))}, r"v has shape \(3, 2, 8\): must be \(4, 2, 8\)"),
        ({"kv_pages": jnp.zeros((7, 16, 4, 24))}, r"kv_pages has shape \(7, 16, 4, 24\), for heads of 8 "),
        (
            {"kv_pages": KVPages(jnp.zeros((7, 16, 4, 24)), None, 24)},
            "kv_pages holds heads of 24 elements: q has 8",
        ),
        ({"kv_pages": jnp.zeros((7, 16, 32))}, "kv_pages has shape"),
        ({"kv_pages": jnp.zeros((7, 16, 4, 8), jnp.int8)}, "kv_pages is int8: must have scales"),
        ({"kv_lens": jnp.zeros(2)}, r"kv_lens is float32\[2\]: must be int32 with 1 axes"),
        ({"kv_lens": jnp.zeros(3, jnp.int32)}, "kv_lens says 3 rows, so 3 and 4"),
        ({"cu_q_lens": jnp.zeros(2, jnp.int32)}, "cu_q_lens 2 entries: kv_lens says 2 rows, so 2 and 3"),
        ({"max_q_len": 0}, r"max_q_len=0: must be in \[1, 4\]"),
        ({"max_q_len": 5}, r"max_q_len=5: must be in \[1, 4\]"),
        ({"scale": float("nan")}, "scale=nan: must be finite"),
        ({"sliding_window": 0}, "sliding_window=0: must be at least 1, or None"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0: must be positive and finite, or None"),
        (
            {"implementation": "cuda"},
            "implementation='cuda': ragged_paged_attention has auto, reference, xla",
        ),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**arguments(**changes))
