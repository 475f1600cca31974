"""What steps cost at least on each TPU generation, computed from compiled programs: nothing is run.

    python bench/tpu_roofline.py --output bench/results/tpu_roofline.jsonl

The TPU compiler (libtpu, no TPU) compiles a model's step, a decode step or a chunk of a prompt, with one and
with two layers. The difference of its counts of operations, and of the collectives in the program, is a
layer, which is then taken as often as the model has it. Bytes of memory are counted by hand, because the
compiler counts what it moves within the chip too: every weight once, and every key and value of the context
once. Memory, matrix units and links run at the peak that `jaxserve.platforms.tpu` has.

``step_ms_at_least`` is the longest of the three, which no step can beat. ``step_ms_expected`` is memory and
arithmetic in parallel and links after them, as the programs have it, all at their peaks: starting programs
and waiting for a link cost nothing in it, so a real step takes longer; ``tok_s_expected`` goes with it.
``temporary_mib`` is what the program of two layers needs beside its arguments. No step has taken these times.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any, NamedTuple

from bench.results import Results, add_output_flag, int_list
from bench.shapes import MODELS
from jaxserve.config import EngineConfig, compile_without_devices

if __name__ == "__main__":
    compile_without_devices()  # before JAX is imported; whoever imports this module has devices of its own

from jaxserve.core.plan import Bucket
from jaxserve.models.registry import find_family
from jaxserve.platforms.tpu import Tpu, TpuChip, chip_of, topology_devices
from jaxserve.runner.ahead_of_time import (
    PlannedModel,
    StepReport,
    compile_steps,
    plan_engine,
    report_step,
)

# Topology and devices that one engine takes of it.
TARGETS = (("v5e:2x4", 8), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("v6e:2x4", 8), ("tpu7x:2x2x1", 1))
_CONTEXT_OF_PROGRAM = 1024


class Cost(NamedTuple):
    """What a program does on one device: operations of matrix units, bytes of memory and of links."""

    flops: float
    hbm_bytes: float
    link_bytes: float


class Step(NamedTuple):
    """Tokens of a step, requests in it, and tokens of context that each has, its own included."""

    tokens: int
    rows: int
    context: int

    @property
    def is_decode(self) -> bool:
        """Whether each request has one token in it."""
        return self.tokens == self.rows


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """The seconds that a step's parts take at their peaks."""

    memory_s: float
    compute_s: float
    link_s: float

    @property
    def least_s(self) -> float:
        """As if all overlapped."""
        return max(self.memory_s, self.compute_s, self.link_s)

    @property
    def expected_s(self) -> float:
        """Memory and arithmetic overlap; what goes over links is waited for."""
        return max(self.memory_s, self.compute_s) + self.link_s

    @property
    def name(self) -> str:
        """What most of the time goes to."""
        times = {"memory": self.memory_s, "matrix units": self.compute_s, "links": self.link_s}
        return max(times, key=lambda key: times[key])


def combine(one: Cost, two: Cost, num_layers: int) -> Cost:
    """The cost with all layers, from those with one and with two: the rest is there once."""
    return Cost(*(a + (num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def attention_cost(planned: PlannedModel, step: Step) -> Cost:
    """One layer's attention on one device: each key and value is read once, each score and sum computed."""
    model, devices = planned.module.config, planned.placement.mesh.size
    heads, kv_heads = model.num_heads // devices, model.num_kv_heads // devices
    each = step.tokens // step.rows
    scores = step.tokens * (
        step.context - (each - 1) / 2
    )  # the last token of a chunk sees all, the first least
    element_bytes = planned.params["embed.weight"].dtype.itemsize
    kv_bytes = 2 * step.rows * step.context * kv_heads * model.head_dim * element_bytes
    return Cost(4 * scores * heads * model.head_dim, kv_bytes, 0.0)


def bound(cost: Cost, chip: TpuChip) -> Bound:
    """The times of a cost on a chip."""
    return Bound(
        cost.hbm_bytes / chip.hbm_bandwidth,
        cost.flops / chip.bf16_flops,
        cost.link_bytes / chip.link_bandwidth,
    )


def link_bytes(report: StepReport, devices: int) -> float:
    """Bytes that a device sends in a ring: twice for an all-reduce, of which each device has a part."""
    passes = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}
    return sum(
        passes.get(collective.kind, 1.0) * collective.num_bytes * count * (devices - 1) / devices
        for collective, count in report.collectives.items()
    )


@functools.cache
def program_cost(model: str, topology: str, devices: int, bucket: Bucket, layers: int) -> tuple[Cost, int]:
    """A program with some layers: the compiler's operations, its links, and its bytes of temporaries.

    Attention is not in the cost.
    """
    hf: Any = MODELS[model] | {"num_hidden_layers": layers}
    config = EngineConfig.from_flat(
        {
            "tensor_parallel_size": devices,
            "max_num_seqs": bucket.rows,
            "row_buckets": (bucket.rows,),
            "token_buckets": (max(bucket.tokens, 2 * bucket.rows),),
            "max_num_batched_tokens": max(bucket.tokens, 2 * bucket.rows),
            "max_model_len": _CONTEXT_OF_PROGRAM,
            "attention": "mosaic_tpu",
        }
    )
    architecture = find_family(hf).config_from_hf(hf)
    planned, resolved = plan_engine(config, architecture, topology_devices(topology), Tpu)
    compiled: Any = compile_steps(config, planned, resolved, [bucket]).step(bucket)
    counts = compiled.cost_analysis()
    report = report_step(bucket, compiled, planned, resolved, 0.0)
    cost = Cost(counts["flops"], weight_bytes(planned), link_bytes(report, devices))
    return cost, report.temporary_bytes


def weight_bytes(planned: PlannedModel) -> float:
    """Bytes of weights that a step reads on one device; of an embedding that is not the head, a few rows."""
    table = planned.params["embed.weight"]
    rows, width = table.sharding.shard_shape(table.shape)
    unread = 0 if planned.module.config.tie_embeddings else rows * width * table.dtype.itemsize
    return planned.bytes_per_device - unread


def step_bound(model: str, topology: str, devices: int, step: Step) -> tuple[Bound, int]:
    """The times of a step's parts, and the bytes of its program's temporaries with two layers."""
    hf: Any = MODELS[model]
    architecture = find_family(hf).config_from_hf(hf)
    config = EngineConfig.from_flat({"tensor_parallel_size": devices})
    planned, _ = plan_engine(config, architecture, topology_devices(topology), Tpu)
    rows = max(8, step.rows)
    bucket = Bucket(rows if step.is_decode else step.tokens, rows)
    (one, _), (two, temporary) = (program_cost(model, topology, devices, bucket, n) for n in (1, 2))
    dense = combine(one, two, architecture.num_layers)
    attention = attention_cost(planned, step)
    total = Cost(*(a + architecture.num_layers * b for a, b in zip(dense, attention, strict=True)))
    return bound(total, chip_of(planned.placement.mesh.devices.flat[0])), temporary


def main(argv: list[str] | None = None) -> int:
    """Prints the bounds of every target and step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3.1-8b")
    parser.add_argument("--batches", type=int_list, default=(1, 8, 64, 256), metavar="N,N,...")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each request (default: 1024)")
    parser.add_argument(
        "--chunk", type=int, default=1024, help="tokens of a lone prompt's step (default: 1024)"
    )
    add_output_flag(parser)
    args = parser.parse_args(argv)
    for topology, devices in TARGETS:
        device = f"computed, not measured: {devices} of {topology}"
        results = Results("tpu_roofline", device, args.output)
        steps = {f"decode_b{batch}": Step(batch, batch, args.context) for batch in args.batches}
        steps[f"prefill_{args.chunk}"] = Step(args.chunk, 1, args.chunk)
        for case, step in steps.items():
            times, temporary = step_bound(args.model, topology, devices, step)
            more = {"model": args.model, "context": step.context, "bound_by": times.name}
            results.add(case, "step_ms_at_least", 1e3 * times.least_s, "ms", **more)
            results.add(case, "tok_s_at_most", step.tokens / times.least_s, "tokens/s", **more)
            results.add(case, "step_ms_expected", 1e3 * times.expected_s, "ms", **more)
            results.add(case, "tok_s_expected", step.tokens / times.expected_s, "tokens/s", **more)
            for part in ("memory", "compute", "link"):
                results.add(case, f"{part}_ms", 1e3 * getattr(times, f"{part}_s"), "ms", **more)
            results.add(case, "temporary_mib", temporary / 2**20, "MiB", layers=2, **more)
    return 0


if __name__ == "__main__":
    main()
