"""Real answers of a real model to real prompts, with hidden states: what `prediction.py` judges by.

Collected in chunks of a minute or two, so that a machine can be shared: each call goes on where the one
before stopped, and writes a folder of its own when it is done.
"""

from __future__ import annotations

import gzip
import json
import queue
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Engine, build_engine
from jaxserve.engine.hidden_recording import prompt_digest
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams

# Data set -> how many of its prompts. BIG-Bench Hard asks to be trained on by nobody.
MIX = {"gpteacher": 1700, "gsm8k": 900, "arena_hard": 900, "humaneval": 120}
MOST_PROMPT_TOKENS = 300
LAYERS = (10, 20, 30)
INTERVAL = 8
_REQUESTS = "requests.jsonl"


class Question(NamedTuple):
    """A prompt and the data set that it came from."""

    source: str
    text: str


def questions(folder: Path) -> list[Question]:
    """The bench's prompts in their one order. Few-shot prefixes are left out: it is asked as in a chat."""
    rng = random.Random(7)
    chosen: list[Question] = []
    for source, count in MIX.items():
        with gzip.open(folder / f"{source}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        limit = MOST_PROMPT_TOKENS if source != "gsm8k" else None  # its count is with the prefix
        texts = list(dict.fromkeys(r["prompt"] for r in rows if limit is None or r["prompt_tokens"] <= limit))
        rng.shuffle(texts)
        chosen += [Question(source, text) for text in texts[:count]]
    rng.shuffle(chosen)
    return chosen


def prompt_ids(tokenizer: Tokenizer, question: Question) -> list[int]:
    """The question as it is asked: in the model's chat template."""
    chat = tokenizer.render_chat([{"role": "user", "content": question.text}])
    return tokenizer.encode(chat, add_special_tokens=False, parse_special=True)


def collected(folder: Path) -> list[dict[str, Any]]:
    """The requests of all chunks so far, in the order in which they were asked."""
    paths = sorted(folder.glob(f"chunk-*/{_REQUESTS}"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def collect(
    prompts: Path,
    folder: Path,
    seconds: float,
    options: dict[str, Any],
    *,
    slots: int = 16,
    max_tokens: int = 192,
) -> int:
    """Serves the next questions for about ``seconds`` and writes a chunk; returns the requests so far.

    Answers are drawn at temperature 0.7 and top-p 0.95, seeded by the question's number.

    Args:
        prompts: folder of the data sets.
        folder: of the chunks.
        options: of the engine.
        slots: requests that run at once.
        max_tokens: where answers are cut; the same in all calls for a folder.
    """
    done = collected(folder)
    todo = list(enumerate(questions(prompts)))[len(done) :]
    chunk = folder / f"chunk-{sum(1 for _ in folder.glob('chunk-*')):04d}"
    unfinished = folder / "unfinished"
    for left in unfinished.glob("*"):
        left.unlink()
    config = EngineConfig.from_flat(
        {
            "max_num_seqs": slots,
            "max_model_len": 768 + max_tokens,
            "record_hidden": str(unfinished),
            "hidden_layers": LAYERS,
            "probe_interval": INTERVAL,
            **options,
        }
    )
    engine = build_engine(config, progress=False)
    try:
        records = _serve(engine, todo, seconds, slots, max_tokens)
    finally:
        engine.close()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (unfinished / _REQUESTS).write_text(lines, encoding="utf-8")
    unfinished.rename(chunk)
    return len(done) + len(records)


def _serve(
    engine: Engine, todo: Sequence[tuple[int, Question]], seconds: float, slots: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Keeps the slots full for so long, then lets those that run finish."""
    inbox: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
    records: dict[str, dict[str, Any]] = {}
    start, alive, waiting = time.monotonic(), 0, iter(todo)
    while True:
        while alive < slots + 2 and time.monotonic() - start < seconds:
            entry = next(waiting, None)
            if entry is None:
                break
            index, question = entry
            params = SamplingParams(temperature=0.7, top_p=0.95, seed=index, max_tokens=max_tokens)
            group = engine.inputs.from_messages(
                [{"role": "user", "content": question.text}], params,
                request_id=str(index), client=question.source,
            )  # fmt: skip
            records[group.id] = {
                "index": index,
                "source": question.source,
                "prompt": prompt_digest(group.prompt_token_ids),
                "prompt_tokens": len(group.prompt_token_ids),
                "max_tokens": max_tokens,
            }
            engine.loop.submit(group, inbox.put, streams=False)
            alive += 1
        if alive == 0:
            return sorted(records.values(), key=lambda record: record["index"])
        for output in inbox.get():
            answer = output.outputs[0]
            assert answer.finish_reason is not None
            records[output.request_id] |= {
                "output_tokens": len(answer.token_ids),
                "finish_reason": str(answer.finish_reason),
                "seconds": round(time.monotonic() - start, 2),
            }
            alive -= 1


def shards(folders: Iterable[Path]) -> list[Path]:
    """The recordings of all chunks."""
    return [path for folder in folders for path in sorted(folder.glob("chunk-*"))]
