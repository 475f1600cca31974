"""Puts an engine together: model, weights, runner, scheduler, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxserve import validation
from jaxserve.config import EngineConfig
from jaxserve.core.assembly import Assembly, assemble
from jaxserve.core.batch import Executor, StepBatch
from jaxserve.core.cost_model import CostModel, StepCost, UnknownDevice
from jaxserve.core.learning.energy import EnergyMeter
from jaxserve.core.learning.setup import make_tuner
from jaxserve.core.plan import StepPlan
from jaxserve.core.predictor import LengthPredictor, MeanLengthPredictor
from jaxserve.core.probing import Probing
from jaxserve.core.resume_costs import NO_HOST, HostTier
from jaxserve.core.roofline import ModelShape, Roofline, known_device
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.hidden_recording import HiddenRecorder
from jaxserve.engine.input_processor import InputProcessor
from jaxserve.engine.journals import Journals
from jaxserve.engine.learning import LearningLog, make_meter
from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.prediction import make_prediction
from jaxserve.loading.source import ModelSource, open_checkpoint, resolve_model
from jaxserve.loading.tokenizer import Tokenizer, load_tokenizer
from jaxserve.loading.weights import load_params
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.params import Params
from jaxserve.models.registry import find_family
from jaxserve.models.sharding import Placement, check_divisible, make_mesh
from jaxserve.platforms import Platform, select_platform
from jaxserve.runner.bundle import check_devices, programs_folder, with_bundle
from jaxserve.runner.compile_cache import seal, use_compile_cache
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.out_of_memory import naming_what_to_lower, what_to_lower
from jaxserve.runner.probes import ProbeOptions
from jaxserve.runner.programs import count_programs
from jaxserve.runner.resolve import ResolvedConfig, resolve, resolve_dtype
from jaxserve.runner.slots import admission_shapes

_LOG = logging.getLogger(__name__)


class Engine:
    """A running engine. The Python APIs and the server are thin layers over it."""

    def __init__(
        self,
        *,
        name: str,
        loop: EngineLoop,
        inputs: InputProcessor,
        description: dict[str, Any],
        on_close: Callable[[], None] = lambda: None,
        count_compiles: Callable[[], int] = lambda: 0,
    ) -> None:
        self.name = name
        self.loop = loop
        self.inputs = inputs
        self.description = description
        self._on_close = on_close
        self._count_compiles = count_compiles

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inputs.tokenizer

    @property
    def compiles_after_warmup(self) -> int:
        """Compilations since the engine was ready; must stay 0."""
        return self._count_compiles()

    def stats(self) -> dict[str, Any]:
        """A snapshot of queues, pages, stages and padding."""
        core = self.loop.core
        prefix_cache = core.scheduler.prefix_cache_stats()
        return {
            **core.scheduler.stats()._asdict(),
            "prefix_cache": None if prefix_cache is None else prefix_cache.to_json(),
            "swap": core.scheduler.swap_stats()._asdict(),
            "length_prediction": core.prediction_stats(),
            "learning": core.learning_stats(),
            "num_steps": core.stats.steps,
            "num_output_tokens": core.stats.output_tokens,
            "finished": dict(core.stats.finished),
            "stage_ms_per_step": core.stats.stage_ms_per_step(),
            "padding_share": core.stats.padding_share(),
            "compiles_after_warmup": self.compiles_after_warmup,
        }

    def close(self) -> None:
        """Aborts what is running and frees the device's memory. May be called twice."""
        self.loop.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()


class LoadedModel(NamedTuple):
    """A model's weights on the device, and what came with them; any number of runners can share it."""

    name: str
    source: ModelSource | None  # None for random weights
    platform: Platform
    placement: Placement
    module: Decoder
    params: Params
    tokenizer: Tokenizer


def build_engine(config: EngineConfig, *, progress: bool = True) -> Engine:
    """Loads, compiles and starts; returns when the first request can be served.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: before anything was started.
    """
    config = with_bundle(config)
    opened = contextlib.ExitStack()
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(opened.close)
        journals = Journals(config.scheduler)
        opened.callback(journals.close)
        learning_log = LearningLog(config.learning)
        opened.callback(learning_log.close)
        model = load_model(config, progress=progress)
        prediction = make_prediction(config, model)
        opened.callback(prediction.close)
        resolved, runner = make_runner(config, model, probes=prediction.probes, progress=progress)
        opened.callback(runner.close)
        prior = device_prior(model, resolved)
        core = make_core(
            config, resolved, runner, runner.prepare,
            prior=prior, predictor=prediction.predictor, journals=journals,
            probing=None if prediction.probes is None else Probing(runner, config.prediction.probe_interval),
            hidden_recorder=prediction.recorder, host=runner.host_tier, learning_log=learning_log,
            meter=_meter(config, model, prior),
        )  # fmt: skip
        engine = make_engine(config, model, resolved, runner, core, on_close=opened.close)
        on_failure.pop_all()
    return engine


def load_model(config: EngineConfig, *, progress: bool = True) -> LoadedModel:
    """Finds a model and puts its weights on the device. Raises as `build_engine`."""
    platform = start_platform(config)
    source = resolve_model(config.model.model, config.cache_dir, config.model.revision)
    checkpoint = open_checkpoint(source)
    tokenizer = load_tokenizer(source, config.model.tokenizer)
    module, placement = declare_model(config, platform, checkpoint.hf_config)
    weight_map = find_family(checkpoint.hf_config).weight_map(module.config)
    lower = (
        f"lower the precision (dtype={resolve_dtype(config, platform)}), take a smaller model, "
        f"or spread it over more devices than tensor_parallel_size={placement.mesh.size}"
    )
    with naming_what_to_lower("loading the weights", lower):
        params = load_params(
            checkpoint, module, weight_map, placement.mesh, placement.rules, progress=progress
        )
    # A path is nobody's business on the other end of a wire.
    name = source.path.name if Path(source.name).expanduser().exists() else source.name
    return LoadedModel(name, source, platform, placement, module, params, tokenizer)


def start_platform(config: EngineConfig) -> Platform:
    """Chooses the devices, and where compiled programs are kept. Raises ConfigError."""
    platform = select_platform(config.runner.device)
    folder = _compile_cache_folder(config)
    if folder is not None:
        use_compile_cache(folder)
    return platform


def _compile_cache_folder(config: EngineConfig) -> Path | None:
    if config.runner.bundle is not None:
        return programs_folder(config.runner.bundle)
    return config.cache_dir / "xla" if config.runner.compile_cache else None


def declare_model(config: EngineConfig, platform: Platform, hf_config: HfConfig) -> tuple[Decoder, Placement]:
    """A model that has no weights yet, and the devices that they go to.

    Args:
        hf_config: its config.json.

    Raises:
        ConfigError: for an architecture that is not supported, or that these devices cannot share.
    """
    model_config = find_family(hf_config).config_from_hf(hf_config)
    devices = jax.devices(platform.name)
    mesh = make_mesh(config.parallel.tensor_parallel_size, devices)
    check_devices(config.runner.bundle, model_config, list(mesh.devices.flat), devices)
    placement = Placement(mesh)
    check_divisible(model_config, mesh, placement.rules)
    return Decoder(model_config, resolve_dtype(config, platform)), placement


def make_runner(
    config: EngineConfig, model: LoadedModel, *, probes: ProbeOptions | None = None, progress: bool = True
) -> tuple[ResolvedConfig, ModelRunner]:
    """Sizes an engine for its device, allocates slots and pages, compiles everything.

    Args:
        probes: what to read of running requests' hidden states; by default they are not kept.

    Raises:
        ConfigError: for sizes that contradict each other, or do not fit in memory.
    """
    resolved = resolve(config, model.platform, model.module.config, model.placement.mesh)
    num_programs = count_programs(
        resolved.ladder.all(),
        admission_shapes(resolved.num_slots, resolved.max_model_len),
        branches_on_host=model.platform.branches_on_host,
    )
    desc = "compiling, or loading what an earlier start compiled"
    what = f"allocating {resolved.num_pages} KV pages, and compiling and running steps that use them"
    bundle = config.runner.bundle
    with (
        naming_what_to_lower(what, what_to_lower(config, resolved)),
        tqdm(total=num_programs, desc=desc, unit="program", disable=not progress) as bar,
    ):

        def on_compiled(program: str, was_kept: bool) -> None:
            bar.update()
            if bundle is not None and not was_kept:
                _LOG.warning("bundle=%s: has no %s for this machine; it was compiled here", bundle, program)

        runner = ModelRunner(
            model.module,
            model.params,
            model.placement,
            resolved,
            config.runner.attention,
            run_each_once=model.platform.slow_first_run,
            pairs_single_rows=model.platform.pairs_single_rows,
            branches_on_host=model.platform.branches_on_host,
            on_compiled=on_compiled,
            probes=probes,
        )
    folder = _compile_cache_folder(config)
    if folder is not None:
        seal(folder)
    return resolved, runner


def make_core[Handle](
    config: EngineConfig,
    resolved: ResolvedConfig,
    executor: Executor[Handle],
    prepare: Callable[[StepPlan], StepBatch],
    *,
    prior: StepCost | None = None,
    predictor: LengthPredictor | None = None,
    journals: Journals | None = None,
    host: HostTier = NO_HOST,
    probing: Probing[Any] | None = None,
    hidden_recorder: HiddenRecorder | None = None,
    learning_log: LearningLog | None = None,
    meter: EnergyMeter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> EngineCore[Handle]:
    """The step loop's parts, wired for production: the wall clock and a real executor.

    A runner whose core has come to rest (nothing alive, nothing in flight) can be given to another core.

    Args:
        prior: of the cost model; by default nothing is known of the device until it has run.
        predictor: of output lengths; by default the mean of those that finished.
        journals: files to write.
        host: memory that the executor can copy pages to.
        probing: of an executor that was made for it.
        hidden_recorder: of what it reads.
        learning_log: of the choices, if the configuration lets it learn.
        meter: of energy, for the same.
        clock: seconds that never go back; `make_engine` takes the same.
    """
    assembly = Assembly(
        scheduler=config.scheduler,
        ladder=resolved.ladder,
        num_slots=resolved.num_slots,
        num_pages=resolved.num_pages,
        page_size=resolved.layout.page_size,
        watermark_pages=resolved.watermark_pages,
        max_queued_requests=config.scheduler.max_queued_requests + resolved.num_slots,
        prefix_caching=config.cache.enable_prefix_caching,
        prefix_preloading=config.cache.enable_prefix_preloading,
        host=host,
    )
    prior, depth = prior or UnknownDevice(), config.scheduler.pipeline_depth
    costs, tuner = CostModel(prior), None
    if config.learning.learning != "off":
        log = learning_log or LearningLog(config.learning)
        tuner = make_tuner(
            config.learning, assembly, costs,
            meter=meter, records=log.records, write=log.write, seed=config.seed,
        )  # fmt: skip
    return EngineCore(
        scheduler=assemble(assembly, costs, journals.decision_log() if journals else None),
        executor=executor,
        prepare=prepare,
        predictor=predictor or MeanLengthPredictor(),
        clock=clock,
        pipeline_depth=depth,
        costs=costs,
        recorder=journals.recorder(assembly, prior, depth) if journals else None,
        probing=probing,
        hidden_recorder=hidden_recorder,
        tuner=tuner,
    )


def _meter(config: EngineConfig, model: LoadedModel, prior: StepCost) -> EnergyMeter | None:
    """Of the devices that the model is on; none unless the engine learns."""
    if config.learning.learning == "off":
        return None
    indices = [device.local_hardware_id for device in model.placement.mesh.devices.flat]
    return make_meter(model.platform.name, indices, prior, time.monotonic())


def device_prior(model: LoadedModel, resolved: ResolvedConfig) -> StepCost:
    """Step times from the peaks of a device that is known, and the size of the model on it."""
    mesh, layout = model.placement.mesh, resolved.layout
    profile = known_device(mesh.devices.flat[0].device_kind)
    if profile is None:
        return UnknownDevice()
    shape = model_shape_of(model, resolved.dtype)
    if layout.has_scales:
        values = 2 * layout.page_size * layout.num_kv_heads * layout.head_dim
        shape = dataclasses.replace(shape, kv_bytes_per_value=layout.bytes_per_page() / values)
    return Roofline(profile, shape, mesh.size)


def model_shape_of(model: LoadedModel, dtype: str) -> ModelShape:
    """What the steps of a model depend on, for the cost model."""
    decoder = model.module.config
    # Embeddings are looked up; where they are the head as well, they are multiplied by.
    num_params = sum(math.prod(array.shape) for array in model.params.values())
    if not decoder.tie_embeddings:
        num_params -= decoder.vocab_size * decoder.hidden_size
    return ModelShape(
        name=model.name,
        num_params=num_params,
        num_layers=decoder.num_layers,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        hidden_size=decoder.hidden_size,
        bytes_per_value=jnp.dtype(dtype).itemsize,
    )


def make_engine(
    config: EngineConfig,
    model: LoadedModel,
    resolved: ResolvedConfig,
    runner: ModelRunner,
    core: EngineCore[Any],
    *,
    on_close: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """Starts the thread of a core, with everything that requests pass through on their way to it.

    Args:
        on_close: called when the engine is closed; ``runner.close`` if the runner is the engine's own.
        clock: of arrivals; the core's.
    """
    limits = validation.RequestLimits(
        model.module.config.vocab_size, resolved.max_model_len, resolved.num_cache_tokens
    )
    return Engine(
        name=model.name,
        loop=EngineLoop(core, model.tokenizer, config.scheduler.max_queued_requests + resolved.num_slots),
        inputs=InputProcessor(model.tokenizer, limits, clock, random.Random(config.seed)),
        description=_describe(model.name, model.platform.name, model.placement.mesh.size, resolved),
        on_close=on_close,
        count_compiles=lambda: runner.compiles_after_warmup,
    )


def _describe(name: str, platform: str, num_devices: int, resolved: ResolvedConfig) -> dict[str, Any]:
    return {
        "model": name,
        "device": f"{platform} x {num_devices}",
        "dtype": resolved.dtype,
        "slots": resolved.num_slots,
        "context": resolved.max_model_len,
        "KV pages": f"{resolved.num_pages} x {resolved.layout.page_size} tokens, {resolved.layout.dtype}",
        "decode rows": resolved.ladder.decode_rows,
        "mixed tokens": resolved.ladder.mixed_tokens,
    }
