"""From what a caller passes to what the scheduler takes: template, tokenise, check, resolve."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve import validation
from jaxserve.errors import CapacityError
from jaxserve.loading.chat_template import unquoted
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.request import Request, SamplingParams, checked_params

type TokenIds = Sequence[int]
type Prompt = str | TokenIds | Mapping[str, Any]
type Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestGroup:
    """One prompt and the requests that complete it (``params.n`` of them)."""

    id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    requests: tuple[Request, ...]


class InputProcessor:
    """Makes request groups; raises ValidationError (or a subclass) for anything that is not allowed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: validation.RequestLimits,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self._clock = clock
        self._rng = rng
        self._counter = itertools.count(1)  # groups are made on many threads

    def from_prompt(self, prompt: Prompt, params: SamplingParams, **options: Any) -> RequestGroup:
        """A group from text or token ids; ``options`` as for `_group`."""
        text, token_ids = self._encode_prompt(prompt)
        return self._group(text, token_ids, params, **options)

    def from_messages(self, messages: Messages, params: SamplingParams, **options: Any) -> RequestGroup:
        """A group from chat messages, through the model's own template."""
        text = self.tokenizer.render_chat(messages)
        self._check_fewest_tokens("messages", text)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return self._group(unquoted(text), token_ids, params, **options)

    def _encode_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        checked = validation.check_prompt(prompt)
        if isinstance(checked, str):
            self._check_fewest_tokens("prompt", checked)
            return checked, self.tokenizer.encode(checked)
        validation.check_prompt_token_ids(checked, self.limits)
        return None, [operator.index(token_id) for token_id in checked]

    def _check_fewest_tokens(self, field: str, text: str) -> None:
        validation.check_fewest_tokens(field, text, self.tokenizer.fewest_tokens(text), self.limits)

    def _group(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestGroup:
        """Resolves what the parameters leave open, and makes one request a completion."""
        validation.check_prompt_token_ids(token_ids, self.limits)
        checked_params(params)
        validation.check_params_against_model(params, self.limits)
        validation.check_priority(priority)
        validation.check_client(client)
        validation.check_cache_salt(cache_salt)
        validation.check_timeout(timeout_s)
        group_id = (
            f"request-{next(self._counter)}"
            if request_id is None
            else validation.check_request_id(request_id)
        )
        now = self._clock()
        longest = min(self.limits.max_model_len, self.limits.num_cache_tokens) - len(token_ids)
        if params.min_tokens > longest:
            raise CapacityError(
                "min_tokens",
                params.min_tokens,
                f"must be at most {longest} after a prompt of {len(token_ids)}",
            )
        seed = self._rng.getrandbits(32) if params.seed is None else operator.index(params.seed)
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= set(self.tokenizer.eos_token_ids)
        # With a character that no caller's id may have: nobody's request is called like a completion.
        ids = [group_id] if params.n == 1 else [f"{group_id}#{index}" for index in range(params.n)]
        requests = tuple(
            Request(
                id=child_id,
                prompt_token_ids=token_ids,
                params=params,
                arrival_time=now,
                max_tokens=longest if params.max_tokens is None else min(params.max_tokens, longest),
                seed=(seed + index) % 2**32,
                stop_token_ids=frozenset(ends),
                priority=priority,
                client=client,
                deadline=None if timeout_s is None else now + timeout_s,
                cache_salt=cache_salt,
            )
            for index, child_id in enumerate(ids)
        )
        return RequestGroup(group_id, text, token_ids, params, requests)
