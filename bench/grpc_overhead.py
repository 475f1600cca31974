"""How much of the engine's own throughput is left when every token goes through gRPC.

    python bench/grpc_overhead.py --streams 64

The same prompts and forced output lengths are streamed twice, all at once: through `AsyncLLM` directly, and
through a server on a loopback port and its Python client. Server, client and engine share one process and
its interpreter lock, so this is the dearest arrangement. Runs alternate; metrics:

- ``output_tok_s`` of the cases ``inproc`` and ``grpc``;
- ``grpc_share_of_inproc`` (case ``grpc``): the ratio, per pair of runs;
- ``itl_p50_ms``, ``itl_p99_ms``: gaps between the chunks of a stream, as the reader sees them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from bench.cpu_decode import random_prompts
from bench.measures import inter_token_latencies, percentile
from bench.results import Results, add_output_flag, jax_device
from jaxserve import AsyncLLM, SamplingParams
from jaxserve.cli.arguments import CommandParser, add_engine_flags, engine_options
from jaxserve.outputs import RequestOutput
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.config import ServerConfig

type Stream = Callable[[list[int], SamplingParams], AsyncIterator[RequestOutput]]

_NOT_HERE = frozenset({"max_model_len", "seed"})


class StreamedRun(NamedTuple):
    """What one run's readers saw."""

    output_tok_s: float
    gaps_s: list[float]


async def stream_all(stream: Stream, prompts: list[list[int]], new_tokens: int) -> StreamedRun:
    """Reads all streams at once, to their ends."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    async def read(prompt: list[int]) -> list[float]:
        times: list[float] = []
        count = 0
        async for output in stream(prompt, params):
            times.append(time.perf_counter())
            count = len(output.outputs[0].token_ids)
        if count != new_tokens:
            raise RuntimeError(f"a stream had {count} tokens, expected {new_tokens}")
        return times

    start = time.perf_counter()
    chunk_times = await asyncio.gather(*[read(prompt) for prompt in prompts])
    seconds = time.perf_counter() - start
    gaps = [gap for times in chunk_times for gap in inter_token_latencies(times)]
    return StreamedRun(len(prompts) * new_tokens / seconds, gaps)


async def measure(llm: AsyncLLM, args: argparse.Namespace) -> dict[str, list[StreamedRun]]:
    """Runs of each case, in pairs."""
    prompts = random_prompts(llm.tokenizer.vocab_size, args.streams, args.prompt_tokens)
    server = Server(ServerConfig(port=0, drain_timeout=0.0))
    address = await server.start()
    await server.attach(llm)
    runs: dict[str, list[StreamedRun]] = {"inproc": [], "grpc": []}
    try:
        async with AsyncClient(address) as client:
            streams: dict[str, Stream] = {"inproc": llm.generate, "grpc": client.stream}
            for stream in streams.values():  # warm up
                await stream_all(stream, prompts, 2)
            for _ in range(args.repeats):
                for case, stream in streams.items():
                    runs[case].append(await stream_all(stream, prompts, args.new_tokens))
    finally:
        await server.stop()
    return runs


def make_parser() -> CommandParser:
    """The bench's own flags, then the engine's."""
    parser = CommandParser(prog="grpc_overhead.py", description=__doc__)
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams (default: 64)")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    add_output_flag(parser)
    add_engine_flags(parser, without=_NOT_HERE)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures both ways on one engine."""
    args = make_parser().parse_args(argv)
    # The same prompts come again and again: they are to be computed each time.
    defaults: dict[str, Any] = {"max_num_seqs": args.streams, "enable_prefix_caching": False}
    options = defaults | engine_options(args, without=_NOT_HERE)
    page_size = options.get("page_size", 16)
    longest = -(-(args.prompt_tokens + args.new_tokens) // page_size) * page_size
    llm = AsyncLLM(max_model_len=longest, use_tqdm=False, **options)
    runs = asyncio.run(measure(llm, args))  # stopping the server closes the engine
    results = Results("grpc_overhead", jax_device(), args.output)
    for case, mine in runs.items():
        results.add_repeats(case, "output_tok_s", [run.output_tok_s for run in mine], "tokens/s")
        for percent in (50, 99):
            gaps_ms = [1e3 * percentile(run.gaps_s, percent) for run in mine]
            results.add_repeats(case, f"itl_p{percent}_ms", gaps_ms, "ms")
    pairs = zip(runs["grpc"], runs["inproc"], strict=True)
    shares = [remote.output_tok_s / local.output_tok_s for remote, local in pairs]
    results.add_repeats("grpc", "grpc_share_of_inproc", shares, "share")
    return 0


if __name__ == "__main__":
    sys.exit(main())
