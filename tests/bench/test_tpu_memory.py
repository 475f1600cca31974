"""What `bench/tpu_memory.py` calls a failure; nothing is compiled."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import pytest

from bench import tpu_memory
from jaxserve.core.buckets import BucketLadder
from jaxserve.core.plan import Bucket
from jaxserve.platforms.tpu import CHIPS
from jaxserve.runner.ahead_of_time import StepReport

CHIP = CHIPS["v6e"]
GOOD = StepReport(
    bucket=Bucket(8, 8),
    compile_s=1.0,
    argument_bytes=CHIP.hbm_bytes - 100,
    temporary_bytes=100,
    aliased_bytes=0,
    lost_donations=0,
    collectives={},
    cache_copies=0,
    host_transfers=0,
    custom_calls={"tpu_custom_call": 2},
)
LADDER = BucketLadder(decode_rows=(64,), mixed_tokens=(512,), mixed_rows=64, decode_steps=8)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Plays libtpu's part: ``report`` is of every step that ``error`` is not raised for."""
    fake = types.SimpleNamespace(report=GOOD, error=None)

    def compile_steps(*_: Any) -> Any:
        if fake.error is not None:
            raise fake.error
        return types.SimpleNamespace(step=lambda bucket: bucket)

    resolved = types.SimpleNamespace(
        ladder=LADDER, num_pages=9, layout=types.SimpleNamespace(dtype="bfloat16")
    )
    device = types.SimpleNamespace(device_kind=CHIP.device_kind)
    monkeypatch.setattr(tpu_memory, "topology_devices", lambda topology: [device])
    monkeypatch.setattr(tpu_memory, "plan_engine", lambda *_: (None, resolved))
    monkeypatch.setattr(tpu_memory, "compile_steps", compile_steps)
    monkeypatch.setattr(tpu_memory, "report_step", lambda *_: fake.report)
    return fake


def test_steps_with_no_fault_succeed(compiler: types.SimpleNamespace, capsys) -> None:
    assert tpu_memory.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.count('"cache_copies"') == 3, "decode, loop and mixed"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_copies": 2}, "2 copies of a cache"),
        ({"lost_donations": 1}, "1 donated arrays not written over"),
        ({"host_transfers": 3}, "3 host transfers"),
        ({"temporary_bytes": 100 + 2**30}, "needs 32.24 GiB of 31.24"),
    ],
)
def test_each_fault_fails_and_is_named(
    changes: dict[str, int], message: str, compiler: types.SimpleNamespace, capsys
) -> None:
    compiler.report = dataclasses.replace(GOOD, **changes)
    assert tpu_memory.main([]) == 1
    start = "tpu_memory: compiled, not run: 1 of v6e:2x2: "
    assert capsys.readouterr().err.splitlines() == [
        f"{start}{case}: {message}" for case in ("decode_64", "decode_64_k8", "mixed_512")
    ]


def test_what_the_compiler_refuses_as_too_large_fails(compiler: types.SimpleNamespace, capsys) -> None:
    compiler.error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: used 40G of 31.24G\nmore")
    assert tpu_memory.main([]) == 1
    assert "decode_64: RESOURCE_EXHAUSTED: used 40G of 31.24G\n" in capsys.readouterr().err
    compiler.error = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        tpu_memory.main([])
