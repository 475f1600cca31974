"""Text to token ids and back, over the `tokenizers` library only."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import tokenizers

from jaxserve.errors import CheckpointError, ValidationError
from jaxserve.loading.chat_template import has_quotes, quoted, render, split_at_quotes, unquoted
from jaxserve.loading.detokenizer import IncrementalDetokenizer, join_pieces, piece_tables
from jaxserve.loading.gguf_file import GGUFFile
from jaxserve.loading.gguf_tokenizer import gguf_tokenizer
from jaxserve.loading.json_files import read_json
from jaxserve.loading.source import ModelSource
from jaxserve.loading.token_bound import token_bound


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """What a model says about its own tokens.

    Attributes:
        bos_token_id: the token that begins a text, or None.
        eos_token_ids: the tokens that end the model's output.
        chat_template: Jinja source, or None for a model without one.
        names: ``bos_token``, ``eos_token``, ``pad_token``, ... -> their text, as templates use them.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])


@final
class Tokenizer:
    """A model's tokenizer. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
        self._backend = backend
        self._special = special
        vocab = backend.get_vocab(with_added_tokens=True)
        self._tables = piece_tables(backend, vocab)
        self._bound = token_bound(backend, vocab)
        self._lock = threading.Lock()
        added = backend.get_added_tokens_decoder().values()
        spelled = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        # Limits in a tokenizer.json are for training; a cut prompt would be a silent error.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """Ids are below this; the model's logits may be wider."""
        return len(self._tables.pieces)

    @property
    def bos_token_id(self) -> int | None:
        return self._special.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._special.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        return self._special.chat_template

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            text: any string; lone surrogates become replacement characters.
            add_special_tokens: put the model's own tokens around it (BOS, where the model has one).
            parse_special: ``<|im_end|>`` and the like in the text are the special tokens (what a rendered
                chat template needs, and gives `render_chat`), not text that spells them (what a user's text
                should be).
        """
        clean = text.encode("utf-8", "replace").decode("utf-8") if _has_surrogates(text) else text
        if not (parse_special and has_quotes(clean)):
            return self._encode(clean, add_special_tokens, parse_special)
        ids: list[int] = []
        for index, part in enumerate(split_at_quotes(clean)):
            if part or index == 0:
                ids += self._encode(part, add_special_tokens and index == 0, index % 2 == 0)
        return ids

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        with self._lock:  # the switch belongs to the shared backend
            if self._backend.encode_special_tokens == parse_special:
                self._backend.encode_special_tokens = not parse_special
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))``, at next to no cost; 0 where none is known."""
        return 0 if self._bound is None else self._bound.fewest_tokens(unquoted(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become replacement characters."""
        text = join_pieces(self._tables.select(skip_special_tokens), ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._tables.strips_space else text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation by the model's own template; encode it with ``parse_special``.

        Special tokens that a message spells stay text, unlike in `transformers`, so that nobody ends a
        message from within it: they are put between quotes (`chat_template`), which `encode` takes away.

        Raises:
            ValidationError: for bad messages, or if the model has no template or it refuses them.
        """
        if self.chat_template is None:
            raise ValidationError(
                "messages", messages, "this model has no chat template; give it a plain prompt"
            )
        return render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            special_tokens=self._special.names,
            quote=functools.partial(quoted, pattern=self._spelled),
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and the two configs beside it, as `load_tokenizer` reads them."""
        self._backend.save(str(folder / "tokenizer.json"))
        settings = {**self._special.names}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        generation = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids)}
        for name, values in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A decoder for one sequence whose ids arrive in pieces."""
        return IncrementalDetokenizer(self._tables, skip_special_tokens)


def load_tokenizer(source: ModelSource, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        source: the model.
        override: a folder with a ``tokenizer.json``, or such a file, to use in place of the model's own.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    if override is not None:
        path = Path(override).expanduser()
        return _from_folder(path if path.is_dir() else path.parent, None if path.is_dir() else path)
    if source.kind == "gguf":
        return _from_gguf(GGUFFile(source.path))
    return _from_folder(source.path)


def _from_gguf(file: GGUFFile) -> Tokenizer:
    metadata, where = file.metadata, file.path
    backend = gguf_tokenizer(metadata, where)
    size = len(metadata["tokenizer.ggml.tokens"])
    names: dict[str, str] = {}
    for name, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < size:
            names[name] = metadata["tokenizer.ggml.tokens"][token_id]
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    special = SpecialTokens(
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(int(token) for token in ends if token is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
        names=names,
    )
    return Tokenizer(backend, special)


def _from_folder(folder: Path, file: Path | None = None) -> Tokenizer:
    path = file or folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; a model folder needs its tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
    settings = read_json(folder / "tokenizer_config.json", missing={})
    names = {name: text for name in _TOKEN_NAMES if (text := _token_text(settings.get(name))) is not None}
    bos = names.get("bos_token")
    return Tokenizer(
        backend,
        SpecialTokens(
            bos_token_id=None if bos is None else backend.token_to_id(bos),
            eos_token_ids=_end_tokens(folder, backend, names),
            chat_template=_chat_template(folder, settings),
            names=names,
        ),
    )


_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def _end_tokens(folder: Path, backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer's own end token."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name, missing={}).get("eos_token_id")
        if value is not None:
            ids: list[Any] = value if isinstance(value, list) else [value]
            if not all(
                isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids
            ):
                raise CheckpointError(
                    f"{folder / name}: eos_token_id={value!r}: must be a token id or a list of them"
                )
            return tuple(dict.fromkeys(ids))
    token = backend.token_to_id(names.get("eos_token", ""))
    return () if token is None else (token,)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
