"""Policies from files of the user's own, by `FILE.py:CLASS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest

from jaxserve.config import EngineConfig, SchedulerConfig
from jaxserve.core.decision_log import DecisionLog
from jaxserve.core.policies import registry
from jaxserve.core.policies.own import METHODS, own_class, own_option
from jaxserve.core.policies.presets import policy_options
from jaxserve.errors import ConfigError
from tests.support.engine_parts import make_core, make_request, run_to_end

FILE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass(slots=True)
class Weighted:
    weight: float

    @classmethod
    def from_context(cls, context):
        return cls(context.config.max_wait_s)

    def key(self, request, now):
        return (-self.weight * request.num_prompt_tokens,)

class Ordering:
    def key(self, request, now):
        return (-request.num_prompt_tokens,)

class Admission:
    holds_slots = False
    def quota(self, view):
        return min(1, view.num_free_slots)

class Capacity:
    def has_room(self, view, request, num_pages):
        return num_pages <= view.num_available and not view.running

class Composition:
    def prefill_tokens(self, view):
        return min(2, view.budget_left)

class Victim:
    def choose(self, running):
        return running[0]

class Nothing:
    pass

class Particular:
    def __init__(self, weight):
        self.weight = weight
    key = Ordering.key

function = len
"""
KINDS = {
    "ordering": "Ordering",
    "batching": "Admission",
    "capacity": "Capacity",
    "composition": "Composition",
    "victim": "Victim",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_every_kind_may_come_from_a_file(file: Path) -> None:
    names: dict[str, Any] = {option: f"{file}:{kind}" for option, kind in KINDS.items()}
    assert {option: own_option(name) for option, name in names.items()} == {name: name for name in METHODS}
    assert [policy_options(name) for name in names.values()] == [{o: name} for o, name in names.items()]
    core, fake = make_core(num_slots=2, num_pages=9, **names)
    for name, length in (("short", 2), ("long", 9), ("middle", 5)):
        core.add(make_request(name, range(length), max_tokens=3))
    run_to_end(core)
    plans = [batch.plan for batch in fake.batches]
    assert [a.request_id for plan in plans for a in plan.admissions] == ["long", "middle", "short"]
    assert all(len(plan.rows) == 1 for plan in plans), "its capacity lets one run at a time"
    assert max(row.num_tokens for plan in plans for row in plan.rows) == 2, "its composition gives two tokens"


def test_its_context_is_the_engines_and_a_file_is_run_once(file: Path) -> None:
    name = f"{file}:Weighted"
    log: list[dict[str, Any]] = []
    core, _ = make_core(ordering=name, max_wait_s=3.0, decision_log=DecisionLog(log.append))
    core.add(make_request("request", [1, 2], 1))
    run_to_end(core)
    assert [record["key"] for record in log if record["decision"] == "admit"] == [[-6.0]]
    assert own_class(name) is own_class(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nobody", "no class 'Nobody'"),
        ("function", "no class 'function'"),
        ("Nothing", "has no method 'key'"),
        ("Victim", "has no method 'key'"),
        ("Particular", "no from_context, and .*weight"),
    ],
)
def test_what_is_no_ordering_is_named(name: str, message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_core(ordering=f"{file}:{name}")


def test_files_that_are_missing_or_fail_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ordering=.*: there is no file .*gone\.py"):
        EngineConfig.from_flat({"ordering": f"{tmp_path}/gone.py:Mine"})
    with pytest.raises(ConfigError, match="no such Python file"):
        policy_options(f"{tmp_path}/gone.py:Mine")
    with pytest.raises(ConfigError, match=r"must be FILE\.py:CLASS"):
        own_class(f"{tmp_path}/native.so:Mine")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    for _ in range(2):  # half a module is not kept
        with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named"):
            own_class(f"{broken}:Mine")
    with pytest.raises(ConfigError, match="has no method key, quota"):
        broken.write_text("class Mine: pass")
        own_option(f"{broken}:Mine")


def test_every_option_that_names_a_policy_takes_one() -> None:
    hints = get_type_hints(SchedulerConfig)
    assert set(METHODS) == set(KINDS) <= set(hints)
    assert len(METHODS) == len(registry.REGISTRIES)
