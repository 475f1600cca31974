"""The files that an engine writes as it runs: why it decided what it decided, and a recording to replay."""

from __future__ import annotations

from pathlib import Path

from jaxserve.config import SchedulerConfig
from jaxserve.core.assembly import Assembly
from jaxserve.core.cost_model import StepCost
from jaxserve.core.decision_log import DecisionLog
from jaxserve.engine.recording import Recorder
from jaxserve.errors import ConfigError
from jaxserve.files import JsonLinesFile

_BUFFER_BYTES = 2**16


class Journals:
    """Open files; written on the engine's thread, closed when the engine is."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Opens what the configuration names. Raises ConfigError for a file that cannot be written."""
        self._decisions = _open("decision_log", config.decision_log)
        try:
            self._recording = _open("record", config.record)
        except ConfigError:
            if self._decisions is not None:
                self._decisions.close()
            raise

    def decision_log(self) -> DecisionLog | None:
        return None if self._decisions is None else DecisionLog(self._decisions.write)

    def recorder(self, assembly: Assembly, prior: StepCost, pipeline_depth: int) -> Recorder | None:
        if self._recording is None:
            return None
        return Recorder(self._recording.write, assembly, prior, pipeline_depth)

    def close(self) -> None:
        """May be called twice."""
        for file in (self._decisions, self._recording):
            if file is not None:
                file.close()


def _open(option: str, name: str | None) -> JsonLinesFile | None:
    if name is None:
        return None
    try:
        return JsonLinesFile(Path(name).expanduser(), buffer_bytes=_BUFFER_BYTES)
    except OSError as error:
        raise ConfigError(f"{option}={name!r}: {error.strerror}") from None
