#!/usr/bin/env bash
# The first hour on a real TPU: does what was proven without one hold? Stops at the first step that fails.
#
#   bench/tpu_first_hour.sh [folder for results]
#
# Run it in a checkout on a TPU VM with one process per host, after `uv sync --extra tpu --group models`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-tpu-first-hour}
mkdir -p "$out"
run() { uv run --no-sync "$@"; }
step() { printf '\n--- %s\n' "$*"; }

step "1. JAX finds the chips"
run jaxserve doctor | tee "$out/doctor.txt"
run python -c 'import jax; assert jax.default_backend() == "tpu", jax.default_backend()'

step "2. The attention kernel against the float64 oracle, on the chip and not simulated"
run python -m pytest -q tests/pallas_kernels/test_ragged_paged_attention.py -k mosaic_tpu

step "3. The same greedy answer with the kernel and with XLA attention"
for attention in mosaic_tpu xla; do
    run jaxserve generate "The capital of France is" --dtype float32 --max-tokens 32 \
        --max-num-seqs 8 --max-model-len 1024 --attention "$attention" | tee "$out/answer-$attention.txt"
done
cmp "$out"/answer-mosaic_tpu.txt "$out"/answer-xla.txt

step "4. Decode steps of Llama 3.1 8B, random weights; compare with bench/results/tpu_roofline.jsonl"
devices=$(run python -c 'import jax
from jaxserve.platforms.tpu import chip_of
print(1 if chip_of(jax.devices()[0]).hbm_bytes > 24 * 2**30 else len(jax.devices()))')
run python bench/speed.py --shape llama-3.1-8b --parts decode_steps,ttft --batches 1,8,64,256 --context 960 --steps 128 \
    --row-buckets 8,64,256 --token-buckets 1024 --max-num-seqs 256 --max-model-len 4096 \
    --tensor-parallel-size "$devices" --output "$out/speed.jsonl"
run jaxserve bench --workload uniform --requests 256 --batch-sizes 8,64 --repeats 3 --output "$out/bench.jsonl"

step "5. A bundle that is compiled without the chips is taken by an engine on them"
chip=$(run python -c 'import jax
from jaxserve.platforms.tpu import chip_of
print(chip_of(jax.devices()[0]).name)')
rm -rf "$out/bundle"
env JAX_PLATFORMS=cpu uv run --no-sync jaxserve compile --topology "$chip" --output "$out/bundle" \
    --max-num-seqs 8 --max-model-len 1024 --num-pages 129 | tee "$out/plan.txt"
before=$(find "$out/bundle/xla" -name 'jit_step*' | wc -l)
run jaxserve generate "Water boils at" --max-tokens 8 --bundle "$out/bundle"
after=$(find "$out/bundle/xla" -name 'jit_step*' | wc -l)
test "$before" -eq "$after" || { echo "the engine compiled steps again: bundles do not carry over"; exit 1; }

step "Done: $out. Please attach it to an issue, good or bad."
