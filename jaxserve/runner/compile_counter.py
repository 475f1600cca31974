"""Counts XLA compilations: to prove that none happens after warm-up, and to see which were spared."""

from __future__ import annotations

import functools
import threading

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Compilations of this process since the first use."""

    def __init__(self) -> None:
        self.count = 0
        self._here = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._on_compile)
        jax.monitoring.register_event_listener(self._on_event)

    @property
    def misses_here(self) -> int:
        """Compilations of the calling thread, without what was in the compile cache."""
        return getattr(self._here, "misses", 0)

    def _on_compile(self, event: str, duration_secs: float, **_: str | int) -> None:
        """JAX calls it at the end of each compilation, loads from the compile cache included."""
        if event == _COMPILE_EVENT:
            self.count += 1
            self._here.misses = self.misses_here + 1

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _HIT_EVENT:
            self._here.misses = self.misses_here - 1


@functools.cache
def compile_counter() -> CompileCounter:
    """The one counter: JAX keeps listeners for the life of the process, so there must not be many."""
    return CompileCounter()
