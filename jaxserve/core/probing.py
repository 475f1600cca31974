"""Which running requests have their hidden states looked at, when, and who hears of it. No jax.

A *probe* reads, on the device, the hidden state from which a request's next token was sampled: to predict how
many tokens are still to come, to record it as training data, or both. It is launched behind the step that
wrote the state and read when a later step has been: by then it is done, so nobody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from jaxserve.core.plan import StepPlan
from jaxserve.request import Request

# Tokens of a row between two looks for who is due: a launch for several rows costs what one for a row does.
_STRIDE = 4


class Probe(NamedTuple):
    """One request's hidden state.

    Attributes:
        slot: where it is.
        generated: output tokens that it has seen; the remaining ones are counted from here.
        prompt_tokens: of the request.
    """

    slot: int
    generated: int
    prompt_tokens: int


class ProbeResult(NamedTuple):
    """What a probe read, a row for each `Probe`; None for what the engine was not built to give.

    Attributes:
        states: float16 [n, layers, D], each divided by its root mean square.
        log_remaining: float32 [n, 3], the quantiles 0.1, 0.5, 0.9 of log(1 + remaining tokens), increasing.
    """

    states: npt.NDArray[Any] | None
    log_remaining: npt.NDArray[Any] | None


class Prober[Handle](Protocol):
    """What an executor can do beside running steps, if it was built to."""

    def launch_probe(self, probes: Sequence[Probe]) -> Handle:
        """Reads the states as the step dispatched last leaves them; returns before they are there."""
        ...

    def read_probe(self, handle: Handle) -> ProbeResult:
        """Called once the result of a step dispatched after the probe has been read: does not wait."""
        ...


class Landed(NamedTuple):
    """A probe that was read: its row in ``result``."""

    request: Request
    probe: Probe
    result: ProbeResult
    row: int


class _Launched[Handle](NamedTuple):
    step: int
    requests: list[Request]
    probes: list[Probe]
    handle: Handle


class Probing[Handle]:
    """Launches and reads probes for an engine's step loop; one thread.

    Args:
        prober: the executor.
        interval: output tokens between two probes of a request, at least; the first comes with the first
            tokens.
    """

    def __init__(self, prober: Prober[Handle], interval: int) -> None:
        self._prober = prober
        self._interval = interval
        self._last: dict[Request, int] = {}  # tokens that a request had generated at its newest probe
        self._launched: deque[_Launched[Handle]] = deque()
        self.num_launches = 0
        self.num_probes = 0

    def dispatched(self, plan: StepPlan, owner: Callable[[str], Request | None]) -> None:
        """Call when a step was dispatched; ``owner`` gives live requests by id."""
        if plan.step % max(_STRIDE // plan.bucket.decode_steps, 1):
            return
        requests: list[Request] = []
        probes: list[Probe] = []
        for row in plan.rows:
            request = owner(row.request_id) if row.samples else None
            if request is None:
                continue
            generated = row.start + row.num_tokens - request.num_prompt_tokens
            last = self._last.get(request)
            if last is None or generated - last >= self._interval:
                self._last[request] = generated
                requests.append(request)
                probes.append(Probe(row.slot, generated, request.num_prompt_tokens))
        if probes:
            handle = self._prober.launch_probe(probes)
            self._launched.append(_Launched(plan.step, requests, probes, handle))
            self.num_launches += 1
            self.num_probes += len(probes)

    def landed(self, collected_step: int) -> list[Landed]:
        """Call when a step's result was read: the probes that were launched before that step."""
        found: list[Landed] = []
        while self._launched and self._launched[0].step < collected_step:
            launched = self._launched.popleft()
            result = self._prober.read_probe(launched.handle)
            found += [
                Landed(request, probe, result, row)
                for row, (request, probe) in enumerate(zip(launched.requests, launched.probes, strict=True))
            ]
        return found

    def finished(self, request: Request) -> None:
        """Forgets a request."""
        self._last.pop(request, None)

    def drop_in_flight(self) -> None:
        """Forgets what an executor that failed was asked."""
        self._launched.clear()
