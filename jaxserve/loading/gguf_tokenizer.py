"""A `tokenizers` tokenizer from the vocabulary inside a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import CheckpointError

_SPACE = "\u2581"
# Llama 3's and Qwen 2's tokenizer.json; they differ in how many digits go together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer(metadata: Mapping[str, Any], where: object) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Tokens of type "control" are special; a BOS token is added where the file (or its kind) says so.

    Args:
        metadata: of the file.
        where: names the file in messages.

    Raises:
        CheckpointError: for a kind of vocabulary or pre-tokenizer that is not known exactly.
    """
    tokens: Any = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{where}: the file has no vocabulary (tokenizer.ggml.tokens)")
    types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), TokenType.NORMAL))
    if len(types) != len(tokens):
        raise CheckpointError(f"{where}: {len(types)} token types for {len(tokens)} tokens")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, where)
        adds_bos = metadata.get("tokenizer.ggml.pre") in _ADDS_BOS
    elif kind == "llama":
        tokens = _visible_spaces(tokens, types)
        tokenizer, adds_bos = _sentencepiece(metadata, tokens, types, where), True
    else:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model={kind!r} is not supported; supported are gpt2, llama"
        )
    _add_special_tokens(tokenizer, tokens, types)
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        _prepend_bos(tokenizer, metadata, tokens, where)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: object) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre={name!r} is not known; known are {', '.join(_PRE_TOKENIZERS)}. "
            "Give the model's own tokenizer.json instead (option tokenizer)"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token whole, before any merge.
        model = models.BPE(vocab, merges, ignore_merges=name in _ADDS_BOS)
    except Exception as error:
        raise CheckpointError(f"{where}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _digits_alone() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def make() -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return make


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _digits_alone,
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
_ADDS_BOS = ("llama-bpe",)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: object
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores must hold one score for each token")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.unknown_token_id={unknown}: there are {len(tokens)} tokens"
        )
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        sentencepiece_merges(tokens, scores, types),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    to_visible = normalizers.Replace(" ", _SPACE)
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_visible])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = to_visible
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _visible_spaces(tokens: Sequence[str], types: Sequence[int]) -> list[str]:
    """The tokens as SentencePiece has them: converters write user-defined ones with plain spaces."""
    user_defined = set(np.flatnonzero(np.asarray(types) == TokenType.USER_DEFINED).tolist())
    return [token.replace(" ", _SPACE) if i in user_defined else token for i, token in enumerate(tokens)]


def sentencepiece_merges(
    tokens: Sequence[str], scores: np.ndarray, types: Sequence[int]
) -> list[tuple[str, str]]:
    """Ranked merges that make `tokenizers`' BPE choose as SentencePiece's does.

    SentencePiece merges the neighbours whose union has the highest score; so each way to split a token in two
    is a merge, ranked by the token's score, then by the halves' lengths, longest first (as the converter of
    `transformers` ranks them). User-defined tokens come before all others.
    """
    known = set(tokens)
    kinds, values = np.asarray(types).tolist(), np.asarray(scores).tolist()
    merges: list[tuple[str, str]] = []
    ranks: list[tuple[float, int, int]] = []
    for token, score, kind in zip(tokens, values, kinds, strict=True):
        if kind == TokenType.USER_DEFINED:
            score = math.inf
        elif kind != TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((left, right))
                ranks.append((-score, -cut, cut - len(token)))
    if not merges:
        return []
    by_score, by_left, by_right = np.array(ranks).T
    order = np.lexsort((by_right, by_left, by_score))  # the last key is the first to count
    return [merges[i] for i in order.tolist()]


def _add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    def added(token: str, special: bool) -> AddedToken:
        return AddedToken(token, special=special, normalized=False)

    kinds = np.asarray(types)
    control = np.flatnonzero((kinds == TokenType.CONTROL) | (kinds == TokenType.UNKNOWN)).tolist()
    tokenizer.add_special_tokens([added(tokens[i], special=True) for i in control])
    user = np.flatnonzero(kinds == TokenType.USER_DEFINED).tolist()
    tokenizer.add_tokens([added(tokens[i], special=False) for i in user])


def _prepend_bos(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], where: object
) -> None:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not isinstance(bos, int) or not 0 <= bos < len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.bos_token_id={bos!r}: must be below {len(tokens)}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="BOS $A", pair="BOS $A BOS $B", special_tokens=[("BOS", bos)]
    )
