"""A disk that is full: what an engine writes on the side ends with a whole line, and the engine goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import LearningConfig, SchedulerConfig
from jaxserve.core.cost_model import UnknownDevice
from jaxserve.core.learning.setup import make_tuner
from jaxserve.engine.hidden_recording import HiddenRecorder
from jaxserve.engine.journals import Journals
from jaxserve.engine.learning import LearningLog
from jaxserve.engine.recording import read_recording
from jaxserve.errors import StorageError
from jaxserve.files import JsonLinesFile, whole_file, write_safetensors
from jaxserve.request import FinishReason
from jaxserve.simulator.replay import replay
from tests.support.engine_parts import ManualClock, make_core, make_request, run_to_end
from tests.support.fake_executor import expected_tokens
from tests.support.faults import files_of_at_most, names_in

FULL = "File too large"


def records_in(path: Path) -> list[dict[str, Any]]:
    """Fails for half a line."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("buffer_bytes", [0, 300])
def test_lines_are_whole_and_the_file_ends_where_the_disk_does(
    tmp_path: Path, buffer_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    records = [{"number": number} for number in range(100)]
    lines = JsonLinesFile(path, buffer_bytes=buffer_bytes)
    with files_of_at_most(1000):
        for record in records:
            lines.write(record)
    lines.write({"number": "after it failed"})
    lines.close()
    lines.close()
    kept = records_in(path)
    assert kept == records[: len(kept)]
    assert 1000 - 30 - buffer_bytes < path.stat().st_size <= 1000
    assert caplog.messages == [f"{path}: {FULL}; it ends here, and the engine goes on"]


def test_what_is_left_in_the_buffer_comes_with_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = JsonLinesFile(path, buffer_bytes=10_000)
    lines.write({"a": "é"})
    assert path.read_bytes() == b""
    lines.close()
    assert records_in(path) == [{"a": "é"}]
    longer = JsonLinesFile(path, keep=path.stat().st_size)
    longer.write({"b": 2})
    longer.close()
    assert records_in(path) == [{"a": "é"}, {"b": 2}]


def test_an_engine_outlives_its_recording_and_its_decision_log(tmp_path: Path) -> None:
    config = SchedulerConfig(decision_log=str(tmp_path / "why"), record=str(tmp_path / "run"))
    journals, prior = Journals(config), UnknownDevice()
    core, _ = make_core(
        num_slots=4,
        decision_log=journals.decision_log(),
        recorder=lambda assembly: journals.recorder(assembly, prior, 1),  # type: ignore[arg-type,return-value]
    )
    requests = [make_request(f"r{i}", range(i, i + 9), 30, seed=i) for i in range(120)]
    with files_of_at_most(80_000):
        for request in requests:
            core.add(request)
        run_to_end(core, check=False)
        journals.close()
    for request in requests:
        assert request.output_token_ids == expected_tokens(list(request.prompt_token_ids), request.seed, 30)
    assert 10_000 < (tmp_path / "run").stat().st_size <= 80_000
    recorded = read_recording(tmp_path / "run")
    assert recorded[-1]["e"] != "header"
    records_in(tmp_path / "why")


def test_a_recording_that_ended_early_is_replayed_up_to_there(tmp_path: Path) -> None:
    journals, prior = Journals(SchedulerConfig(record=str(tmp_path / "run"))), UnknownDevice()
    clock = ManualClock()
    core, fake = make_core(
        num_slots=4,
        clock=clock,
        pipeline_depth=0,
        recorder=lambda assembly: journals.recorder(assembly, prior, 0),  # type: ignore[arg-type,return-value]
    )
    for index in range(4):
        core.add(make_request(f"r{index}", range(index, index + 9), 30, seed=index))
    for _ in range(10):
        core.step()
    journals.close()
    whole = read_recording(tmp_path / "run")
    last_done = max(i for i, record in enumerate(whole) if record["e"] == "done")
    found = replay(whole[: last_done + 1])
    assert (found.num_steps, found.first_difference) == (len(fake.batches), None)


def test_an_engine_learns_on_without_its_log_and_the_log_can_be_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "log", ManualClock()
    config = LearningConfig(learning="on", learning_log=str(path), learning_epoch_s=1.0)
    log = LearningLog(config)
    core, _ = make_core(
        clock=clock,
        tuner=lambda assembly, costs: make_tuner(
            config, assembly, costs, meter=None, records=log.records, write=log.write, seed=0
        ),
    )
    header_bytes = path.stat().st_size
    with files_of_at_most(header_bytes + 6000):
        for index in range(20):
            core.add(make_request(f"r{index}", range(9), 20, arrival=clock.now))
            while core.has_work:
                clock.now += 0.1
                core.step()
        log.close()
    stats = core.learning_stats()
    assert stats is not None
    written = records_in(path)
    assert stats["epochs"] > len(written) - 1 >= 1
    assert caplog.text.count(f"{path}: {FULL}") == 1
    again = LearningLog(config)
    assert again.records == written
    again.close()


def test_hidden_states_that_find_no_room_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = HiddenRecorder(tmp_path / "states", "model", (1,))

    def record(name: str) -> None:
        request = make_request(name, [1, 2], 4)
        recorder.probed(request, 1, np.zeros((1, 4096), np.float16))
        request.output_token_ids += [3, 4]
        request.finish_reason = FinishReason.LENGTH
        recorder.finished(request)
        recorder.step_done()

    record("first")
    with files_of_at_most(5000):
        recorder._write()
        record("second")
    recorder.close()
    assert names_in(tmp_path / "states") == []
    assert caplog.text.count("hidden states are recorded no longer") == 1
    assert FULL in caplog.text


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    write_safetensors({"a": np.arange(3)}, path, {"is": "old"})
    before = path.read_bytes()
    with files_of_at_most(1000), pytest.raises(StorageError, match=f"^{path}: cannot be written: .*{FULL}"):
        write_safetensors({"a": np.arange(3000)}, path, {})
    with (
        files_of_at_most(1000),
        pytest.raises(StorageError, match=f"^{path}: cannot be written: {FULL}$"),
        whole_file(path) as scratch,
    ):
        scratch.write_text("x" * 2000)
    with pytest.raises(KeyError), whole_file(path) as scratch:
        scratch.write_text("half")
        raise KeyError
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["head.safetensors"]
    missing = tmp_path / "no" / "file"
    with pytest.raises(StorageError, match="cannot be written: No such file"), whole_file(missing) as scratch:
        scratch.write_text("x")
