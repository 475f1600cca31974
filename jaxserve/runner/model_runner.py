"""The executor that runs steps on JAX devices."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.core.batch import StepBatch, prepare
from jaxserve.core.plan import Admission, Bucket, StepPlan, StepResult, StepRows, TopLogprobs
from jaxserve.core.probing import Probe, ProbeResult
from jaxserve.core.resume_costs import NO_HOST, HostTier
from jaxserve.errors import StepFailedError
from jaxserve.models.decoder import Decoder
from jaxserve.models.pairs import pair_views
from jaxserve.models.params import Params
from jaxserve.models.sharding import Placement
from jaxserve.pallas_kernels.ragged_paged_attention.api import Implementation
from jaxserve.runner.compile_counter import compile_counter
from jaxserve.runner.kv_cache import cache_shapes
from jaxserve.runner.out_of_memory import ALLOCATION_ERRORS, is_out_of_memory, reason
from jaxserve.runner.page_swap import PageSwapper
from jaxserve.runner.probes import ProbeHandle, ProbeOptions, ProbePrograms
from jaxserve.runner.programs import OnCompiled, Programs
from jaxserve.runner.resolve import ResolvedConfig
from jaxserve.runner.sampler import Sampled, SamplingKind, kind_of
from jaxserve.runner.slots import SlotState, admission_shapes, choose_admission, empty_slots, pack_admissions
from jaxserve.runner.step import NOT_FINITE, NOT_SAMPLED, Caches, StepOutput


class StepHandle(NamedTuple):
    """A step on its way: device arrays that fill when it has run."""

    plan: StepPlan
    output: StepOutput
    logprob_counts: list[int] | None  # per row, -1 for none; None if no row wants any


class ModelRunner:
    """Holds parameters, KV caches and slots; implements `jaxserve.core.batch.Executor`.

    Steps run in dispatch order because each takes the caches and slots that its predecessor returns. With
    ``probes`` it is a `jaxserve.core.probing.Prober` as well: a probe takes the slots that the newest step
    returns, and the next step cannot overwrite them before it has run.
    """

    def __init__(
        self,
        module: Decoder,
        params: Params,
        placement: Placement,
        resolved: ResolvedConfig,
        implementation: Implementation,
        *,
        run_each_once: bool,
        pairs_single_rows: bool,
        branches_on_host: bool,
        on_compiled: OnCompiled = lambda *_: None,
        probes: ProbeOptions | None = None,
    ) -> None:
        self._params = params
        # Views of the same memory; a mesh of several devices would cut pairs apart.
        self._single_row_params = (
            pair_views(params) if pairs_single_rows and placement.mesh.size == 1 else params
        )
        self._resolved = resolved
        self._admission_shapes = admission_shapes(resolved.num_slots, resolved.max_model_len)
        self._logprob_counts = [-1] * resolved.num_slots
        self._kinds = [SamplingKind.GREEDY] * resolved.num_slots
        layers = () if probes is None else probes.layers
        hidden_shape = (resolved.num_slots, len(layers), module.config.hidden_size) if layers else None
        self._make_slots = functools.partial(_make_slots, resolved, hidden_shape, placement)
        self._make_caches = _cache_maker(resolved, module.config.num_layers, placement)
        self._slots: SlotState = self._make_slots()
        self._probes = (
            None
            if probes is None or self._slots.hidden is None
            else ProbePrograms(probes, self._slots.hidden, placement)
        )
        self._caches: Caches = self._make_caches()
        self._programs = Programs(
            module,
            placement,
            implementation,
            buckets=resolved.ladder.all(),
            admission_shapes=self._admission_shapes,
            params_of=self._params_of,
            caches=self._caches,
            slots=self._slots,
            branches_on_host=branches_on_host,
            on_compiled=on_compiled,
            hidden_layers=layers,
        )
        self._swapper = (
            PageSwapper(self._caches, resolved.block_pages, placement) if resolved.host_blocks else None
        )
        buckets = resolved.ladder.all()
        for bucket in buckets if run_each_once else buckets[:1]:
            for kind in self._programs.kinds:
                self._run_empty(bucket, kind)
        self._compiles_at_start = compile_counter().count

    @property
    def compiles_after_warmup(self) -> int:
        """Compilations of this process since the runner was ready; must stay 0."""
        return compile_counter().count - self._compiles_at_start

    @property
    def host_tier(self) -> HostTier:
        """The host memory that pages may go to, and the bandwidth that was measured to it."""
        if self._swapper is None:
            return NO_HOST
        resolved, num_layers = self._resolved, len(self._caches)
        block_bytes = resolved.block_pages * resolved.layout.bytes_per_page() * num_layers
        return HostTier(resolved.host_blocks, resolved.block_pages, block_bytes, self._swapper.bytes_s)

    def prepare(self, plan: StepPlan) -> StepBatch:
        """The *prepare* stage, for this runner's slots."""
        return prepare(plan, num_slots=self._resolved.num_slots)

    def dispatch(self, batch: StepBatch) -> StepHandle:
        """Launches a step; returns before it has run."""
        with self._recovering(f"a step of {batch.plan.bucket.tokens} tokens"):
            return self._dispatch(batch)

    def _dispatch(self, batch: StepBatch) -> StepHandle:
        plan = batch.plan
        if self._swapper is not None:
            self._caches = self._swapper.run(plan, self._caches)
        if plan.admissions:
            self._admit(list(plan.admissions))
        kind = max((self._kinds[slot] for slot in plan.rows.slots), default=SamplingKind.GREEDY)
        output = self._run(batch, kind)
        output.token_ids.copy_to_host_async()
        sampled = output.sampled
        if kind is not SamplingKind.ANY or sampled is None:
            return StepHandle(plan, output, None)
        counts = [
            self._logprob_counts[slot] if samples else -1
            for slot, samples in zip(plan.rows.slots, plan.rows.samples, strict=True)
        ]
        if max(counts) < 0:
            return StepHandle(plan, output, None)
        for array in (sampled.chosen_logprob, sampled.rank, sampled.top_ids, sampled.top_logprobs):
            array.copy_to_host_async()
        return StepHandle(plan, output, counts)

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step and reads what it sampled."""
        with self._recovering(f"a step of {handle.plan.bucket.tokens} tokens"):
            return self._collect(handle)

    @contextlib.contextmanager
    def _recovering(self, what: str) -> Generator[None]:
        """Raises StepFailedError for what there was no memory for; the next step can be run.

        Other errors pass, and so does that of caches, in place of lost ones, for which there is no memory.
        """
        try:
            yield
        except ALLOCATION_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            self._replace_lost()
            resolved = self._resolved
            raise StepFailedError(
                f"the device ran out of memory in {what} ({reason(error)}); lower "
                f"memory_fraction or num_pages={resolved.num_pages}, max_num_seqs={resolved.num_slots} or "
                f"max_num_batched_tokens={resolved.ladder.token_budget}"
            ) from error

    def _replace_lost(self) -> None:
        """Allocates caches and slots again, if a failed step took them with it."""
        if self._swapper is not None:
            self._swapper.forget()
        try:
            jax.block_until_ready((self._caches, self._slots))
        except RuntimeError:  # deleted, or the output of a step that failed
            self._caches = ()  # theirs is the memory that the new ones take
            self._caches, self._slots = self._make_caches(), self._make_slots()

    def _collect(self, handle: StepHandle) -> StepResult:
        plan, output = handle.plan, handle.output
        token_ids = np.asarray(output.token_ids)[:, : len(plan.rows)]
        if plan.is_loop:
            token_ids = token_ids[(token_ids != NOT_SAMPLED).any(axis=1)]  # the steps before it ended
        bad_rows: tuple[tuple[int, int], ...] = ()
        if (token_ids < 0).any():
            bad = np.argwhere(token_ids == NOT_FINITE).tolist()
            bad_rows = tuple((decode_step, row) for decode_step, row in bad)
        logprobs = None
        if output.sampled is not None and handle.logprob_counts is not None:
            logprobs = _read_logprobs(output.sampled, handle.logprob_counts)
        arrived = () if self._swapper is None else self._swapper.arrived()
        return StepResult(token_ids.tolist(), logprobs, bad_rows, arrived)

    def launch_probe(self, probes: Sequence[Probe]) -> ProbeHandle:
        """Implements `jaxserve.core.probing.Prober`, for a runner that was made with ``probes``."""
        assert self._probes is not None
        assert self._slots.hidden is not None
        with self._recovering("a look at hidden states"):
            return self._probes.launch(self._slots.hidden, probes)

    def read_probe(self, handle: ProbeHandle) -> ProbeResult:
        """What a probe found."""
        assert self._probes is not None
        with self._recovering("a look at hidden states"):
            return self._probes.read(handle)

    def close(self) -> None:
        """Drops every reference to device memory."""
        del self._params, self._single_row_params, self._caches, self._slots, self._programs
        del self._probes, self._swapper

    def _run(self, batch: StepBatch, kind: SamplingKind) -> StepOutput:
        bucket = batch.plan.bucket
        self._caches, self._slots, output = self._programs.step(bucket, kind)(
            self._params_of(bucket), self._caches, self._slots, batch.inputs
        )
        return output

    def _params_of(self, bucket: Bucket) -> Params:
        return self._single_row_params if bucket.tokens == 1 else self._params

    def _run_empty(self, bucket: Bucket, kind: SamplingKind) -> None:
        batch = self.prepare(StepPlan(step=0, rows=StepRows(), bucket=bucket))
        np.asarray(self._run(batch, kind).token_ids)

    def _admit(self, admissions: list[Admission]) -> None:
        for admission in admissions:
            wanted = admission.params.logprobs
            self._logprob_counts[admission.slot] = -1 if wanted is None else wanted
            self._kinds[admission.slot] = kind_of(admission.params)
        num_slots, num_pages = self._slots.page_table.shape
        while admissions:
            shape = choose_admission(self._admission_shapes, admissions)
            now, admissions = admissions[: shape.requests], admissions[shape.requests :]
            packed = pack_admissions(now, shape, num_slots=num_slots, num_pages=num_pages)
            self._slots = self._programs.admit(shape)(self._slots, packed)


def _make_slots(
    resolved: ResolvedConfig, hidden_shape: tuple[int, ...] | None, placement: Placement
) -> SlotState:
    slots = empty_slots(resolved.num_slots, resolved.max_model_len, resolved.layout.page_size)
    if hidden_shape is not None:
        slots = dataclasses.replace(slots, hidden=np.zeros(hidden_shape, jnp.dtype(resolved.dtype)))
    return jax.device_put(slots, placement.sharding())


def _cache_maker(resolved: ResolvedConfig, num_layers: int, placement: Placement) -> Callable[[], Caches]:
    """Makes caches of zeros; it compiles nothing when it is called again."""
    shapes = cache_shapes(resolved.layout, resolved.num_pages, placement)
    shardings = jax.tree.map(lambda array: array.sharding, shapes)
    make = jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes), out_shardings=shardings)
    return lambda: tuple(make() for _ in range(num_layers))


def _read_logprobs(sampled: Sampled, counts: list[int]) -> list[TopLogprobs | None]:
    chosen, rank = np.asarray(sampled.chosen_logprob), np.asarray(sampled.rank)
    top_ids, top_logprobs = np.asarray(sampled.top_ids), np.asarray(sampled.top_logprobs)
    return [
        None
        if count < 0
        else TopLogprobs(
            float(chosen[row]),
            int(rank[row]),
            top_ids[row, :count].tolist(),
            top_logprobs[row, :count].tolist(),
        )
        for row, count in enumerate(counts)
    ]
