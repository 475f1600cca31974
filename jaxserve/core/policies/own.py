"""Policies from files of their own: ``FILE.py:CLASS`` wherever a policy's name may stand.

Such a file is code, and runs with the engine's rights: only options and command lines name one, no request,
and no recording (`jaxserve.engine.recording.read_recording`).
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from jaxserve.config import OWN_POLICY
from jaxserve.core.policy import PolicyContext
from jaxserve.errors import ConfigError

# The option that names a policy, and the method by which a class is one for it.
METHODS: Final = {
    "ordering": "key",
    "batching": "quota",
    "capacity": "has_room",
    "composition": "prefill_tokens",
    "victim": "choose",
}


def own_class(name: str) -> type[Any]:
    """The class that ``FILE.py:CLASS`` names. A file is run once. Raises ConfigError."""
    if not OWN_POLICY.fullmatch(name):
        raise ConfigError(f"policy {name!r}: must be FILE.py:CLASS")
    file, _, class_name = name.rpartition(":")
    found = getattr(_module(Path(file).expanduser().resolve()), class_name, None)
    if not isinstance(found, type):
        raise ConfigError(f"policy {name!r}: the file has no class {class_name!r}")
    return found


def own_option(name: str) -> str:
    """The option for which ``FILE.py:CLASS`` is a policy. Raises ConfigError."""
    for option in METHODS:
        if is_policy(option, name):
            return option
    raise ConfigError(f"policy {name!r}: has no method {', '.join(METHODS.values())}")


def is_policy(option: str, name: str) -> bool:
    """Whether the class that ``FILE.py:CLASS`` names is a policy for an option. Raises ConfigError."""
    return callable(getattr(own_class(name), METHODS[option], None))


def own_policy(option: str, name: str, context: PolicyContext) -> Any:
    """The policy, by its ``from_context(context)`` if it has one, else without arguments.

    Raises:
        ConfigError: for a class that is no such policy, or cannot be made.
    """
    if not is_policy(option, name):
        raise ConfigError(f"{option}={name!r}: has no method {METHODS[option]!r}")
    found = own_class(name)
    if hasattr(found, "from_context"):
        return found.from_context(context)
    try:
        return found()
    except TypeError as error:
        raise ConfigError(f"{option}={name!r}: has no from_context, and {error}") from error


@functools.cache
def _module(path: Path) -> ModuleType:
    """The file, run as a module that `sys.modules` has, as dataclasses need. Raises ConfigError."""
    name = f"jaxserve_own_{re.sub(r'\W', '_', str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"policy {path}: no such Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"policy {path}: {type(error).__name__}: {error}") from error
    return module
