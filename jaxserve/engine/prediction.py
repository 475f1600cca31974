"""Puts an engine's length prediction together: predictor, head, recording of training data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple, Protocol

from jaxserve.config import EngineConfig
from jaxserve.core.fused_predictor import make_length_predictor
from jaxserve.core.predictor import LengthPredictor
from jaxserve.engine.hidden_recording import HiddenRecorder
from jaxserve.errors import ConfigError
from jaxserve.loading.source import ModelSource
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import Params
from jaxserve.runner.length_head import LengthHead, head_places, load_head, model_identity
from jaxserve.runner.probes import ProbeOptions

_LOG = logging.getLogger(__name__)


class Model(Protocol):
    """What prediction needs to know of a model."""

    @property
    def source(self) -> ModelSource | None: ...
    @property
    def module(self) -> Decoder: ...
    @property
    def params(self) -> Params: ...


class Prediction(NamedTuple):
    """The parts.

    Attributes:
        predictor: of output lengths.
        probes: what is read of hidden states; None: they are not kept.
        recorder: keeps what is read, if that was asked for.
    """

    predictor: LengthPredictor
    probes: ProbeOptions | None
    recorder: HiddenRecorder | None

    def close(self) -> None:
        """Writes what was recorded. May be called twice."""
        if self.recorder is not None:
            self.recorder.close()


def make_prediction(config: EngineConfig, model: Model) -> Prediction:
    """What the configuration asks for.

    Raises:
        ConfigError: for layers that the model lacks, a head of another model, a folder that cannot be
            written, or any of these with a bundle, whose programs keep no states.
    """
    options = config.prediction
    identity = model_identity(model.module.config, model.params)
    head = _find_head(config, model, identity) if options.length_predictor == "fused" else None
    recorded: tuple[int, ...] = ()
    if options.record_hidden is not None:
        recorded = tuple(options.hidden_layers or (model.module.config.num_layers,))
    layers = tuple(sorted({*recorded, *(() if head is None else head.layers)}))
    if layers and layers[-1] > model.module.config.num_layers:
        raise ConfigError(
            f"hidden_layers={recorded}: the model has the layers 1 to {model.module.config.num_layers}"
        )
    if layers and config.runner.bundle is not None:
        raise ConfigError(
            f"bundle={config.runner.bundle}: its programs keep no hidden states; "
            "leave out record_hidden and give length_head='none'"
        )
    recorder = None
    if options.record_hidden is not None:
        recorder = HiddenRecorder(Path(options.record_hidden).expanduser(), identity, layers)
    probes = ProbeOptions(layers, head, records=recorder is not None) if layers else None
    return Prediction(make_length_predictor(options.length_predictor), probes, recorder)


def _find_head(config: EngineConfig, model: Model, identity: str) -> LengthHead | None:
    named = config.prediction.length_head
    if named == "none":
        return None
    if named is not None:
        return load_head(Path(named).expanduser(), identity)
    for path in head_places(None if model.source is None else model.source.path, config.cache_dir, identity):
        if path.is_file():
            _LOG.info("output lengths are predicted with %s", path)
            return load_head(path, identity)
    return None
