"""XLA runs out of memory: at start the message says what to lower, in a step only who ran gets an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cli import main
from jaxserve.core.plan import StepResult
from jaxserve.errors import ConfigError, EngineClosedError
from jaxserve.outputs import RequestOutput
from jaxserve.request import FinishReason
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.programs import Programs
from tests.support.faults import OUT_OF_MEMORY, xla_out_of_memory
from tests.support.small_engine import SMALL_ENGINE

PROMPTS = [[i * 31 % 250 + j for j in range(9)] for i in range(15)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LOWER = "lower memory_fraction or num_pages=200, max_num_seqs=6 or max_num_batched_tokens=32"


# ---------------------------------------------------------------------- at start


@pytest.mark.parametrize("error", [xla_out_of_memory(), MemoryError("23 GiB")], ids=["device", "host"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "jaxserve.engine.build.load_params",
            (
                r"^out of memory while loading the weights \(.*\); lower the precision \(dtype=float32\), "
                "take a smaller model, or spread it over more devices than tensor_parallel_size=1$"
            ),
        ),
        (
            "jaxserve.runner.model_runner._cache_maker",
            (
                r"^out of memory while allocating 200 KV pages, and compiling and running steps that use "
                r"them \(.*\); lower num_pages=200, max_num_seqs=6 or "
                "max_num_batched_tokens=32$"
            ),
        ),
    ],
    ids=["weights", "pages"],
)
def test_at_start_the_message_says_what_to_lower(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, broken: str, message: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(broken, fail)
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(str(checkpoint), **SMALL_ENGINE)
    assert str(error).splitlines()[0] in str(caught.value)
    assert "a table of buffers" not in str(caught.value)
    assert not any(thread.name == "jaxserve-engine" for thread in threading.enumerate())


def test_the_command_line_says_it_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise xla_out_of_memory()

    monkeypatch.setattr(Programs, "__init__", fail)
    argv = ["generate", "x", "--model", str(checkpoint), "--num-pages", "30", "--no-compile-cache"]
    assert main.main(argv) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("jaxserve generate: out of memory while allocating 30 KV pages")
    assert "max_num_batched_tokens=" in last


def test_another_error_of_xla_is_not_called_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(Programs, "__init__", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        LLM(str(checkpoint), **SMALL_ENGINE)


# ---------------------------------------------------------------------- in a step


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **SMALL_ENGINE) as llm:
        yield llm


def answers(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def break_steps(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], *, takes_caches: bool) -> None:
    """Lets steps, counted from 1, fail as XLA does: before the launch, or with the donated caches gone."""
    step, count = Programs.step, iter(range(1, 10_000))

    def broken(self: Programs, *key: Any) -> Callable[..., Any]:
        run = step(self, *key)

        def maybe(params: Any, caches: Any, slots: Any, *rest: Any) -> Any:
            if not fails(next(count)):
                return run(params, caches, slots, *rest)
            if takes_caches:
                for array in jax.tree.leaves((caches, slots)):
                    array.delete()
            raise xla_out_of_memory()

        return maybe

    monkeypatch.setattr(Programs, "step", broken)


def break_results(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Lets the results of steps fail when they are read."""
    collect, count = ModelRunner._collect, iter(range(1, 10_000))

    def broken(self: ModelRunner, handle: Any) -> StepResult:
        if fails(next(count)):
            raise xla_out_of_memory()
        return collect(self, handle)

    monkeypatch.setattr(ModelRunner, "_collect", broken)


@pytest.mark.parametrize("fault", ["before the launch", "with the caches", "when read"])
def test_in_a_step_who_ran_gets_an_error_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    expected = [output.outputs[0].token_ids for output in answers(llm)]
    with monkeypatch.context() as patch:
        if fault == "when read":
            break_results(patch, lambda number: number == 3)
        else:
            break_steps(patch, lambda number: number == 3, takes_caches=fault == "with the caches")
        outputs = [output.outputs[0] for output in answers(llm)]
    failed = [output for output in outputs if output.finish_reason is FinishReason.ERROR]
    assert 1 <= len(failed) <= 6, "no more than have slots"
    for output in failed:
        assert output.error is not None
        assert output.error == (
            f"the device ran out of memory in a step of {output.error.split()[10]} tokens ({OUT_OF_MEMORY}); "
            f"{LOWER}"
        )
    good = [index for index, output in enumerate(outputs) if output.finish_reason is FinishReason.LENGTH]
    assert len(good) + len(failed) == len(PROMPTS)
    assert [outputs[index].token_ids for index in good] == [expected[index] for index in good]
    stats = llm.stats()
    assert (stats["num_used_pages"], stats["compiles_after_warmup"]) == (0, 0)
    llm.engine.loop.core.scheduler.check_integrity()
    assert [output.outputs[0].token_ids for output in answers(llm)] == expected
    assert llm.engine.loop.is_healthy


def test_an_engine_that_can_run_no_step_says_that_it_is_not_ready(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, lambda _: True, takes_caches=True)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS * 3, PARAMS, use_tqdm=False)]
    assert {output.finish_reason for output in outputs} == {FinishReason.ERROR}
    assert all(OUT_OF_MEMORY in str(output.error) and LOWER in str(output.error) for output in outputs)
    assert not llm.engine.loop.is_healthy
    with pytest.raises(EngineClosedError, match=r"the engine failed: .*the device ran out of memory"):
        answers(llm)


def test_another_error_of_a_step_ends_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Programs, *key: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    monkeypatch.setattr(Programs, "step", broken)
    assert {output.outputs[0].finish_reason for output in answers(llm)} == {FinishReason.ERROR}
    with pytest.raises(EngineClosedError, match="INTERNAL: the device is gone"):
        answers(llm)


def test_where_nothing_can_take_the_lost_caches_place_the_engine_ends(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise xla_out_of_memory()

    runner: Any = llm.engine.loop.core._executor
    monkeypatch.setattr(runner, "_make_caches", fail)
    break_steps(monkeypatch, lambda number: number == 1, takes_caches=True)
    assert {output.outputs[0].finish_reason for output in answers(llm)} == {FinishReason.ERROR}
    with pytest.raises(EngineClosedError, match=OUT_OF_MEMORY):
        answers(llm)
