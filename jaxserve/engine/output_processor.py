"""From the scheduler's updates to what callers see: text, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.core.plan import TopLogprobs
from jaxserve.core.updates import StepUpdates
from jaxserve.engine.input_processor import RequestGroup
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxserve.request import FinishReason, Request

type EndRequest = Callable[[str, str], None]  # (request id, stop string found in its text)


class _Completion:
    """One request's growing output."""

    __slots__ = ("_detokenizer", "_stops", "_tokenizer", "output", "request", "text")

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text = ""
        self.output = CompletionOutput(index, logprobs=None if request.params.logprobs is None else [])
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.stream(skip_special_tokens=request.params.skip_special_tokens)
        self._stops = request.params.stop_strings

    def add(self, token_id: int, logprobs: TopLogprobs | None) -> str | None:
        """Takes a token; returns the stop string that its text completes, if any."""
        output = self.output
        output.token_ids.append(token_id)
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(self._logprobs(token_id, logprobs))
        is_end = self.request.finish_reason is FinishReason.STOP and self.request.stop_reason == token_id
        return None if is_end else self._extend(self._detokenizer.push([token_id]))

    def _extend(self, piece: str) -> str | None:
        if not piece:
            return None
        searched = len(self.text)
        self.text += piece
        if len(self.output.token_ids) <= self.request.params.min_tokens:
            return None
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        at, stop = found
        self.text = (
            self.text[: at + len(stop)] if self.request.params.include_stop_str_in_output else self.text[:at]
        )
        return stop

    def finish(self, reason: FinishReason | None, stop_reason: int | str | None) -> str | None:
        """Ends the completion; bytes of an unfinished character become text, which may hold a stop string."""
        stop = None if isinstance(stop_reason, str) else self._extend(self._detokenizer.flush())
        self.output.text = self.text
        self.output.finish_reason = FinishReason.STOP if stop is not None else reason
        self.output.stop_reason = stop if stop is not None else stop_reason
        self.output.error = self.request.error
        return stop

    def snapshot(self) -> CompletionOutput:
        """The output so far; text that may yet turn out to begin a stop string is held back."""
        output = self.output
        if output.finish_reason is not None:
            return output
        logprobs = None if output.logprobs is None else list(output.logprobs)
        text = self.text[: len(self.text) - self._held_back()] if self._stops else self.text
        return CompletionOutput(output.index, text, list(output.token_ids), logprobs)

    def _held_back(self) -> int:
        longest = 0
        for stop in self._stops:
            tail = self.text[len(self.text) - min(len(stop) - 1, len(self.text)) :]
            # Only where the string's first character stands: stop strings may be many and long.
            at = tail.find(stop[0])
            while at >= 0 and len(tail) - at > longest:
                if stop.startswith(tail[at:]):
                    longest = len(tail) - at
                at = tail.find(stop[0], at + 1)
        return longest

    def _logprobs(self, token_id: int, top: TopLogprobs) -> dict[int, Logprob]:
        decode = self._tokenizer.decode
        best = {
            other: Logprob(logprob, rank, decode([other]))
            for rank, (other, logprob) in enumerate(zip(top.token_ids, top.logprobs, strict=True), start=1)
        }
        best.setdefault(token_id, Logprob(top.chosen, top.rank, decode([token_id])))
        return best


class TrackedGroup:
    """One prompt's completions.

    Made by the caller's thread: what goes wrong with one request is its caller's, not the engine's.
    """

    __slots__ = ("_metrics", "completions", "group", "num_open", "streams")

    def __init__(self, group: RequestGroup, streams: bool, tokenizer: Tokenizer) -> None:
        """With ``streams`` every step's progress is reported, else only the end."""
        self.group = group
        self.streams = streams
        self.completions = [_Completion(request, i, tokenizer) for i, request in enumerate(group.requests)]
        self.num_open = len(self.completions)
        self._metrics: RequestMetrics | None = None

    def output(self) -> RequestOutput:
        group = self.group
        return RequestOutput(
            request_id=group.id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=[completion.snapshot() for completion in self.completions],
            finished=self.num_open == 0,
            metrics=self._current_metrics(),
        )

    def _current_metrics(self) -> RequestMetrics:
        """Made anew only when something in it changed: most steps of a stream only add a token."""
        requests, metrics, is_done = self.group.requests, self._metrics, self.num_open == 0
        num_preemptions = sum([request.num_preemptions for request in requests])
        if metrics is not None and not is_done and metrics.num_preemptions == num_preemptions:
            return metrics
        first = [r.first_token_time for r in requests if r.first_token_time is not None]
        last = [r.finish_time for r in requests if r.finish_time is not None]
        metrics = RequestMetrics(
            arrival_time=requests[0].arrival_time,
            first_scheduled_time=requests[0].first_scheduled_time,
            first_token_time=min(first, default=None),
            finish_time=max(last, default=None) if is_done else None,
            num_preemptions=num_preemptions,
            num_cached_tokens=requests[0].num_cached_tokens,
        )
        self._metrics = metrics if first else None
        return metrics


class OutputProcessor:
    """Keeps the outputs of live groups. Used by the engine's thread only."""

    def __init__(self, end_request: EndRequest) -> None:
        self._end_request = end_request
        self._groups: dict[str, TrackedGroup] = {}
        self._by_request: dict[Request, tuple[TrackedGroup, _Completion]] = {}

    def add(self, state: TrackedGroup) -> None:
        """Starts tracking a group."""
        self._groups[state.group.id] = state
        for completion in state.completions:
            self._by_request[completion.request] = (state, completion)

    def request_ids(self, group_id: str, only: RequestGroup | None = None) -> list[str]:
        """Ids of a live group's unfinished requests; empty if there is none, or it is not ``only``."""
        state = self._groups.get(group_id)
        if state is None or (only is not None and state.group is not only):
            return []
        return [c.request.id for c in state.completions if c.output.finish_reason is None]

    def process(self, updates: StepUpdates) -> list[RequestOutput]:
        """Applies a step's updates; returns the outputs that their callers should see now."""
        touched: dict[TrackedGroup, None] = {}
        for request, token_id, logprobs in updates.tokens():
            entry = self._by_request.get(request)
            if entry is None:
                continue  # ended by a stop string already
            group, completion = entry
            stop = completion.add(token_id, logprobs)
            if stop is not None:
                self._finish(request, FinishReason.STOP, stop)
                if not request.is_finished:
                    self._end_request(request.id, stop)
            if group.streams or group.num_open == 0:
                touched[group] = None
        for request in updates.ended:
            if request in self._by_request:
                group = self._finish(request, request.finish_reason, request.stop_reason)
                if group.streams or group.num_open == 0:
                    touched[group] = None
        outputs = [group.output() for group in touched]
        for group in touched:
            if group.num_open == 0:
                del self._groups[group.group.id]
        return outputs

    def _finish(self, request: Request, reason: FinishReason | None, stop: int | str | None) -> TrackedGroup:
        group, completion = self._by_request.pop(request)
        completion.finish(reason, stop)
        group.num_open -= 1
        return group

    def fail_rest(self, error: str) -> list[RequestOutput]:
        """Ends whatever is still open: for an engine that lost track of its requests."""
        groups = list(self._groups.values())
        for group in groups:
            for completion in group.completions:
                if completion.output.finish_reason is None:
                    completion.request.error = error
                    completion.finish(FinishReason.ERROR, None)
            group.num_open = 0
        self._groups.clear()
        self._by_request.clear()
        return [group.output() for group in groups]
