"""Ask a running server: `jaxserve serve` in one terminal, `python examples/client.py` in another."""

from __future__ import annotations

import sys

from jaxserve import Client, SamplingParams


def main(target: str) -> None:
    """Streams the answer to one question, then asks for several completions at once."""
    with Client(target) as client:
        print("models:", ", ".join(client.list_models()))
        shown = 0
        question = [{"role": "user", "content": "Name three rivers of Europe."}]
        for output in client.stream_chat(question, SamplingParams(temperature=0.0, max_tokens=64)):
            text = output.outputs[0].text  # everything so far
            print(text[shown:], end="", flush=True)
            shown = len(text)
        print()
        params = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=12)
        for completion in client.generate("Once upon a time", params, timeout_s=60).outputs:
            print(f"[{completion.index}] {completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
