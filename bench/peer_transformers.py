# pyright: reportMissingImports=false, reportUnknownParameterType=false
"""Decode throughput of `transformers.generate` on a GGUF model, for comparison with this engine.

    python peer_transformers.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --dtype float32 bfloat16 --batch 1 8 16

Needs `torch transformers accelerate gguf` and no JAX: run it in an environment of its own.
Prompts are random token ids of equal length, decoding is greedy, and no sequence ends early. For each
case two numbers are printed, one JSON object a line, each from the fastest of --repeats runs:

- `output_tok_s`: all new tokens over the whole call, prefill included;
- `decode_tok_s`: new tokens after each sequence's first, over the time left when the time of a
  call that makes one token is taken off.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# transformers looks for a package named `kernels`, and the script's folder has a file of that name.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel  # noqa: E402


def commit() -> str | None:
    """The commit of the checkout this file lies in, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str) -> str:
    """What the numbers were measured on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def best_seconds(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls that each make exactly `new_tokens` a sequence."""
    # No end token: nothing can end early, and nothing is spent on forbidding it.
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        output = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        if prompts.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        made = output.shape[1] - prompts.shape[1]
        if made != new_tokens:
            raise RuntimeError(f"generate made {made} tokens, expected {new_tokens}")
    return min(seconds)


def measure(args: argparse.Namespace, dtype: str) -> Iterator[dict[str, Any]]:
    """Load the model in one dtype and yield a record for each metric of each batch size."""
    model = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=getattr(torch, dtype)
    )
    model = model.to(args.device).eval()
    # Else what the model declares would fill in the end token left out above.
    model.generation_config = GenerationConfig()
    generator = torch.Generator().manual_seed(0)
    for batch in args.batch:
        shape = (batch, args.prompt_tokens)
        # Ids from 256 up: ordinary tokens in the vocabularies that put special tokens first.
        prompts = torch.randint(256, model.config.vocab_size, shape, generator=generator).to(args.device)
        best_seconds(model, prompts, 2, 1)  # warm up
        first = best_seconds(model, prompts, 1, args.repeats)
        whole = best_seconds(model, prompts, args.new_tokens, args.repeats)
        values = {
            "output_tok_s": batch * args.new_tokens / whole,
            "decode_tok_s": batch * (args.new_tokens - 1) / (whole - first),
        }
        for metric, value in values.items():
            yield {
                "bench": "peer_transformers",
                "case": f"{args.name}-b{batch}",
                "metric": metric,
                "value": round(value, 2),
                "unit": "tokens/s",
                "device": device_name(args.device),
                "jax": None,
                "commit": commit(),
                "dtype": dtype,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            }


def main() -> None:
    """Measure every dtype and batch size asked for, printing as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--name", default="smollm2", help="of the cases, as in cpu_decode.py")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        for record in measure(args, dtype):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
