"""The synchronous Python API, for scripts and notebooks."""

from __future__ import annotations

import html
import numbers
import queue
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence, Set
from typing import Any, Self, cast

from tqdm import tqdm

from jaxserve.config import EngineConfig
from jaxserve.engine.build import Engine, build_engine
from jaxserve.engine.input_processor import Messages, Prompt, RequestGroup
from jaxserve.errors import ValidationError
from jaxserve.loading.tokenizer import Tokenizer
from jaxserve.outputs import RequestOutput
from jaxserve.request import SamplingParams

# A script's prompts wait for each other anyway: it may queue more of them than a server lets strangers do.
_MAX_QUEUED_REQUESTS = 1_000_000


class InterruptedGenerationError(KeyboardInterrupt):
    """Ctrl-C during `LLM.generate`. The call's requests were aborted; the engine goes on.

    Attributes:
        partial: outputs by prompt, unfinished ones with finish reason ``abort``; None where none came.
    """

    def __init__(self, partial: list[RequestOutput | None]) -> None:
        self.partial = partial
        done = sum(output is not None and output.outputs[0].finish_reason != "abort" for output in partial)
        super().__init__(f"interrupted; {done} of {len(partial)} prompts were finished")


class LLM:
    """A model in this process.

        with LLM(model="smollm2-135m-instruct", dtype="float32") as llm:
            print(llm.chat([{"role": "user", "content": "Hello!"}])[0].outputs[0].text)

    The engine runs on a thread of its own, so this works under a running event loop (notebooks) as well.
    """

    def __init__(self, model: str | None = None, *, use_tqdm: bool = True, **options: Any) -> None:
        """Loads, compiles and starts.

        Args:
            model: catalogue name, local folder, ``.gguf`` file or hub name.
            use_tqdm: show progress while loading and compiling.
            options: any field of `jaxserve.config.EngineConfig`'s sections, e.g. ``dtype="bfloat16"``,
                ``max_num_seqs=8``, ``tensor_parallel_size=2``.

        Raises:
            ConfigError, ModelNotFoundError, CheckpointError: before anything was started.
        """
        if model is not None:
            options["model"] = model
        options.setdefault("max_queued_requests", _MAX_QUEUED_REQUESTS)
        self._engine = build_engine(EngineConfig.from_flat(options), progress=use_tqdm)
        # A notebook cell that is run again drops its LLM without closing it; the engine's thread would keep
        # weights and pages for ever.
        weakref.finalize(self, self._engine.close)

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """Wraps an engine that was built elsewhere."""
        self = cls.__new__(cls)
        self._engine = engine
        return self

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Completes prompts, batched continuously; returns one output a prompt, in order.

        Args:
            prompts: one prompt or a list of them; a prompt is a string, a list of token ids,
                ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``. ``[]`` is none, and gives ``[]``.
            sampling_params: for all prompts, or one for each. Default: ``SamplingParams()``, 16 tokens.
            use_tqdm: show a progress bar.
            priority: of all of them, under ``ordering="priority"``; lower runs earlier.
            client: whose they are, under orderings that are fair to clients.
            cache_salt: cached prefixes are shared with requests of the same salt only.

        Raises:
            ValidationError: for the first prompt that is not allowed; nothing was started.
            InterruptedGenerationError: on Ctrl-C; holds what was done.
        """
        listed = _listed(prompts)
        params = _params_for(listed, sampling_params, SamplingParams())
        make = self._engine.inputs.from_prompt
        groups = [
            make(prompt, p, priority=priority, client=client, cache_salt=cache_salt)
            for prompt, p in zip(listed, params, strict=True)
        ]
        return self._run(groups, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        client: str = "",
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answers one conversation, or several; each is a list of ``{"role": ..., "content": ...}``.

        ``[]`` is no conversations, and gives ``[]``; ``[[]]`` is one without messages, an error.
        Default parameters: as long as the model goes on or the context allows. Otherwise as `generate`.
        """
        if not isinstance(messages, Sequence):
            raise ValidationError("messages", messages, "must be a list of {'role': ..., 'content': ...}")
        is_one = len(messages) > 0 and isinstance(messages[0], Mapping)
        listed = [cast(Messages, messages)] if is_one else list(cast(Sequence[Messages], messages))
        params = _params_for(listed, sampling_params, SamplingParams(max_tokens=None))
        make = self._engine.inputs.from_messages
        groups = [
            make(chat, p, client=client, cache_salt=cache_salt)
            for chat, p in zip(listed, params, strict=True)
        ]
        return self._run(groups, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        client: str = "",
        cache_salt: str = "",
    ) -> Generator[RequestOutput]:
        """Completes one prompt, yielding everything generated so far after each step."""
        params = sampling_params or SamplingParams()
        return self._stream(
            self._engine.inputs.from_prompt(prompt, params, client=client, cache_salt=cache_salt)
        )

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        client: str = "",
        cache_salt: str = "",
    ) -> Generator[RequestOutput]:
        """Answers one conversation, yielding everything generated so far after each step."""
        params = sampling_params or SamplingParams(max_tokens=None)
        return self._stream(
            self._engine.inputs.from_messages(messages, params, client=client, cache_salt=cache_salt)
        )

    def stats(self) -> dict[str, Any]:
        """A snapshot of queues, pages, stages and padding."""
        return self._engine.stats()

    def close(self) -> None:
        """Aborts what is running and frees the device's memory. May be called twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({', '.join(f'{key}={value}' for key, value in self._engine.description.items())})"

    def _repr_html_(self) -> str:
        """Rich display in notebooks."""
        rows = "".join(
            f"<tr><td>{key}</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in self._engine.description.items()
        )
        return f"<table><caption>jaxserve.LLM</caption>{rows}</table>"

    def _run(self, groups: list[RequestGroup], use_tqdm: bool) -> list[RequestOutput]:
        inbox: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
        outputs: dict[str, RequestOutput] = {}
        submitted: list[RequestGroup] = []
        with tqdm(total=len(groups), desc="generating", unit="prompt", disable=not use_tqdm) as bar:
            try:
                for group in groups:
                    self._engine.loop.submit(group, inbox.put, streams=False)
                    submitted.append(group)
                while len(outputs) < len(groups):
                    for output in inbox.get():
                        outputs[output.request_id] = output
                        bar.update()
            except BaseException as error:
                for group in submitted:
                    self._engine.loop.abort(group.id)
                while len(outputs) < len(submitted):
                    outputs.update((output.request_id, output) for output in inbox.get())
                if isinstance(error, KeyboardInterrupt):
                    raise InterruptedGenerationError([outputs.get(group.id) for group in groups]) from None
                raise
        return [outputs[group.id] for group in groups]

    def _stream(self, group: RequestGroup) -> Generator[RequestOutput]:
        inbox: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
        self._engine.loop.submit(group, inbox.put, streams=True)
        finished = False
        try:
            while not finished:
                for output in inbox.get():
                    finished = output.finished
                    yield output
        finally:
            if not finished:
                self._engine.loop.abort(group.id)


def _listed(prompts: Any) -> list[Prompt]:
    """One prompt or several as a list; numpy's arrays and integers are lists and integers, too."""
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Set):
        raise ValidationError("prompts", prompts, "must be a prompt or a list of prompts")
    items = list(cast(Iterable[Any], prompts))
    return [items] if items and isinstance(items[0], numbers.Integral) else items


def _params_for[T](
    items: list[T], params: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams
) -> list[SamplingParams]:
    if params is None:
        return [default] * len(items)
    if not isinstance(params, Sequence):
        return [params] * len(items)  # one for all, if it is one
    if len(params) != len(items):
        raise ValidationError(
            "sampling_params", f"<{len(params)} entries>", f"must have one entry a prompt ({len(items)})"
        )
    return list(params)
