"""`jaxserve compile`: plans an engine for devices that are not here, and compiles its programs."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.arguments import add_engine_flags, command_parser, engine_options
from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.core.plan import Bucket
    from jaxserve.runner.ahead_of_time import PlannedModel, StepReport
    from jaxserve.runner.resolve import ResolvedConfig

_GIB = 2**30
_WITHOUT = ("device", "bundle", "compile_cache", "tokenizer")


def main(argv: list[str]) -> int:
    """Prints the plan, compiles each step and prints what it needs; 1 if one does not fit in memory."""
    parser = command_parser(
        "compile",
        "Plan and compile an engine for devices that are not here. Needs libtpu, and no TPU.",
    )
    parser.add_argument("--platform", choices=("tpu", "cpu"), default="tpu", help="default: %(default)s")
    parser.add_argument(
        "--topology",
        default="v6e:2x2",
        help="generation and shape, whole hosts: v5e:2x4, v5p:2x2x1, tpu7x:2x2x1",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder for the compiled programs")
    add_engine_flags(parser, without=_WITHOUT)
    arguments = parser.parse_args(argv)
    config = EngineConfig.from_flat(engine_options(arguments, without=_WITHOUT))
    return _compile(config, arguments.platform, arguments.topology, arguments.output)


def _compile(config: EngineConfig, platform: str, topology: str, output: Path | None) -> int:
    from jaxserve.config import compile_without_devices
    from jaxserve.errors import ConfigError

    compile_without_devices()
    if output is not None:
        if output.exists():
            raise ConfigError(f"output={output}: exists already; give a new folder")
        output.mkdir(parents=True, mode=0o700)
    fits = False
    try:
        fits = _compile_to(config, platform, topology, output)
    finally:
        if output is not None and not fits:  # half a bundle is none
            shutil.rmtree(output, ignore_errors=True)
    return 0 if fits else 1


def _compile_to(config: EngineConfig, platform: str, topology: str, output: Path | None) -> bool:
    """Whether every program fits in memory; only then there is a bundle."""
    from jaxserve.loading.source import read_architecture
    from jaxserve.models.registry import find_family
    from jaxserve.runner.ahead_of_time import plan_engine
    from jaxserve.runner.bundle import make_manifest, programs_folder, write_manifest
    from jaxserve.runner.compile_cache import keeping_every_program, seal, use_compile_cache

    devices, make_platform = _target(platform, topology)
    hf = read_architecture(config.model.model, config.cache_dir, config.model.revision)
    model = find_family(hf).config_from_hf(hf)
    planned, resolved = plan_engine(config, model, devices, make_platform)
    device = planned.placement.mesh.devices.flat[0]
    _print_plan(planned, resolved, device.device_kind, _memory(platform, device))
    keeping: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if output is not None:
        use_compile_cache(programs_folder(output))
        keeping = keeping_every_program(output)
    with keeping:
        fits = _compile_programs(config, planned, resolved)
    if fits and output is not None:
        seal(programs_folder(output))
        taken = list(planned.placement.mesh.devices.flat)
        write_manifest(make_manifest(config, resolved, model, taken, devices, topology), output)
        print(f"bundle       {output}: jaxserve serve --bundle {output} ...")
    return fits


def _compile_programs(config: EngineConfig, planned: PlannedModel, resolved: ResolvedConfig) -> bool:
    """One after the other, so that each is reported as soon as it is there; whether all fit in memory."""
    from jaxserve.runner.ahead_of_time import compile_steps, report_step, timed
    from jaxserve.runner.out_of_memory import what_to_lower
    from jaxserve.runner.slots import admission_shapes

    def compile_admissions() -> None:
        shapes = admission_shapes(resolved.num_slots, resolved.max_model_len)
        compile_steps(config, planned, resolved, (), shapes)

    def compile_step(bucket: Bucket) -> None:
        programs, seconds = timed(lambda: compile_steps(config, planned, resolved, [bucket]))
        _print_step(report_step(bucket, programs.step(bucket), planned, resolved, seconds))

    fits = [_fits("admissions", compile_admissions)]
    fits += [_fits(_name(each), functools.partial(compile_step, each)) for each in resolved.ladder.all()]
    if not all(fits):
        print(f"{fits.count(False)} of {len(fits)} do not fit: {what_to_lower(config, resolved)}")
    return all(fits)


def _fits(name: str, compile_and_print: Callable[[], None]) -> bool:
    """Whether a program fits in memory; if not, prints what the compiler says of it."""
    import jax

    from jaxserve.runner.out_of_memory import is_out_of_memory, reason

    try:
        compile_and_print()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name:12} does not fit: {reason(error)}", flush=True)
        return False
    return True


def _target(platform: str, topology: str) -> tuple[list[Any], Any]:
    """Devices, and the platform for weights of a size."""
    if platform == "cpu":
        import jax

        from jaxserve.platforms.cpu import Cpu

        return jax.devices("cpu"), lambda _: Cpu()
    from jaxserve.platforms.tpu import Tpu, topology_devices

    return topology_devices(topology), Tpu


def _memory(platform: str, device: Any) -> int | None:
    if platform == "cpu":
        return None
    from jaxserve.platforms.tpu import chip_of

    return chip_of(device).hbm_bytes


def _print_plan(planned: PlannedModel, resolved: ResolvedConfig, kind: str, limit: int | None) -> None:
    devices = planned.placement.mesh.size
    page_bytes = resolved.layout.bytes_per_page() * planned.module.config.num_layers // devices
    room = "" if limit is None else f" of {limit / _GIB:.2f} GiB"
    print(f"devices      {devices} x {kind}; each:")
    print(f"weights      {planned.bytes_per_device / _GIB:.2f} GiB{room}, {resolved.dtype}")
    print(
        f"KV pages     {resolved.num_pages * page_bytes / _GIB:.2f} GiB: {resolved.num_pages} of "
        f"{resolved.layout.page_size} tokens, {resolved.num_cache_tokens} tokens in all, "
        f"{resolved.layout.dtype}"
    )
    print(f"context      {resolved.max_model_len} tokens at most, {resolved.num_slots} requests at once")
    print(f"decode rows  {', '.join(map(str, resolved.ladder.decode_rows))}")
    if resolved.ladder.decode_steps > 1:
        print(f"loops        of {resolved.ladder.decode_steps} decode steps, of the same rows")
    print(f"mixed tokens {', '.join(map(str, resolved.ladder.mixed_tokens))}", flush=True)


def _name(bucket: Bucket) -> str:
    kind = "mixed"
    if bucket.is_decode:
        kind = "loop" if bucket.decode_steps > 1 else "decode"
    return f"{kind:6} {bucket.tokens:5}"


def _print_step(report: StepReport) -> None:
    talk = ", ".join(
        f"{count} {collective.kind} of {collective.num_bytes / 1024:.1f} KiB"
        for collective, count in sorted(report.collectives.items(), key=lambda item: -item[0].num_bytes)
    )
    print(
        f"{_name(report.bucket)} {report.temporary_bytes / _GIB:.2f} GiB temporary, "
        f"{(report.argument_bytes + report.temporary_bytes) / _GIB:.2f} in all; "
        f"{report.custom_calls.get('tpu_custom_call', 0)} kernels, {report.cache_copies} copies of a cache, "
        f"{report.host_transfers} host transfers; {talk or 'no collectives'}; {report.compile_s:.0f} s",
        flush=True,
    )
