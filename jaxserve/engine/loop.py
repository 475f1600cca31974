"""The engine's thread: takes commands, steps, hands out outputs.

A library sets no signal handlers and owns no event loop: callers on any thread, in any event loop or in a
notebook talk to this thread through a queue, and get their outputs in a mailbox of their own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from jaxserve.core.updates import StepUpdates
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.input_processor import RequestGroup
from jaxserve.engine.output_processor import OutputProcessor, TrackedGroup
from jaxserve.errors import DuplicateRequestError, EngineClosedError, QueueFullError
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import FinishReason

_LOG = logging.getLogger(__name__)

# A mailbox is called on the engine's thread, once a step, with all outputs of its requests.
type Mailbox = Callable[[list[RequestOutput]], None]

_IDLE_POLL_S = 0.001  # work is queued but none may start yet: a batching window, a result due
_RETRY_AFTER_S = 1.0


class EngineLoop:
    """Owns an `EngineCore` and the thread that steps it. Methods may be called from any thread."""

    def __init__(self, core: EngineCore[Any], tokenizer: Tokenizer, max_alive: int) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._outputs = OutputProcessor(self._end_at_stop_string)
        self._max_alive = max_alive
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._mailboxes: dict[str, Mailbox] = {}
        self._num_alive = 0  # requests, not groups
        self._closing = False
        self._refusal: str | None = None
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @property
    def core(self) -> EngineCore[Any]:
        return self._core

    @property
    def is_healthy(self) -> bool:
        """Whether new requests are taken."""
        return self._refusal is None and self._thread.is_alive()

    @property
    def num_alive(self) -> int:
        """Unfinished groups."""
        return len(self._mailboxes)

    def submit(self, group: RequestGroup, mailbox: Mailbox, *, streams: bool) -> None:
        """Queues a group; its outputs go to the mailbox, the last with ``finished`` set.

        Raises:
            EngineClosedError: the engine is closed, draining or dead.
            DuplicateRequestError: a group of this id is alive.
            QueueFullError: too many requests are alive.
        """
        tracked = TrackedGroup(group, streams, self._tokenizer)
        with self._wake:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            if group.id in self._mailboxes:
                raise DuplicateRequestError("request_id", group.id, "a request with this id is still running")
            if self._num_alive + len(group.requests) > self._max_alive:
                raise QueueFullError(
                    f"{self._num_alive} requests are alive, at most {self._max_alive} may be; try again",
                    _RETRY_AFTER_S,
                )
            self._mailboxes[group.id] = mailbox
            self._num_alive += len(group.requests)
            self._commands.append(lambda: self._add(tracked))
            self._wake.notify()

    def abort(self, group_id: str, *, only: RequestGroup | None = None) -> None:
        """Ends a group if it is alive; its mailbox gets a last output with finish reason ``abort``.

        With ``only``, another group that has taken the id since then goes on.
        """
        with self._wake:
            self._commands.append(lambda: self._abort(group_id, only))
            self._wake.notify()

    def refuse(self, why: str) -> None:
        """Takes no more requests; those alive go on."""
        with self._wake:
            self._refusal = self._refusal or why

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for those alive; returns whether all finished in time."""
        self.refuse("the engine is draining")
        deadline = time.monotonic() + timeout_s
        while self._mailboxes and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.01)
        return not self._mailboxes

    def close(self) -> None:
        """Aborts what is alive and stops the thread. May be called twice."""
        with self._wake:
            self._refusal = "the engine is closed"
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ------------------------------------------------------------------ on the engine's thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step()
        except Exception as error:  # noqa: BLE001 - whatever broke, every caller must hear of it
            _LOG.exception("the engine failed")
            message = f"the engine failed: {type(error).__name__}: {error}"
            self.refuse(message)
            self._end_everybody(message)

    def _end_everybody(self, message: str) -> None:
        """Nobody may wait for ever, however broken the engine's state is."""
        updates = StepUpdates()
        while True:
            with contextlib.suppress(Exception):
                self._take_waiting_commands()
                updates = self._core.stop(FinishReason.ERROR, message)
            if not self._commands:
                break
        with contextlib.suppress(Exception):
            self._deliver(self._outputs.process(updates))
        self._deliver(self._outputs.fail_rest(message))

    def _take_commands(self) -> bool:
        """Runs what callers asked for; sleeps while there is nothing to do. False ends the thread."""
        with self._wake:
            while not (self._commands or self._core.has_work or self._closing):
                self._wake.wait()
            closing = self._closing
        self._take_waiting_commands()
        if closing:
            updates = self._core.stop(FinishReason.ABORT, "the engine was closed")
            self._deliver(self._outputs.process(updates))
        return not closing

    def _take_waiting_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _step(self) -> None:
        before = self._core.stats.steps, self._core.scheduler.num_in_flight
        outputs = self._outputs.process(self._core.step())
        if outputs:
            self._deliver(outputs)
        elif before == (self._core.stats.steps, self._core.scheduler.num_in_flight) and self._core.has_work:
            with self._wake:
                if not self._commands and not self._closing:
                    self._wake.wait(_IDLE_POLL_S)

    def _add(self, tracked: TrackedGroup) -> None:
        self._outputs.add(tracked)
        for request in tracked.group.requests:
            self._core.add(request)

    def _abort(self, group_id: str, only: RequestGroup | None) -> None:
        for request_id in self._outputs.request_ids(group_id, only):
            self._core.end(request_id, FinishReason.ABORT)

    def _end_at_stop_string(self, request_id: str, stop: str) -> None:
        self._core.end(request_id, FinishReason.STOP, stop_reason=stop)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        by_mailbox: dict[Mailbox, list[RequestOutput]] = {}
        with self._wake:
            for output in outputs:
                mailbox = self._mailboxes[output.request_id]
                by_mailbox.setdefault(mailbox, []).append(output)
                if output.finished:
                    del self._mailboxes[output.request_id]
                    self._num_alive -= len(output.outputs)
        for mailbox, mine in by_mailbox.items():
            mailbox(mine)
