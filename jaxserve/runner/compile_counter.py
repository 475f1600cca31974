"""Counts XLA compilations, to prove that none happens after warm-up."""

from __future__ import annotations

import functools

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Total compilations of this process since the first use; loads from the compile cache count as well."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1


@functools.cache
def compile_counter() -> CompileCounter:
    """The one counter: JAX keeps listeners for the life of the process, so there must not be many."""
    return CompileCounter()
