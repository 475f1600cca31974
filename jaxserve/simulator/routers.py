"""Which engine of a cluster a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from jaxserve.simulator.instance import Instance


class Router(Protocol):
    """Asked in order of arrival."""

    def choose(self, index: int, instances: Sequence[Instance]) -> int:
        """The engine of request number ``index``."""
        ...


@final
class RoundRobin:
    """In turn; looks at nothing."""

    def choose(self, index: int, instances: Sequence[Instance]) -> int:
        return index % len(instances)


@final
class LeastLoad:
    """To the engine whose living requests have the fewest tokens, prompts and predicted outputs."""

    def choose(self, index: int, instances: Sequence[Instance]) -> int:
        return min(range(len(instances)), key=lambda i: (instances[i].load_tokens, i))


ROUTERS: dict[str, type[Router]] = {"round_robin": RoundRobin, "least_load": LeastLoad}
