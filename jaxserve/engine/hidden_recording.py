"""Training data for a length head, written while an engine serves.

A folder of shards, each a safetensors file with whole requests in it:

- ``states`` float16 [rows, layers, D], as probes read them; ``generated`` int32 [rows], tokens that a state
  had seen; ``request`` int32 [rows], index into the arrays that follow;
- ``prompt`` int64 [requests], a digest of the prompt's tokens: no token of it, but equal prompts are known;
  ``prompt_tokens``, ``max_tokens``, ``output_tokens`` int32 [requests]; ``stopped`` uint8 [requests], 1 if
  the request ended by itself: otherwise its length is only known to be more than ``output_tokens``.

Metadata: ``format``, ``model`` (`jaxserve.runner.length_head.model_identity`), ``layers``. States reveal
something of what was said: keep a recording as you would keep the texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError, StorageError
from jaxserve.files import write_safetensors
from jaxserve.request import FinishReason, Request

_LOG = logging.getLogger(__name__)

FORMAT = "1"
_SHARD_ROWS = 2048
_SHARD_NAME = "shard-{:05d}.safetensors"


class _Row(NamedTuple):
    generated: int
    states: npt.NDArray[Any]


@final
class HiddenRecorder:
    """Collects what probes read, on the engine's thread, and writes it when requests have ended.

    Args:
        folder: made if need be; shards are added to those that it holds.
        model: identity of the model.
        layers: whose states probes read.

    A shard that cannot be written is said in the log, and ends the recording, not the engine.

    Raises:
        ConfigError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, model: str, layers: tuple[int, ...]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"record_hidden={str(folder)!r}: {error.strerror}") from None
        self._folder = folder
        self._metadata = {"format": FORMAT, "model": model, "layers": json.dumps(layers)}
        self._next_shard = sum(1 for _ in folder.glob(_SHARD_NAME.replace("{:05d}", "*")))
        self._alive: dict[Request, list[_Row]] = {}
        self._ending: list[Request] = []
        self._done: list[tuple[Request, list[_Row]]] = []
        self._num_rows = 0
        self._has_failed = False

    def probed(self, request: Request, generated: int, states: npt.NDArray[Any]) -> None:
        """Keeps one state, float16 [layers, D]; also of a request that ended with the step before."""
        if self._has_failed or (request.is_finished and request not in self._ending):
            return  # the latter is a row that the scheduler discarded
        self._alive.setdefault(request, []).append(_Row(generated, states))

    def finished(self, request: Request) -> None:
        """Its length is known; the last of its states may come with the next step's result."""
        self._ending.append(request)

    def step_done(self) -> None:
        """Call after a step's states, before its ends: who ended with a step before is complete."""
        for request in self._ending:
            # A state behind the last token belongs to a row that the scheduler discarded.
            length = len(request.output_token_ids)
            rows = [row for row in self._alive.pop(request, []) if row.generated < length]
            if rows:
                self._done.append((request, rows))
                self._num_rows += len(rows)
        self._ending.clear()
        if self._num_rows >= _SHARD_ROWS:
            self._write()

    def close(self) -> None:
        """Writes what is left; requests that are alive are lost. May be called twice."""
        self.step_done()
        if self._done:
            self._write()

    def _write(self) -> None:
        requests = [request for request, _ in self._done]
        rows = [(index, row) for index, (_, rows) in enumerate(self._done) for row in rows]
        tensors = {
            "states": np.stack([row.states for _, row in rows]),
            "generated": np.array([row.generated for _, row in rows], np.int32),
            "request": np.array([index for index, _ in rows], np.int32),
            "prompt": np.array([prompt_digest(r.prompt_token_ids) for r in requests], np.int64),
            "prompt_tokens": np.array([r.num_prompt_tokens for r in requests], np.int32),
            "max_tokens": np.array([r.max_tokens for r in requests], np.int32),
            "output_tokens": np.array([len(r.output_token_ids) for r in requests], np.int32),
            "stopped": np.array([r.finish_reason is FinishReason.STOP for r in requests], np.uint8),
        }
        try:
            write_safetensors(tensors, self._folder / _SHARD_NAME.format(self._next_shard), self._metadata)
        except StorageError as error:
            _LOG.error("hidden states are recorded no longer: %s", error)
            self._has_failed = True
            self._alive.clear()
        self._next_shard += 1
        self._done.clear()
        self._num_rows = 0


def prompt_digest(token_ids: Any) -> int:
    """64 bits, signed, of a prompt's tokens."""
    data = array("i", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
