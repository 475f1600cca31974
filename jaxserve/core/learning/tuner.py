"""Online learning as the engine sees it: told of arrivals, steps and ends, it names an arm every epoch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, final

import numpy as np

from jaxserve.core.cost_model import StepFeatures
from jaxserve.core.learning.arms import Arm
from jaxserve.core.learning.context import FEATURES, ContextTracker, Float64Array, quantile
from jaxserve.core.learning.decider import DEFAULT, Decider, Decision
from jaxserve.core.learning.energy import EnergyMeter
from jaxserve.core.learning.guard import Forecast, Guard
from jaxserve.core.learning.linucb import ArmPrior
from jaxserve.core.learning.reward import EpochMeasures, Objectives
from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, Request

VERSION = 1
MOST_FINISHED = 500  # an epoch ends with so many
FEWEST_COUNTED = 20  # fewer say nothing about a 99th percentile
_MOST_EXTENSION = 3.0  # of an epoch in which little ends
_SERVED: Final = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.DEADLINE)


class QueueState(NamedTuple):
    """What the scheduler knows at the end of an epoch."""

    num_waiting: int
    kv_occupancy: float


class LearningOptions(NamedTuple):
    """How a tuner goes about it.

    Attributes:
        is_frozen: play what is known to be best, and learn nothing.
        epoch_s: seconds that a choice stands.
        seed: of chance.
    """

    is_frozen: bool = False
    epoch_s: float = 20.0
    seed: int = 0


@final
class Tuner:
    """Chooses an arm every epoch. Reads no clock: times come with every call, in seconds on one clock.

    Args:
        arms: the first is what the configuration says.
        guard: says which are safe.
        num_slots: requests that run at once.
        priors: of the arms, from the simulator.
        meter: of energy, if there is one.
        write: takes the header and a record for each epoch (`docs/learning.md`); plain values.
    """

    def __init__(
        self,
        *,
        arms: Sequence[Arm],
        objectives: Objectives,
        guard: Guard,
        num_slots: int,
        options: LearningOptions,
        priors: Sequence[ArmPrior | None] = (),
        meter: EnergyMeter | None = None,
        write: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self._arms = tuple(arms)
        self._objectives = objectives
        self._guard = guard
        self._num_slots = num_slots
        self._options = options
        self._meter = meter
        self._write = write
        self._tracker = ContextTracker()
        self._decider = Decider(len(arms), len(FEATURES), priors=priors, seed=options.seed)
        self._current = DEFAULT
        self._features: Float64Array | None = None  # by which the current arm was chosen
        self._arm_since = -math.inf
        self._epoch: _Epoch | None = None
        self._num_waiting = 0  # at the start of the epoch
        self._joules = _Mean()
        self._counts: Counter[str] = Counter()
        self._plays: Counter[int] = Counter()
        self._wrote_header = False

    @property
    def arm(self) -> Arm:
        """The arm in force."""
        return self._arms[self._current]

    # ------------------------------------------------------------------ what happens

    def arrived(self, request: Request, now: float) -> None:
        """A request joined the queue."""
        self._tracker.arrived(request.num_prompt_tokens, request.priority, now)
        self._running_epoch(now).num_arrived += 1

    def stepped(self, features: StepFeatures, decode_steps: int) -> None:
        """A step's result came."""
        if self._meter is not None:
            self._meter.stepped(features, decode_steps)

    def finished(self, request: Request, now: float) -> None:
        """A request ended; those that the caller gave up, and errors, say nothing about an arm."""
        if request.finish_reason not in _SERVED:
            return
        epoch, output_tokens = self._running_epoch(now), len(request.output_token_ids)
        self._tracker.finished(output_tokens, now)
        epoch.num_finished += 1
        epoch.output_tokens += output_tokens
        if (request.first_scheduled_time or now) < self._arm_since:
            return  # another arm had it first
        end = now if request.finish_time is None else request.finish_time
        first = end if request.first_token_time is None else request.first_token_time
        tpot_s = (end - first) / (output_tokens - 1) if output_tokens > 1 else 0.0
        in_time = request.finish_reason is not FinishReason.DEADLINE
        is_good = in_time and self._objectives.are_met_by(first - request.arrival_time, tpot_s)
        epoch.count(first - request.arrival_time, tpot_s, is_good=is_good)

    def _running_epoch(self, now: float) -> _Epoch:
        if self._epoch is None:
            self._epoch = _Epoch(now, 0.0 if self._meter is None else self._meter.joules(now))
        return self._epoch

    # ------------------------------------------------------------------ choices

    def is_due(self, now: float) -> bool:
        """Whether the epoch is over; asked after every step."""
        epoch = self._epoch
        if epoch is None:
            return False
        if epoch.num_finished >= MOST_FINISHED:
            return True
        seconds, epoch_s = now - epoch.start, self._options.epoch_s
        return seconds >= epoch_s and (
            len(epoch.ttft_s) >= FEWEST_COUNTED or seconds >= _MOST_EXTENSION * epoch_s
        )

    def choose(self, now: float, queue: QueueState) -> Arm:
        """Ends the epoch: learns from it, and returns the arm of the next."""
        epoch, played = self._running_epoch(now), self._current
        joules = None if self._meter is None else self._meter.joules(now)
        measures = epoch.measures(now, joules, num_unserved=max(0, queue.num_waiting - self._num_waiting))
        self._num_waiting = queue.num_waiting
        reward = self._objectives.reward(measures, self._joules.value)
        learns = not self._options.is_frozen and measures.num_counted >= FEWEST_COUNTED
        learns = learns and self._features is not None
        context = self._tracker.context(now, kv_occupancy=queue.kv_occupancy, num_waiting=queue.num_waiting)
        load = self._tracker.load(now)
        forecasts = self._guard.forecasts(self._arms, load) if load is not None else []
        ended = {
            "epoch": self._counts["epochs"],
            "now": now,
            "played": played,
            "played_features": None if self._features is None else self._features.tolist(),
            "measures": measures._asdict(),
            "reward": reward,
            "missed": not self._objectives.are_met_by(measures.ttft_p99_s, measures.tpot_p99_s),
            "learns": learns,
            "frozen": self._options.is_frozen,
            "context": context._asdict(),
            "features": context.features(self._num_slots).tolist(),
            "load": None if load is None else load._asdict(),
            "forecasts": [_finite(forecast) for forecast in forecasts],
            "safe": [arm for arm, forecast in enumerate(forecasts) if self._guard.is_safe(forecast)],
        }
        is_bad, decision = self._advance(ended)
        if not self._wrote_header:
            self._write(self._header())
            self._wrote_header = True
        self._write({**ended, "bad": is_bad, "decision": decision.to_json()})
        if decision.arm != played:
            self._arm_since = now
        self._epoch = _Epoch(now, epoch.joules_at_start + (measures.joules or 0.0))
        return self.arm

    def _advance(self, ended: Mapping[str, Any]) -> tuple[bool, Decision]:
        """Learns and decides, from what the log will hold and nothing else."""
        is_bad, measures = False, EpochMeasures(**ended["measures"])
        if ended["learns"]:
            features = np.array(ended["played_features"])
            is_bad = self._decider.learn(ended["played"], features, ended["reward"], missed=ended["missed"])
            self._joules.add(measures.joules_per_token)
        self._features = np.array(ended["features"])
        decision = self._decider.decide(self._features, ended["safe"], is_frozen=ended["frozen"])
        self._current = decision.arm
        self._counts["epochs"] += 1
        self._counts["learnt"] += ended["learns"]
        self._counts["bad"] += is_bad
        self._counts[decision.reason] += 1
        self._plays[decision.arm] += 1
        return is_bad, decision

    # ------------------------------------------------------------------ the log

    def _header(self) -> dict[str, Any]:
        arms = [arm.to_json() for arm in self._arms]
        return {"version": VERSION, "arms": arms, "features": list(FEATURES), "seed": self._options.seed}

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Goes through a log again, as after a restart.

        `stats` counts the decisions that were not the same (``differing``): any means that priors or the
        program changed. What was learnt counts all the same.

        Raises:
            ConfigError: for a log of other arms, features or seed.
        """
        if not records:
            return
        header = self._header()
        for name, expected in header.items():
            if records[0].get(name) != expected:
                raise ConfigError(
                    f"learning_log: its {name} is {records[0].get(name)!r}, this engine's is {expected!r}; "
                    "name another file"
                )
        for record in records[1:]:
            _, decision = self._advance(record)
            self._counts["differing"] += decision.arm != record["decision"]["arm"]
        self._wrote_header = True
        self._features = None  # of an epoch that never ended

    def stats(self) -> dict[str, Any]:
        """Counters, for people and metrics."""
        counts = self._counts
        names = ("epochs", "learnt", "bad", "best", "explored", "rest", "unsafe", "frozen", "differing")
        return {
            "arm": self.arm.name,
            **{name: counts[name] for name in names},
            "plays": {self._arms[arm].name: plays for arm, plays in sorted(self._plays.items())},
            "joules_per_token": self._joules.value,
            "energy_source": None if self._meter is None else self._meter.source,
        }


class _Epoch:
    """What has been seen since it began."""

    def __init__(self, start: float, joules_at_start: float) -> None:
        self.start = start
        self.joules_at_start = joules_at_start
        self.num_arrived = self.num_finished = self.num_good = self.output_tokens = 0
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []

    def count(self, ttft_s: float, tpot_s: float, *, is_good: bool) -> None:
        self.ttft_s.append(ttft_s)
        self.tpot_s.append(tpot_s)
        self.num_good += is_good

    def measures(self, now: float, joules: float | None, *, num_unserved: int) -> EpochMeasures:
        return EpochMeasures(
            seconds=now - self.start,
            num_arrived=self.num_arrived,
            num_finished=self.num_finished,
            num_unserved=num_unserved,
            num_counted=len(self.ttft_s),
            num_good=self.num_good,
            ttft_p99_s=quantile(self.ttft_s, 0.99) if self.ttft_s else 0.0,
            tpot_p99_s=quantile(self.tpot_s, 0.99) if self.tpot_s else 0.0,
            output_tokens=self.output_tokens,
            joules=None if joules is None else joules - self.joules_at_start,
        )


class _Mean:
    """Of all values so far; None before the first."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def value(self) -> float | None:
        return self._sum / self._count if self._count else None

    def add(self, value: float | None) -> None:
        if value is not None:
            self._sum, self._count = self._sum + value, self._count + 1


def _finite(forecast: Forecast) -> list[float | None]:
    """JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in forecast]
