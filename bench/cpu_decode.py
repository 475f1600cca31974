"""Decode throughput of this engine at fixed batch sizes, to be put beside `peer_transformers.py`.

    python bench/cpu_decode.py --dtype float32 --output ours.jsonl
    python bench/compare.py ours.jsonl theirs.jsonl

Prompts are random token ids of equal length, decoding is greedy, no sequence ends early. Cases are
``NAME-bBATCH``; per case, each from the fastest of --repeats runs, as the peer's:

- ``output_tok_s``: all new tokens over the whole call, prefill included;
- ``decode_tok_s``: new tokens after each sequence's first, over the time left when the time of a call that
  makes one token is taken off.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from bench.results import Results, add_output_flag, int_list, jax_device
from jaxserve import LLM, SamplingParams
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options

_NOT_HERE = frozenset({"max_num_seqs", "max_model_len", "seed"})


def best_seconds(llm: LLM, prompts: list[list[int]], new_tokens: int, repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls that each make exactly ``new_tokens`` a sequence."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        made = {len(output.outputs[0].token_ids) for output in outputs}
        if made != {new_tokens}:
            raise RuntimeError(f"made {made} tokens, expected {new_tokens}")
    return min(seconds)


def random_prompts(vocab_size: int, batch: int, num_tokens: int) -> list[list[int]]:
    """Different ids in every sequence; from 256 up where the vocabulary is large, past the special tokens."""
    rng = np.random.default_rng(batch)
    return rng.integers(256 if vocab_size > 512 else 0, vocab_size, (batch, num_tokens)).tolist()


def measure(llm: LLM, args: argparse.Namespace, batch: int) -> dict[str, float]:
    """Metric -> tokens per second, for one batch size. Raises RuntimeError if anything was compiled."""
    prompts = random_prompts(llm.tokenizer.vocab_size, batch, args.prompt_tokens)
    best_seconds(llm, prompts, 2, 1)  # warm up
    compiles = llm.engine.compiles_after_warmup
    first = best_seconds(llm, prompts, 1, args.repeats)
    whole = best_seconds(llm, prompts, args.new_tokens, args.repeats)
    if llm.engine.compiles_after_warmup != compiles:
        raise RuntimeError("something was compiled in the timed window")
    return {
        "output_tok_s": batch * args.new_tokens / whole,
        "decode_tok_s": batch * (args.new_tokens - 1) / max(whole - first, 1e-9),
    }


def make_parser() -> CommandParser:
    """The bench's own flags, then the engine's."""
    parser = CommandParser(prog="cpu_decode.py", description=__doc__)
    parser.add_argument("--batch", type=int_list, default=(1, 8, 16), help="batch sizes (default: 1,8,16)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="smollm2", help="of the cases (default: smollm2)")
    add_output_flag(parser)
    add_engine_flags(parser, without=_NOT_HERE)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures every batch size with one engine."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    # The same prompts come again and again: they are to be computed each time.
    options: dict[str, Any] = {"enable_prefix_caching": False} | engine_options(args, without=_NOT_HERE)
    page_size = options.get("page_size", 16)
    longest = -(-(args.prompt_tokens + args.new_tokens) // page_size) * page_size
    with LLM(max_num_seqs=max(args.batch), max_model_len=longest, use_tqdm=False, **options) as llm:
        dtype = llm.engine.description["dtype"]
        results = Results("cpu_decode", jax_device(), args.output)
        shape = {"dtype": dtype, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
        for batch in args.batch:
            for metric, value in measure(llm, args, batch).items():
                results.add(f"{args.name}-b{batch}", metric, value, "tokens/s", **shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
