"""A tokenizer whose token ids are bytes: id 65 is "A"; id 256 ends a text."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.loading.tokenizer import SpecialTokens, Tokenizer

END_ID = 256
VOCAB_SIZE = 257
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"


def byte_tokenizer() -> Tokenizer:
    """Built anew: a tokenizer has state of its own."""
    # The byte-level alphabet in byte order: printable bytes stand for themselves, the rest from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, shifted = {}, 0
    for byte in range(256):
        if byte in printable:
            letters[chr(byte)] = byte
        else:
            letters[chr(256 + shifted)] = byte
            shifted += 1
    backend = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, SpecialTokens(eos_token_ids=(END_ID,), chat_template=TEMPLATE))
