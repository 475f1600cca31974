"""Outputs on the wire: the server sends what is new, the client adds it up again."""

from __future__ import annotations

import dataclasses

from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxserve.request import FinishReason
from jaxserve.server.protos.jaxserve.v1 import inference_pb2 as pb

_TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FROM_WIRE = {wire: reason for reason, wire in _TO_WIRE.items()}


@dataclasses.dataclass(slots=True)
class _Sent:
    """How much of one completion has been sent."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False


class DeltaEncoder:
    """Turns the cumulative outputs of one request into messages that hold only what is new."""

    def __init__(self, options: pb.ResponseOptions, model_name: str) -> None:
        self._sends_text = options.output_text if options.HasField("output_text") else True
        self._sends_ids = options.token_ids
        self._sends_prompt_ids = options.prompt_token_ids
        self._model_name = model_name
        self._sent: dict[int, _Sent] = {}
        self._is_first = True

    def encode(self, output: RequestOutput) -> pb.GenerateResponse | None:
        """The next message, or None if there is nothing new. Costs as much as what is new."""
        message = pb.GenerateResponse()
        if self._is_first:
            message.prompt.request_id = output.request_id
            message.prompt.model = self._model_name
            message.prompt.num_tokens = len(output.prompt_token_ids)
            if self._sends_prompt_ids:
                message.prompt.token_ids.extend(output.prompt_token_ids)
        for completion in output.outputs:
            self._encode_completion(completion, message)
        if output.finished:
            message.usage.prompt_tokens = len(output.prompt_token_ids)
            message.usage.completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
            message.usage.cached_tokens = output.metrics.num_cached_tokens
            _encode_timings(output.metrics, message.timings)
        if not (self._is_first or message.outputs or output.finished):
            return None
        self._is_first = False
        return message

    def _encode_completion(self, completion: CompletionOutput, message: pb.GenerateResponse) -> None:
        sent = self._sent.setdefault(completion.index, _Sent())
        text = completion.text[sent.num_chars :] if self._sends_text else ""
        first_new, num_tokens = sent.num_tokens, len(completion.token_ids)
        has_tokens = num_tokens > first_new and (self._sends_ids or completion.logprobs is not None)
        if sent.finished or not (text or has_tokens or completion.finish_reason):
            return
        new = message.outputs.add(index=completion.index, text=text)
        if self._sends_ids:
            new.token_ids.extend(completion.token_ids[first_new:])
        if completion.logprobs is not None:
            for position in range(first_new, num_tokens):
                _encode_logprobs(
                    completion.token_ids[position], completion.logprobs[position], new.logprobs.add()
                )
        if completion.finish_reason is not None:
            _encode_finish(completion, new.finish)
        sent.num_chars += len(text)
        sent.num_tokens = num_tokens
        sent.finished = completion.finish_reason is not None


class OutputBuilder:
    """Adds a stream's messages up to cumulative `RequestOutput`s.

    A request without token ids (``ResponseOptions.token_ids`` unset) yields completions whose
    ``token_ids`` are empty.
    """

    def __init__(self, prompt: str | None, prompt_token_ids: list[int], num_completions: int) -> None:
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._request_id = ""
        self._completions = {index: CompletionOutput(index=index) for index in range(num_completions)}
        self._metrics = RequestMetrics(arrival_time=0.0)

    def add(self, message: pb.GenerateResponse) -> RequestOutput:
        """The output with this message in it; earlier ones are not touched. Times count from the arrival."""
        if message.HasField("prompt"):
            self._request_id = message.prompt.request_id
            if message.prompt.token_ids:
                self._prompt_token_ids = list(message.prompt.token_ids)
        for new in message.outputs:
            self._completions[new.index] = _extended(self._completions[new.index], new)
        if message.HasField("timings"):
            self._metrics = _decode_metrics(message)
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=list(self._completions.values()),
            finished=message.HasField("usage"),
            metrics=self._metrics,
        )


def _extended(old: CompletionOutput, new: pb.SequenceOutput) -> CompletionOutput:
    logprobs = old.logprobs
    if new.logprobs:
        logprobs = [*(logprobs or []), *map(_decode_logprobs, new.logprobs)]
    extended = CompletionOutput(
        index=old.index,
        text=old.text + new.text,
        token_ids=[*old.token_ids, *new.token_ids],
        logprobs=logprobs,
    )
    if new.HasField("finish"):
        extended.finish_reason = _FROM_WIRE[new.finish.reason]
        stop = new.finish.WhichOneof("stop")
        extended.stop_reason = None if stop is None else getattr(new.finish, stop)
        extended.error = new.finish.error or None
    return extended


def _encode_finish(completion: CompletionOutput, finish: pb.Finish) -> None:
    if completion.finish_reason is not None:
        finish.reason = _TO_WIRE[completion.finish_reason]
    if isinstance(completion.stop_reason, str):
        finish.text = completion.stop_reason
    elif completion.stop_reason is not None:
        finish.token_id = completion.stop_reason
    if completion.error is not None:
        finish.error = completion.error


def _encode_logprobs(chosen: int, step: dict[int, Logprob], message: pb.PositionLogprobs) -> None:
    for token_id in sorted(
        step, key=lambda token_id: token_id != chosen
    ):  # stable: the rest keep their order
        logprob = step[token_id]
        message.candidates.add(
            token_id=token_id, logprob=logprob.logprob, rank=logprob.rank, token=logprob.decoded_token
        )


def _decode_logprobs(message: pb.PositionLogprobs) -> dict[int, Logprob]:
    return {
        candidate.token_id: Logprob(
            candidate.logprob,
            candidate.rank if candidate.HasField("rank") else None,
            candidate.token if candidate.HasField("token") else None,
        )
        for candidate in message.candidates
    }


def _encode_timings(metrics: RequestMetrics, timings: pb.Timings) -> None:
    for name in ("first_scheduled", "first_token", "finish"):
        time = getattr(metrics, f"{name}_time")
        if time is not None:
            setattr(timings, f"{name}_s", time - metrics.arrival_time)
    timings.num_preemptions = metrics.num_preemptions


def _decode_metrics(message: pb.GenerateResponse) -> RequestMetrics:
    timings = message.timings
    times = {
        f"{name}_time": getattr(timings, f"{name}_s") if timings.HasField(f"{name}_s") else None
        for name in ("first_scheduled", "first_token", "finish")
    }
    return RequestMetrics(
        arrival_time=0.0,
        num_preemptions=timings.num_preemptions,
        num_cached_tokens=message.usage.cached_tokens,
        **times,
    )
