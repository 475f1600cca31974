"""Puts a tuner together; the one place where engine, simulator, benches and tests do so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.config import LearningConfig
from jaxserve.core.assembly import Assembly
from jaxserve.core.cost_model import CostModel
from jaxserve.core.learning.arms import Arm, make_arms
from jaxserve.core.learning.energy import EnergyMeter
from jaxserve.core.learning.guard import Guard
from jaxserve.core.learning.prior import read_prior
from jaxserve.core.learning.reward import Objectives
from jaxserve.core.learning.tuner import LearningOptions, Tuner


def make_tuner(
    config: LearningConfig,
    assembly: Assembly,
    costs: CostModel,
    *,
    arms: Sequence[Arm] | None = None,
    meter: EnergyMeter | None = None,
    records: Sequence[Mapping[str, Any]] = (),
    write: Callable[[dict[str, Any]], None] = lambda record: None,
    seed: int = 0,
) -> Tuner:
    """A tuner for the scheduler that an assembly describes.

    Args:
        costs: of that scheduler's policies.
        arms: by default `make_arms`.
        records: of a log, to go on where it ends.

    Raises:
        ConfigError: for a prior or a log that does not fit.
    """
    options, ladder = assembly.scheduler, assembly.ladder
    arms = make_arms(options, ladder, assembly.num_slots) if arms is None else arms
    objectives = Objectives(
        ttft_slo_s=options.ttft_slo_s,
        tpot_slo_s=options.tpot_slo_s,
        ttft_weight=config.reward_ttft_weight,
        tpot_weight=config.reward_tpot_weight,
        energy_weight=config.reward_energy_weight,
    )
    num_pages = assembly.num_pages - 1 - assembly.watermark_pages
    guard = Guard(
        costs,
        ladder,
        objectives,
        num_slots=assembly.num_slots,
        num_cache_tokens=num_pages * assembly.page_size,
    )
    prior = config.learning_prior
    tuner = Tuner(
        arms=arms,
        objectives=objectives,
        guard=guard,
        num_slots=assembly.num_slots,
        options=LearningOptions(config.learning == "frozen", config.learning_epoch_s, seed),
        priors=() if prior is None else read_prior(Path(prior).expanduser(), arms),
        meter=meter,
        write=write,
    )
    tuner.restore(records)
    return tuner
