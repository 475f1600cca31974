"""Where prompts made from one template stop sharing it: advice for whoever writes the template.

A date, a user's name or an id near the top of a prompt ends what can be cached, though the text after it is
the same in every request. Such a request parts from the cache at one position, and goes on with words that
the cached prompt has as well, soon after the place where they parted. Nothing is ever rewritten.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, final

from jaxserve.core.radix_node import HostMatch, pack

_TOKEN_BYTES = 4
_MOST_PLACES = 256  # that are remembered
_MOST_SIBLINGS = 2  # cached prompts that a new one is compared with: the newest
_PROBE_TOKENS = 8
_PROBES = (16, 32, 64, 128)  # tokens after the parting where a probe is taken
_SEARCHED_TOKENS = 512
MIN_LOST_TOKENS = _PROBES[0] + _PROBE_TOKENS


class TemplateBreak(NamedTuple):
    """A position at which prompts part and then go on alike.

    Attributes:
        position: tokens that they share before it.
        num_requests: prompts that parted there.
        lost_tokens: of theirs after it, computed because of it.
    """

    position: int
    num_requests: int
    lost_tokens: int


@dataclasses.dataclass(slots=True)
class _Place:
    num_requests: int = 0
    lost_tokens: int = 0


@final
class TemplateBreaks:
    """Counts partings by what prompts share (the first page of it) and by position."""

    def __init__(self) -> None:
        self._places: dict[tuple[bytes, int], _Place] = {}

    def observe(self, match: HostMatch, prompt: Sequence[int], page_size: int) -> None:
        """Looks at a prompt that the cache held in part: ``match`` says how far, and where it ended."""
        done = match.num_pages * page_size
        if len(prompt) - done < MIN_LOST_TOKENS:
            return
        tokens = pack(prompt[done : done + page_size + _PROBES[-1] + _PROBE_TOKENS])
        node = match.node
        if match.num_here < len(node.pages):
            others = [node.tokens[match.num_here * page_size * _TOKEN_BYTES :]]
        else:
            newest = itertools.islice(reversed(node.children.values()), _MOST_SIBLINGS)
            others = [child.tokens for child in newest]
        for other in others:
            shared = _common_tokens(other, tokens)
            if _goes_on_alike(other, tokens, shared):
                position = done + shared
                self._count(pack(prompt[: min(position, page_size)]), position, len(prompt) - position)
                return

    def _count(self, prefix: bytes, position: int, lost_tokens: int) -> None:
        place = self._places.get((prefix, position))
        if place is None:
            if len(self._places) >= _MOST_PLACES:
                del self._places[min(self._places, key=lambda key: self._places[key].lost_tokens)]
            place = self._places[prefix, position] = _Place()
        place.num_requests += 1
        place.lost_tokens += lost_tokens

    def worst(self, count: int = 5) -> list[TemplateBreak]:
        """The places that cost most tokens, worst first."""
        breaks = [
            TemplateBreak(key[1], p.num_requests, p.lost_tokens) for key, p in list(self._places.items())
        ]
        return sorted(breaks, key=lambda place: (-place.lost_tokens, place.position))[:count]


def _common_tokens(a: bytes, b: bytes) -> int:
    """Leading tokens that both have."""
    low, high = 0, min(len(a), len(b)) // _TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        end = middle * _TOKEN_BYTES
        if a[:end] == b[:end]:
            low = middle
        else:
            high = middle - 1
    return low


def _goes_on_alike(cached: bytes, tokens: bytes, shared: int) -> bool:
    """Whether words of ``tokens`` soon after position ``shared`` are also in ``cached`` soon after it."""
    begin = shared * _TOKEN_BYTES
    text = cached[begin : begin + _SEARCHED_TOKENS * _TOKEN_BYTES]
    for distance in _PROBES:
        start = begin + distance * _TOKEN_BYTES
        probe = tokens[start : start + _PROBE_TOKENS * _TOKEN_BYTES]
        if len(probe) < _PROBE_TOKENS * _TOKEN_BYTES:
            return False
        at = text.find(probe)
        while at >= 0 and at % _TOKEN_BYTES:
            at = text.find(probe, at + 1)
        if at >= 0:
            return True
    return False
