"""What to do about a device that has no memory left: say what to lower, or give up one step."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import jax

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.runner.resolve import ResolvedConfig

# What XLA and the allocation of host arrays raise.
ALLOCATION_ERRORS = (jax.errors.JaxRuntimeError, MemoryError)
_SHOWN_CHARS = 200


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of XLA, or of the host's allocator, says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    # A driver that has none left for itself reports an internal error.
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "resource_exhausted" in text or "out of memory" in text or "out_of_memory" in text
    )


def reason(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_SHOWN_CHARS]


def what_to_lower(config: EngineConfig, resolved: ResolvedConfig) -> str:
    """The sizes that pages and steps take their memory by."""
    pages = f"num_pages={resolved.num_pages}"
    if config.cache.num_pages is None:
        pages = f"memory_fraction={config.cache.memory_fraction} or {pages}"
    return (
        f"lower {pages}, max_num_seqs={resolved.num_slots} or "
        f"max_num_batched_tokens={resolved.ladder.token_budget}"
    )


@contextlib.contextmanager
def naming_what_to_lower(what: str, lower: str) -> Generator[None]:
    """Raises ConfigError where memory runs out while an engine starts.

    Args:
        what: is being done, after "out of memory while".
        lower: the options that would help, with their values.
    """
    try:
        yield
    except ALLOCATION_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory while {what} ({reason(error)}); {lower}") from error
