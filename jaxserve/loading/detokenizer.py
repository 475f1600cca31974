"""Token ids to text, piece by piece: tables of bytes, and UTF-8 that is never cut inside a character."""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import tokenizers

from jaxserve.errors import CheckpointError

_SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True, slots=True)
class PieceTables:
    """What each token id adds to the text.

    Attributes:
        pieces: id -> bytes, UTF-8 when joined.
        without_special: the same, with special tokens empty.
        strips_space: a leading space of the whole text is not part of it.
    """

    pieces: Sequence[bytes]
    without_special: Sequence[bytes]
    strips_space: bool

    def select(self, skip_special_tokens: bool) -> Sequence[bytes]:
        """The table to use."""
        return self.without_special if skip_special_tokens else self.pieces


@final
class IncrementalDetokenizer:
    """The text of one growing sequence. The pieces joined are exactly `Tokenizer.decode` of all ids.

    Costs O(1) a token: nothing is decoded twice. Bytes of an unfinished character are held back until it is
    complete, or until `flush`.
    """

    __slots__ = ("_held", "_pieces", "_strips_space")

    def __init__(self, tables: PieceTables, skip_special_tokens: bool) -> None:
        self._pieces = tables.select(skip_special_tokens)
        self._strips_space = tables.strips_space
        self._held = b""

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids add. Ids that no token has (padded logits) add nothing."""
        return self._decode(self._held + join_pieces(self._pieces, ids), final=False)

    def flush(self) -> str:
        """What was held back, as replacement characters; the sequence ends here."""
        return self._decode(self._held, final=True)

    def _decode(self, data: bytes, *, final: bool) -> str:
        text, consumed = codecs.utf_8_decode(data, "replace", final)
        self._held = data[consumed:]
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def join_pieces(pieces: Sequence[bytes], ids: Iterable[int]) -> bytes:
    """The bytes of a sequence; ids that no token has add nothing."""
    size = len(pieces)
    return b"".join([pieces[i] for i in ids if 0 <= i < size])


def piece_tables(backend: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> PieceTables:
    """Tables that reproduce the decoder of a tokenizer; its vocabulary is token -> id, added tokens included.

    Raises:
        CheckpointError: for a decoder that is neither byte-level nor SentencePiece's with byte fallback.
    """
    kind, strips_space = _decoder_kind(components(backend).get("decoder"))
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    if kind == "byte-level":
        byte_of = byte_level_alphabet()
        for token, token_id in vocab.items():
            pieces[token_id] = _byte_level_piece(token, byte_of)
    else:
        for token, token_id in vocab.items():
            match = _BYTE_TOKEN.fullmatch(token)
            pieces[token_id] = (
                bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode("utf-8", "replace")
            )
    without_special = list(pieces)
    for token_id, added in backend.get_added_tokens_decoder().items():
        if added.special:
            without_special[token_id] = b""
    return PieceTables(pieces, without_special, strips_space)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted (`bytes_to_unicode` of its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_piece(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:  # an added token, spelled as itself
        return token.encode("utf-8", "replace")


def components(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """A tokenizer.json's ``normalizer``, ``pre_tokenizer`` and ``decoder``, each an object or None."""
    # Without the model: serialising a large vocabulary takes seconds.
    shell = tokenizers.Tokenizer(tokenizers.models.BPE())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, name) is not None:
            setattr(shell, name, getattr(backend, name))
    return json.loads(shell.to_str())


def _decoder_kind(decoder: dict[str, Any] | None) -> tuple[str, bool]:
    """("byte-level" or "sentencepiece", whether a leading space is stripped)."""
    steps: list[dict[str, Any]] = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"]: step for step in steps}
    if set(kinds) == {"ByteLevel"}:
        return "byte-level", False
    if set(kinds) == {"Metaspace"}:
        return "sentencepiece", kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if set(kinds) >= {"Replace"} and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replace, strip = kinds["Replace"], kinds.get("Strip")
        plain_strip = strip is None or (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)
        if replace["pattern"] == {"String": _SPACE} and replace["content"] == " " and plain_strip:
            return "sentencepiece", strip is not None
    raise CheckpointError(
        f"tokenizer decoder {decoder!r} is not supported; supported are ByteLevel, Metaspace, "
        "and Replace with ByteFallback, Fuse and Strip"
    )
