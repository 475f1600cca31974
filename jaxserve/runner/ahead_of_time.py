"""Compiles an engine's programs for devices that are not here, and reads off the programs what they will do.

Arrays are shapes only: nothing is loaded and nothing runs. The same functions build the same programs as in
`jaxserve.runner.model_runner`, so what is found here holds there.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxserve.config import EngineConfig
from jaxserve.core.plan import Bucket
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.params import param_specs
from jaxserve.models.sharding import (
    Placement,
    check_divisible,
    make_mesh,
    sharding_for,
)
from jaxserve.platforms import Platform
from jaxserve.runner.kv_cache import cache_shapes
from jaxserve.runner.programs import Programs
from jaxserve.runner.resolve import ResolvedConfig, resolve, resolve_dtype
from jaxserve.runner.slots import AdmissionShape, empty_slots

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HOST_TRANSFERS = ("infeed", "outfeed", "send", "recv")
_COPIES = ("copy", "transpose")

_INSTRUCTION = re.compile(r"\s*(?P<text>(?:ROOT )?%?\S+ = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\(.*)")
_ARRAY = re.compile(r"(?P<kind>[a-z]+)(?P<bits>[0-9]*)[a-z0-9]*\[(?P<dims>[0-9,]*)\]")
_ALIAS = re.compile(r"\{[0-9, ]*\}: \((?P<parameter>[0-9]+), \{[0-9, ]*\}, (?:may|must)-alias\)")


class ArrayType(NamedTuple):
    """An array in the type of a result: its sizes, and the bits of an element."""

    dims: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return self.size * self.bits // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        op: what it does; of an asynchronous pair the beginning, without its ``-start``.
        arrays: of its result; the beginning of a pair has its operands among them.
        text: its line.
    """

    op: str
    arrays: tuple[ArrayType, ...]
    text: str


class Collective(NamedTuple):
    """Devices exchanging arrays of a size: ``all-reduce`` and its like, and the bytes of its result."""

    kind: str
    num_bytes: int


class PlannedModel(NamedTuple):
    """A model's shapes on a mesh.

    Attributes:
        module: the decoder.
        placement: of its arrays.
        params: shapes with shardings, by path.
        bytes_per_device: that the parameters take on each device.
    """

    module: Decoder
    placement: Placement
    params: dict[str, jax.ShapeDtypeStruct]
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a compiled step will do, on each device.

    Attributes:
        bucket: its shape.
        compile_s: seconds to compile it.
        argument_bytes, temporary_bytes: memory of its inputs, and what it needs beside them.
        aliased_bytes: of the outputs that are written over inputs.
        lost_donations: arrays of caches and slots that no output is written over, though they are donated.
        collectives: how many of each; those in branches that a step may not take count too.
        cache_copies: instructions that copy or gather a whole layer's cache, or its scales.
        host_transfers: instructions that talk to the host while the step runs.
        custom_calls: target -> how many; kernels are among them.
    """

    bucket: Bucket
    compile_s: float
    argument_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    lost_donations: int
    collectives: Mapping[Collective, int]
    cache_copies: int
    host_transfers: int
    custom_calls: Mapping[str, int]


def plan_model(
    model: DecoderConfig, dtype: str, devices: list[Any], tensor_parallel_size: int
) -> PlannedModel:
    """A model's shapes over the first devices. Raises ConfigError if they cannot share it evenly."""
    placement = Placement(make_mesh(tensor_parallel_size, devices))
    check_divisible(model, placement.mesh, placement.rules)
    module = Decoder(model, dtype)
    params = {
        path: jax.ShapeDtypeStruct(
            spec.shape, spec.dtype, sharding=sharding_for(spec, placement.mesh, placement.rules)
        )
        for path, spec in param_specs(module).items()
    }
    return PlannedModel(module, placement, params, sum(map(_bytes_per_device, params.values())))


def plan_engine(
    config: EngineConfig,
    model: DecoderConfig,
    devices: list[Any],
    make_platform: Callable[[int], Platform],
) -> tuple[PlannedModel, ResolvedConfig]:
    """The sizes that an engine would choose on those devices.

    Args:
        config: the engine's.
        model: the architecture.
        devices: of a topology.
        make_platform: from the bytes that the weights take on a device.

    Raises:
        ConfigError: as `resolve`.
    """
    dtype = resolve_dtype(config, make_platform(0))
    planned = plan_model(model, dtype, devices, config.parallel.tensor_parallel_size)
    platform = make_platform(planned.bytes_per_device)
    return planned, resolve(config, platform, model, planned.placement.mesh)


def compile_steps(
    config: EngineConfig,
    planned: PlannedModel,
    resolved: ResolvedConfig,
    buckets: Iterable[Bucket],
    admission_shapes: Iterable[AdmissionShape] = (),
) -> Programs:
    """The programs of some buckets, and of some shapes of admissions."""
    replicated = planned.placement.sharding()
    slots = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated),
        empty_slots(resolved.num_slots, resolved.max_model_len, resolved.layout.page_size),
    )
    params: Any = planned.params
    cache = cache_shapes(resolved.layout, resolved.num_pages, planned.placement)
    return Programs(
        planned.module,
        planned.placement,
        config.runner.attention,
        buckets=buckets,
        admission_shapes=admission_shapes,
        params_of=lambda bucket: params,
        caches=(cache,) * planned.module.config.num_layers,
        slots=slots,
        branches_on_host=False,
        on_compiled=lambda *_: None,
    )


def report_step(
    bucket: Bucket, compiled: Any, planned: PlannedModel, resolved: ResolvedConfig, compile_s: float
) -> StepReport:
    """Reads a compiled step.

    Args:
        bucket: its shape.
        compiled: what `Programs.step` gives.
        planned: the model that it is a step of.
        resolved: the engine's sizes.
        compile_s: seconds that it took.
    """
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    instructions = read_instructions(text)
    cache = jax.tree.leaves(cache_shapes(resolved.layout, resolved.num_pages, planned.placement))
    num_donated = len(cache) * planned.module.config.num_layers + len(jax.tree.leaves(empty_slots(1, 1, 1)))
    return StepReport(
        bucket=bucket,
        compile_s=compile_s,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        lost_donations=num_donated - len(aliased_parameters(text)),
        collectives=collectives_of(instructions),
        cache_copies=len(copies_of(instructions, [_shard(array) for array in cache])),
        host_transfers=sum(each.op in _HOST_TRANSFERS for each in instructions),
        custom_calls=collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text)),
    )


def read_instructions(text: str) -> list[Instruction]:
    """Every instruction of every computation; the end of an asynchronous pair is an instruction too."""
    return [
        Instruction(match["op"].removesuffix("-start"), _arrays(match["type"]), match["text"])
        for match in map(_INSTRUCTION.match, text.splitlines())
        if match is not None
    ]


def collectives_of(instructions: Sequence[Instruction]) -> collections.Counter[Collective]:
    """How many of each; those in branches that may not be taken count too."""
    return collections.Counter(
        Collective(each.op, sum(array.num_bytes for array in each.arrays))
        for each in instructions
        if each.op in COLLECTIVES
    )


def copies_of(instructions: Sequence[Instruction], shapes: Sequence[tuple[int, ...]]) -> list[Instruction]:
    """Those that copy, rearrange or gather as much as the first shape holds, or an array of any of them.

    Activations may be as large as what is small, but are not of its shape.
    """
    return [
        each
        for each in instructions
        if each.op in (*_COPIES, *COLLECTIVES)
        and any(array.size >= math.prod(shapes[0]) or array.dims in shapes for array in each.arrays)
    ]


def aliased_parameters(text: str) -> frozenset[int]:
    """The program's parameters that it writes a result over."""
    header = text.partition("\n")[0]
    return frozenset(int(match["parameter"]) for match in _ALIAS.finditer(header))


def timed[T](make: Callable[[], T]) -> tuple[T, float]:
    """A result, and the seconds that it took."""
    start = time.perf_counter()
    result = make()
    return result, time.perf_counter() - start


def _bytes_per_device(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(_shard(array)) * array.dtype.itemsize


def _shard(array: Any) -> tuple[int, ...]:
    """What each device has of an array."""
    return array.sharding.shard_shape(array.shape)


def _arrays(result_type: str) -> tuple[ArrayType, ...]:
    return tuple(
        ArrayType(tuple(int(size) for size in match["dims"].split(",") if size), int(match["bits"] or 8))
        for match in _ARRAY.finditer(result_type)
    )
