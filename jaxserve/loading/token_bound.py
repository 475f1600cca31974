"""How few tokens a text can have: what refuses a prompt that cannot fit before it is tokenised.

A token stands for a part of the text, and no part is longer than the longest entry of the vocabulary, if
every character of the text ends up in some token. That holds for byte-level BPE, and for BPE with byte
fallback, behind steps that drop nothing. It need not hold where steps strip or replace, where unknown
characters are fused, or where a special token swallows the spaces beside it: there no bound is claimed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import models

from jaxserve.loading.detokenizer import byte_level_alphabet, components

# Canonical composition makes at most this many characters one: no decomposition is longer, and none is empty
# (Unicode Standard Annex 15, section 9; a test asks the character database).
_NFC_SHRINKS = 4
_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"})
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBound:
    """What is certain about the number of tokens of a text.

    Attributes:
        longest: most characters that one token can stand for.
        dropped: characters that may be in no token at all.
    """

    longest: int
    dropped: tuple[str, ...] = ()

    def fewest_tokens(self, text: str) -> int:
        """The text has at least so many."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return -(-kept // self.longest)


def token_bound(backend: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> TokenBound | None:
    """The bound of a tokenizer, or None where nothing is certain.

    Args:
        backend: the tokenizer.
        vocab: token -> id, added tokens included.
    """
    document = components(backend)
    shrinks = _shrinks(document.get("normalizer"))
    dropped = _dropped(backend, vocab, list(_steps(document.get("pre_tokenizer"), "pretokenizers")))
    added = backend.get_added_tokens_decoder().values()
    if shrinks is None or dropped is None or any(token.lstrip or token.rstrip for token in added):
        return None
    # A token of the byte-level alphabet has one character for each byte, so never fewer than it stands for.
    longest = max(map(len, vocab), default=1)
    if backend.normalizer is not None:
        if dropped:
            return None  # other characters may become one of these
        in_normalized_text = [token.content for token in added if token.normalized]
        longest = max(
            [longest, *(len(backend.normalizer.normalize_str(text)) for text in in_normalized_text)]
        )
    return TokenBound(longest * shrinks, dropped)


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """By how much a text can get shorter at most, or None if that is not known."""
    factor = 1
    for step in _steps(normalizer, "normalizers"):
        match step:
            case {"type": "NFC"}:
                factor *= _NFC_SHRINKS
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
                pass
            case _:
                return None
    return factor


def _dropped(
    backend: tokenizers.Tokenizer, vocab: Mapping[str, int], pre_tokenizers: list[dict[str, Any]]
) -> tuple[str, ...] | None:
    """The characters of a normalised text that may be in no token, or None if they cannot be told."""
    if not isinstance(backend.model, models.BPE):
        return None
    for step in pre_tokenizers:
        if step["type"] not in _KEEPING_PRE_TOKENIZERS or step.get("behavior") == "Removed":
            return None
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        missing = [byte for letter, byte in byte_level_alphabet().items() if letter not in vocab]
        # Vocabularies may lack control characters. Every longer character has bytes of 0x80 to 0xBF.
        if any(0x80 <= byte < 0xC0 for byte in missing):
            return None
        return tuple(chr(byte) for byte in sorted(missing) if byte < 0x80)
    return () if backend.model.byte_fallback and vocab.keys() >= _BYTE_TOKENS else None


def _steps(step: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """A step's own steps, however deeply they are nested."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step[parts]:
        yield from _steps(part, parts)
