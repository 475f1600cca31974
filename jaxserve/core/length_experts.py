"""What may be known of an answer's length before it begins: experts, each with one kind of evidence.

Every expert speaks of ``z = log(1 + output tokens)``. Estimates are shrunk towards what is known less
specifically, so that one observation never stands alone. State is keyed by digests and opaque ids, bounded
and forgotten after a day. No expert reads ``max_tokens``: a caller must gain nothing by lying about it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol, final

from jaxserve.request import Request

_MOST_KEYS = 100_000
_KEPT_S = 86_400.0  # a day without news
_MOST_COUNT = 100  # observations that a mean remembers: older ones fade
_TOKEN_BYTES = array("i").itemsize


class LengthExpert(Protocol):
    """One kind of evidence."""

    def estimate(self, request: Request, prior: float) -> float | None:
        """The expected z of a request that has not begun, or None where there is no evidence.

        Args:
            prior: what is expected of a request of which nothing is known.
        """
        ...

    def observe(self, request: Request, z: float) -> None:
        """Learns from a request that has ended."""
        ...


class _Mean(NamedTuple):
    weight: float  # observations, as far as it remembers them
    mean: float
    last_time: float


@final
class RecentMeans:
    """Fading means by key, the least recently used forgotten first.

    Args:
        least_weight: of a new observation: the mean is an EWMA of this weight once it has seen enough.
    """

    def __init__(self, least_weight: float = 1.0 / _MOST_COUNT, most_keys: int = _MOST_KEYS) -> None:
        self._least_weight = least_weight
        self._most_keys = most_keys
        self._means: OrderedDict[Hashable, _Mean] = OrderedDict()

    def __len__(self) -> int:
        return len(self._means)

    def knows(self, key: Hashable) -> bool:
        return key in self._means

    def shrunk(self, key: Hashable, prior: float, kappa: float, now: float) -> float | None:
        """``(n mean + kappa prior) / (n + kappa)``; None for a key without news since a day."""
        known = self._means.get(key)
        if known is None or now - known.last_time > _KEPT_S:
            return None
        return (known.weight * known.mean + kappa * prior) / (known.weight + kappa)

    def add(self, key: Hashable, value: float, now: float) -> None:
        """One more observation."""
        known = self._means.pop(key, None)
        if known is None or now - known.last_time > _KEPT_S:
            known = _Mean(0.0, 0.0, now)
        weight = min(known.weight + 1.0, 1.0 / self._least_weight)
        self._means[key] = _Mean(weight, known.mean + (value - known.mean) / weight, now)
        if len(self._means) > self._most_keys:
            self._means.popitem(last=False)

    def move(self, old: Hashable | None, new: Hashable) -> None:
        """Gives a key's mean another name; a name that is not known is nothing to move."""
        known = None if old is None else self._means.pop(old, None)
        if known is not None:
            self._means[new] = known


@final
class EverybodyExpert:
    """The mean of all: the prior of the others."""

    def estimate(self, request: Request, prior: float) -> float | None:
        return prior

    def observe(self, request: Request, z: float) -> None:
        pass


@final
class PatternExpert:
    """Requests alike in form: a prompt of about the same length and, among those, the same first tokens."""

    _TEMPLATE_TOKENS = 16
    _KAPPA = 5.0

    def __init__(self) -> None:
        self._means = RecentMeans()

    def estimate(self, request: Request, prior: float) -> float | None:
        now, size = request.arrival_time, request.num_prompt_tokens.bit_length()
        alike = self._means.shrunk(size, prior, self._KAPPA, now)
        if alike is None:
            return None
        same = self._means.shrunk((size, self._template(request)), alike, self._KAPPA, now)
        return alike if same is None else same

    def observe(self, request: Request, z: float) -> None:
        now, size = request.arrival_time, request.num_prompt_tokens.bit_length()
        self._means.add(size, z, now)
        self._means.add((size, self._template(request)), z, now)

    def _template(self, request: Request) -> bytes:
        return next(iter(digests(request, request.prompt_token_ids, self._TEMPLATE_TOKENS, 1)), b"")


@final
class ClientExpert:
    """The client's own requests; none for requests without one."""

    _KAPPA = 10.0

    def __init__(self) -> None:
        self._means = RecentMeans()

    def estimate(self, request: Request, prior: float) -> float | None:
        if not request.client:
            return None
        return self._means.shrunk(request.client, prior, self._KAPPA, request.arrival_time)

    def observe(self, request: Request, z: float) -> None:
        if request.client:
            self._means.add(request.client, z, request.arrival_time)


@final
class PrefixExpert:
    """Requests that begin with the same tokens: the deeper the shared beginning, the more it counts.

    Beginnings are cut at multiples of 16 tokens, 16 of them at most; each block's mean is shrunk towards that
    of the block before it.
    """

    _BLOCK_TOKENS, _MOST_BLOCKS = 16, 16
    _KAPPA = 3.0

    def __init__(self) -> None:
        self._means = RecentMeans()

    def estimate(self, request: Request, prior: float) -> float | None:
        found: float | None = None
        for key in self._keys(request):
            deeper = self._means.shrunk(
                key, prior if found is None else found, self._KAPPA, request.arrival_time
            )
            if deeper is None:
                break
            found = deeper
        return found

    def observe(self, request: Request, z: float) -> None:
        for key in self._keys(request):
            self._means.add(key, z, request.arrival_time)

    def _keys(self, request: Request) -> list[bytes]:
        return digests(request, request.prompt_token_ids, self._BLOCK_TOKENS, self._MOST_BLOCKS)


@final
class ConversationExpert:
    """The conversation's earlier answers: a prompt that goes on where a request ended belongs to it."""

    _BLOCK_TOKENS, _MOST_BLOCKS = 32, 256
    _KAPPA = 3.0
    _ALPHA = 0.3

    def __init__(self) -> None:
        self._means = RecentMeans(least_weight=self._ALPHA)  # key: the end of what was said so far

    def estimate(self, request: Request, prior: float) -> float | None:
        key = self._known(request)
        return None if key is None else self._means.shrunk(key, prior, self._KAPPA, request.arrival_time)

    def observe(self, request: Request, z: float) -> None:
        said = digests(request, request.known_token_ids(), self._BLOCK_TOKENS, self._MOST_BLOCKS)
        if len(said) * self._BLOCK_TOKENS <= request.num_prompt_tokens:
            return  # no block reaches into the answer: what goes on here would not be known
        self._means.move(self._known(request), said[-1])
        self._means.add(said[-1], z, request.arrival_time)

    def _known(self, request: Request) -> bytes | None:
        """The deepest end of an earlier request that this one's prompt begins with."""
        if not len(self._means):
            return None
        keys = digests(request, request.prompt_token_ids, self._BLOCK_TOKENS, self._MOST_BLOCKS)
        return next((key for key in reversed(keys) if self._means.knows(key)), None)


def digests(request: Request, tokens: Sequence[int], block_tokens: int, most_blocks: int) -> list[bytes]:
    """A digest of every beginning that is whole blocks long; other tenants' (salts) never have the same."""
    count = min(len(tokens) // block_tokens, most_blocks)
    data = array("i", tokens[: count * block_tokens]).tobytes()
    state = hashlib.blake2b(request.cache_salt.encode(), digest_size=8)
    found: list[bytes] = []
    for start in range(0, len(data), block_tokens * _TOKEN_BYTES):
        state.update(data[start : start + block_tokens * _TOKEN_BYTES])
        found.append(state.digest())
    return found
