"""The bound on the number of tokens: never above the truth, close to it where that is possible, else none."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.loading.detokenizer import byte_level_alphabet
from jaxserve.loading.source import ModelSource
from jaxserve.loading.tokenizer import SpecialTokens, Tokenizer, load_tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.gguf_files import byte_level_metadata, sentencepiece_metadata, write_gguf
from tests.support.gguf_models import to_gguf

SPACE = "\u2581"
# Words of the vocabularies, special tokens spelled out, what composition makes one, runs that steps may treat
# as one, and characters of one to four bytes.
PIECES = [
    *("hello", " hello", "hell", "lo", "h", "<|im_end|>", "<|endoftext|>", "</s>", "<0x41>", SPACE, "12"),
    *("e\u0301", "\u03b1\u0314\u0301\u0345", "\u1100\u1161\u11a8", "\u212b", "\u0958", "\u0344"),
    *("  ", "\n\n", "\t", "\u3000", "\u00a0", "\0", "\u200d", "\u4e16", "\U0001f44d\U0001f3fd", "\ufeff"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=40).map("".join)
METADATA: dict[str, dict[str, Any]] = {
    **{pre: byte_level_metadata(pre) for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2")},
    "sentencepiece": sentencepiece_metadata(),
    "sentencepiece without a space in front": sentencepiece_metadata(add_space_prefix=False),
}


@pytest.fixture(scope="module")
def from_gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    architecture, tensors = to_gguf("llama2", "llama")
    folder: Path = tmp_path_factory.mktemp("vocabularies")
    paths = {
        name: write_gguf(folder / f"{index}.gguf", architecture | metadata, tensors)
        for index, (name, metadata) in enumerate(METADATA.items())
    }
    return {name: load_tokenizer(ModelSource("m", "gguf", path)) for name, path in paths.items()}


@pytest.mark.parametrize("name", METADATA)
@given(text=TEXTS, times=st.integers(1, 20), parse_special=st.booleans())
def test_no_text_has_fewer_tokens(
    from_gguf: dict[str, Tokenizer], name: str, text: str, times: int, parse_special: bool
) -> None:
    tokenizer = from_gguf[name]
    ids = tokenizer.encode(text * times, add_special_tokens=False, parse_special=parse_special)
    assert tokenizer.fewest_tokens(text * times) <= len(ids)
    assert tokenizer.fewest_tokens("x" * 10_000) > 100, "a bound that is never reached proves nothing"


def test_bound_is_reached_by_the_longest_token(from_gguf: dict[str, Tokenizer]) -> None:
    text = "<|endoftext|>" * 50
    tokenizer = from_gguf["smollm"]
    assert len(tokenizer.encode(text, add_special_tokens=False, parse_special=True)) == 50
    assert tokenizer.fewest_tokens(text) == 50
    assert tokenizer.fewest_tokens(text + "x") == 51
    assert tokenizer.fewest_tokens("") == 0


def test_composition_makes_at_most_four_characters_one(from_gguf: dict[str, Tokenizer]) -> None:
    decomposed = [unicodedata.normalize("NFD", chr(code)) for code in range(sys.maxunicode + 1)]
    assert {len(text) for text in decomposed} == {1, 2, 3, 4}
    assert from_gguf["qwen2"].fewest_tokens("x" * 5200) == 100  # 13 characters, of four each
    assert from_gguf["smollm"].fewest_tokens("x" * 5200) == 400


def backend(**parts: Any) -> tokenizers.Tokenizer:
    """A byte-level tokenizer, or one whose parts are replaced."""
    source = byte_tokenizer()._backend
    made = tokenizers.Tokenizer(parts.pop("model", source.model))
    made.pre_tokenizer, made.decoder = source.pre_tokenizer, source.decoder
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def with_added(**options: bool) -> tokenizers.Tokenizer:
    made = backend()
    made.add_tokens([AddedToken("<x>", **options)])
    return made


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


NO_CONTROLS = {
    letter: index
    for index, (letter, byte) in enumerate(byte_level_alphabet().items())
    if byte not in (0x04, 0x1D, 0xC0, 0xF1, 0xFF)  # as SmolLM2's, among others
}


@given(text=st.text(st.sampled_from("ab\x04\x1d\x05\x7f\u00e9\U00050000"), max_size=300))
def test_characters_that_the_vocabulary_lacks_do_not_count(text: str) -> None:
    made = backend(model=models.BPE(vocab=NO_CONTROLS, merges=[]))
    tokenizer = Tokenizer(made, SpecialTokens())
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens("\x04" * 99 + "ab" + "\x1d" * 99) == 2
    made.normalizer = normalizers.NFC()
    assert Tokenizer(made, SpecialTokens()).fewest_tokens("ab" * 99) == 0


LETTERS = {chr(code): code - 97 for code in range(97, 123)}
FUSED = {**LETTERS, "<unk>": 26}
SPLIT_AWAY = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), byte_level()])
UNCERTAIN: dict[str, tuple[tokenizers.Tokenizer, str]] = {
    "spaces split away": (backend(pre_tokenizer=SPLIT_AWAY), " " * 99),
    "stripped": (backend(normalizer=normalizers.Strip()), " " * 99),
    "replaced": (backend(normalizer=normalizers.Replace(Regex(" +"), " ")), " " * 99),
    "replaced by less": (backend(normalizer=normalizers.Replace("ab", "a")), "ab" * 99),
    "letters that no token has": (backend(model=models.BPE(vocab=LETTERS, merges=[])), "A" * 99),
    "unknown letters as one token": (
        backend(
            model=models.BPE(vocab=FUSED, merges=[], unk_token="<unk>", fuse_unk=True),
            pre_tokenizer=pre_tokenizers.Metaspace(),
            decoder=decoders.Metaspace(),
        ),
        "A" * 99,
    ),
    "a word as one unknown token": (
        backend(
            model=models.WordLevel(vocab={"<unk>": 0}, unk_token="<unk>"),
            pre_tokenizer=pre_tokenizers.Metaspace(),
            decoder=decoders.Metaspace(),
        ),
        "A" * 99,
    ),
    "a token that swallows spaces": (with_added(lstrip=True), " " * 99 + "<x>"),
    "another": (with_added(rstrip=True), "<x>" + " " * 99),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_where_text_may_vanish_there_is_no_bound(name: str) -> None:
    made, text = UNCERTAIN[name]
    tokenizer = Tokenizer(made, SpecialTokens())
    assert (
        len(tokenizer.encode(text, add_special_tokens=False)) <= len(text) / 1.9
        or name == "compatibility forms"
    )
    assert tokenizer.fewest_tokens(text) == 0


def test_an_added_token_counts_as_long_as_the_normalizer_makes_it() -> None:
    made = backend(normalizer=normalizers.Prepend("<<<<"))
    made.add_tokens([AddedToken("x", normalized=True)])
    tokenizer = Tokenizer(made, SpecialTokens())
    text = "<<<<x" * 20
    assert (
        tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False)) < len(text) / 4
    )
