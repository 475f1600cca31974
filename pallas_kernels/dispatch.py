"""The one loop that picks an implementation of an operation.

An implementation refuses an input by raising `NotImplementedError` while it is traced, with the reason; the
next one in the platform's order is tried. Any other exception is a bug and passes through.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AUTO = "auto"

_LOG = logging.getLogger(__name__)


class NoImplementationError(ExceptionGroup[NotImplementedError]):
    """Every implementation that the platform has refused the input; holds each one's reason."""

    def derive(self, excs: Sequence[NotImplementedError], /) -> NoImplementationError:  # pyright: ignore[reportIncompatibleMethodOverride]
        return NoImplementationError(self.message, excs)


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """An operation and its implementations.

    Attributes:
        name: for messages.
        implementations: name -> ``"module:function"``, imported when it is first tried; all take the same
            arguments.
        order: platform (as `jax.default_backend` names it) -> names that ``"auto"`` tries, best first.
    """

    name: str
    implementations: Mapping[str, str]
    order: Mapping[str, Sequence[str]]

    def __call__(self, *args: Any, implementation: str, platform: str, **kwargs: Any) -> Any:
        """Runs the implementation of that name, or the platform's first that takes the input.

        Raises:
            ValueError: if there is no implementation of that name.
            NotImplementedError: if the implementation that was asked for by name refuses the input.
            NoImplementationError: if with ``"auto"`` all of the platform's refuse.
        """
        if implementation != AUTO:
            return self._load(implementation)(*args, **kwargs)
        names = self.order.get(platform)
        if names is None:
            raise ValueError(f"platform={platform!r}: {self.name} knows {', '.join(self.order)}")
        refusals: list[NotImplementedError] = []
        for name in names:
            try:
                result = self._load(name)(*args, **kwargs)
            except NotImplementedError as refusal:
                refusal.add_note(f"from the {name!r} implementation of {self.name}")
                refusals.append(refusal)
            else:
                _announce(self.name, name, platform, tuple(map(str, refusals)))
                return result
        raise NoImplementationError(
            f"no implementation of {self.name} on {platform} takes this input", refusals
        )

    def _load(self, name: str) -> Callable[..., Any]:
        target = self.implementations.get(name)
        if target is None:
            known = ", ".join((AUTO, *self.implementations))
            raise ValueError(f"implementation={name!r}: {self.name} has {known}")
        module, function = target.split(":")
        return getattr(importlib.import_module(module), function)


@functools.cache  # once each, not in every trace
def _announce(operation: str, name: str, platform: str, refusals: tuple[str, ...]) -> None:
    reasons = "".join(f" ({refusal})" for refusal in refusals)
    _LOG.info("%s on %s: %s%s", operation, platform, name, reasons)
