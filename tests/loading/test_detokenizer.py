"""Streamed text equals decoded text, for any ids in any pieces."""

import functools
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError
from jaxserve.loading.detokenizer import byte_level_alphabet, piece_tables
from jaxserve.loading.source import ModelSource
from jaxserve.loading.tokenizer import load_tokenizer
from tests.support.gguf_files import byte_level_metadata, sentencepiece_metadata, write_gguf
from tests.support.gguf_models import to_gguf

KINDS = {
    "byte-level": byte_level_metadata(),
    "sentencepiece": sentencepiece_metadata(),
    "bare": sentencepiece_metadata(add_space_prefix=False),
}


@functools.cache
def tokenizer(kind):
    with tempfile.TemporaryDirectory() as folder:
        metadata, tensors = to_gguf("llama2", "llama")
        path = write_gguf(Path(folder) / "m.gguf", metadata | KINDS[kind], tensors)
        return load_tokenizer(ModelSource(kind, "gguf", path))


def streamed(kind, pieces, skip):
    stream = tokenizer(kind).stream(skip_special_tokens=skip)
    return [stream.push(piece) for piece in pieces] + [stream.flush()]


@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.lists(st.integers(0, 275), max_size=5), max_size=12),
    st.booleans(),
)
def test_any_ids_in_any_pieces(kind, pieces, skip):
    whole = [token for piece in pieces for token in piece]
    assert "".join(streamed(kind, pieces, skip)) == tokenizer(kind).decode(whole, skip_special_tokens=skip)


@given(st.sampled_from(sorted(KINDS)), st.text(max_size=40))
def test_text_comes_back_and_no_character_is_ever_cut(kind, text):
    ids = tokenizer(kind).encode(text)
    pieces = streamed(kind, [[token] for token in ids], skip=True)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.sampled_from(sorted(KINDS)), st.text(max_size=40))
def test_decoding_agrees_with_the_library(kind, text):
    mine = tokenizer(kind)
    ids = mine.encode(text)
    assert mine.decode(ids) == mine._backend.decode(ids)


def test_an_emoji_waits_for_its_last_byte():
    ids = [[byte] for byte in "a🙂b".encode()]
    assert streamed("byte-level", ids, True) == ["a", "", "", "", "🙂", "b", ""]


def test_half_a_character_at_the_end_is_replaced():
    assert streamed("byte-level", [[0x61, 0xF0, 0x9F]], True) == ["a", "\ufffd"]
    assert streamed("byte-level", [[0xF0], [0x61]], True) == ["", "\ufffda", ""]


def test_special_tokens_are_left_out_or_shown():
    assert streamed("byte-level", [[104, 262, 105]], True) == ["hi", ""]
    assert streamed("byte-level", [[104, 262, 105]], False) == ["h<|im_end|>i", ""]


def test_only_the_first_space_is_stripped():
    assert streamed("sentencepiece", [[1], [268], [268]], True) == ["", "hello", " hello", ""]
    assert streamed("sentencepiece", [[259], [259]], True) == ["", " ", ""]


def test_the_alphabet_is_every_byte_once():
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["A"], alphabet["Ġ"], alphabet["Ċ"], alphabet["é"]) == (65, 32, 10, 0xE9)


def test_unknown_decoders_are_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    for decoder in (tokenizers.decoders.WordPiece(), None):
        if decoder is not None:
            backend.decoder = decoder
        with pytest.raises(CheckpointError, match="is not supported; supported are ByteLevel"):
            piece_tables(backend, backend.get_vocab())


def test_metaspace_is_sentencepiece():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581a": 0, "\u2581": 1}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    tables = piece_tables(backend, backend.get_vocab())
    assert (list(tables.pieces), tables.strips_space) == ([b" a", b" "], True)
