"""How the TPU compiler schedules the attention kernel's decode loop: do copies run under the arithmetic?

    python bench/tpu_schedule.py --output bench/results/tpu_schedule.jsonl

Compiles one layer's attention for Llama 3.1 8B in a process of its own, which has the compiler write down
its final instruction bundles (one is issued a cycle), and reads them. Nothing is run: bundles are a lower
bound of cycles, transfers are taken at peak bandwidth, of which each core of a device has its share.
`clock_to_hide_ghz` is the clock from which on the arithmetic of a KV block, and the starting of the next
block's copies, take less time than the block's transfer: above it, decode attention is bound by memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench.results import ROOT, Results, add_output_flag
from jaxserve.config import compile_without_devices

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
_BUNDLE = re.compile(r"^\s*(?P<address>0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(?P<depth>>*) ?\{(?P<text>.*)$")
_ROWS, _PAGE, _KV_HEADS, _HEAD_DIM = 64, 128, 8, 128
_BLOCK_BYTES, _BLOCK_TOKENS = 2**20, 512  # `tuned/tpu.json`, decode
# Case -> dtype of the cache.
CASES = {"decode_8b": "bfloat16", "decode_8b_int8": "int8", "decode_8b_fp8": "float8_e4m3fn"}


class Bundle(NamedTuple):
    """One issue slot of the program: its address, in how many loops it is, and what it does."""

    address: int
    depth: int
    text: str


class Schedule(NamedTuple):
    """The loop over KV blocks, in bundles.

    Attributes:
        compute: the straight piece that multiplies, for a block that is seen wholly.
        per_page: to start one page's copy, and to wait for one.
        starts_first: whether copies are started before the loop waits, and it waits before it multiplies.
    """

    compute: int
    per_page: int
    starts_first: bool


def read_bundles(text: str) -> list[Bundle]:
    """The bundles of a dump of final bundles."""
    found = (_BUNDLE.match(line) for line in text.splitlines())
    return [Bundle(int(m["address"], 16), len(m["depth"]), m["text"]) for m in found if m]


def read_schedule(bundles: list[Bundle]) -> Schedule:
    """Finds the loop over KV blocks: the one that multiplies. Raises ValueError if there is none."""
    compute = _pieces(bundles, "vmatmul")
    if not compute:
        raise ValueError("no piece of the program multiplies")
    depth = compute[0][0].depth
    starts = [piece for piece in _pieces(bundles, "dma.hbm_to_vmem") if piece[0].depth > depth]
    waits = [piece for piece in _pieces(bundles, "dma.done.wait") if piece[0].depth > depth]
    first = min(piece[0].address for piece in compute)
    return Schedule(
        compute=min(map(len, compute)),
        per_page=len(starts[0]) + len(waits[0]),
        starts_first=starts[0][0].address < waits[0][0].address < first,
    )


def _pieces(bundles: list[Bundle], operation: str) -> list[list[Bundle]]:
    """Runs of bundles of one depth, without a branch, that hold an operation."""
    runs: list[list[Bundle]] = [[]]
    for bundle in bundles:
        if runs[-1] and runs[-1][-1].depth != bundle.depth:
            runs.append([])
        runs[-1].append(bundle)
        if "sbr.rel" in bundle.text:
            runs.append([])
    return [run for run in runs if any(operation in bundle.text for bundle in run)]


def compile_attention(topology: str, kv_dtype: str) -> None:
    """Compiles the kernel alone; called in a process of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxserve.pallas_kernels.layout import KVPages
    from jaxserve.pallas_kernels.ragged_paged_attention.api import AttentionMetadata, ragged_paged_attention
    from jaxserve.platforms.tpu import topology_devices

    mesh = Mesh(np.array(topology_devices(topology)[:1]), ("x",))

    def attend(cache: KVPages, *arrays: jax.Array) -> tuple[jax.Array, KVPages]:
        q, k, v, page_table, kv_lens, cu_q_lens = arrays
        metadata = AttentionMetadata(page_table, kv_lens, cu_q_lens, max_q_len=1)
        return ragged_paged_attention(q, k, v, cache, metadata, scale=0.1, implementation="mosaic_tpu")

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    cache = jax.tree.map(lambda each: array(*each.shape, dtype=each.dtype), _layout(kv_dtype).shapes(1000))
    jax.jit(mapped, donate_argnums=0).lower(
        cache,
        array(_ROWS, 4 * _KV_HEADS, _HEAD_DIM),
        *[array(_ROWS, _KV_HEADS, _HEAD_DIM)] * 2,
        *(array(*shape, dtype=jnp.int32) for shape in ((_ROWS, 64), (_ROWS,), (_ROWS + 1,))),
    ).compile()


def _layout(kv_dtype: str) -> Any:
    import jax.numpy as jnp

    from jaxserve.pallas_kernels.layout import KVLayout

    return KVLayout(_PAGE, _KV_HEADS, _HEAD_DIM, jnp.dtype(kv_dtype))


def dumped_schedule(topology: str, kv_dtype: str) -> Schedule:
    """Compiles in a process of its own, because libtpu reads its flags once, and reads what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--compile", topology, "--kv-dtype", kv_dtype],
            env=os.environ
            | {"LIBTPU_INIT_ARGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            check=True,
            capture_output=True,
        )
        (path,) = (
            path
            for path in Path(folder).glob("*ragged_paged_attention_tpu*-final_bundles.txt")
            if not re.search(r"analysis", path.name)
        )
        return read_schedule(read_bundles(path.read_text()))


def main(argv: list[str] | None = None) -> int:
    """Prints the schedule of every generation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--compile", metavar="TOPOLOGY", help=argparse.SUPPRESS)
    parser.add_argument("--kv-dtype", default="bfloat16", help=argparse.SUPPRESS)
    add_output_flag(parser)
    args = parser.parse_args(argv)
    compile_without_devices()
    if args.compile:
        compile_attention(args.compile, args.kv_dtype)
        return 0
    from jaxserve.platforms.tpu import CHIPS

    for topology, (case, kv_dtype) in itertools.product(TOPOLOGIES, CASES.items()):
        schedule = dumped_schedule(topology, kv_dtype)
        chip = CHIPS[topology.partition(":")[0]]
        page_bytes = _layout(kv_dtype).bytes_per_page()
        pages = min(_BLOCK_BYTES // page_bytes, _BLOCK_TOKENS // _PAGE)
        bundles = schedule.compute + pages * schedule.per_page
        transfer_ns = 1e9 * pages * page_bytes * chip.cores / chip.hbm_bandwidth  # each core has its share
        results = Results("tpu_schedule", f"compiled, not run: {chip.name}", args.output)
        more = {
            "kv_block_bytes": pages * page_bytes,
            "kv_block_tokens": pages * _PAGE,
            "starts_copies_first": schedule.starts_first,
        }
        results.add(case, "bundles_per_kv_block", bundles, "bundles", **more)
        results.add(case, "kv_block_transfer_us", transfer_ns / 1e3, "us", **more)
        results.add(case, "clock_to_hide_ghz", bundles / transfer_ns, "GHz", **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
