"""How much of a step goes to prompts: searched chunks, phases, partitions, forecasts."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.core.policies import registry
from jaxserve.core.policies.holt import HoltRate
from jaxserve.core.policies.partition import LEAST_CHANGE, PhasePartition, largest_share
from jaxserve.core.policies.phase_pressure import Phase, PhasePressure, next_phase
from jaxserve.core.policies.slo_chunk import LEAST_CHUNK, SAFETY, SloChunk
from jaxserve.core.policies.step_search import ChunkSearch
from jaxserve.core.policy import PolicyContext, StepView
from jaxserve.request import Request
from jaxserve.simulator.cluster import ClusterConfig, make_cluster
from jaxserve.simulator.simulation import SimulationOptions, SimulationResult, simulate
from jaxserve.simulator.trace import TraceRequest
from tests.support.engine_parts import make_core, make_request, run_to_end
from tests.support.policy_parts import LinearCost, make_context


def decoding(count: int, *, first_token: float = 0.0, generated: int = 1, left: float = 1e6) -> list[Request]:
    requests: list[Request] = []
    for index in range(count):
        request = make_request(f"d{index}", [1] * 10, 9999)
        request.output_token_ids = [1] * generated
        request.num_tokens = 10 + generated + 1  # the draft has planned its next token already
        request.num_computed_tokens = 10 + generated
        request.first_token_time = first_token
        request.predicted_output_tokens = generated + left
        requests.append(request)
    return requests


def view(decodes: list[Request], **fields: float) -> StepView:
    base: dict[str, float] = {
        "now": 0.0, "budget_left": 2048 - len(decodes), "prefill_context": 0, "partial_tokens": 0,
        "waiting_tokens": 4000, "page_occupancy": 0.3,
    }  # fmt: skip
    return StepView(decodes=decodes, **(base | fields))  # type: ignore[arg-type]


def context(token_s: float = 1e-5, **scheduler: Any) -> PolicyContext:
    return make_context(
        num_slots=64, chunk_sizes=(128, 512, 2048), cost=LinearCost(5e-3, token_s), **scheduler
    )


# ---------------------------------------------------------------------- search


@pytest.mark.parametrize("seed", range(20))
def test_searched_chunk_is_the_largest_that_keeps_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    search = ChunkSearch.from_context(context(10 ** rng.uniform(-6, -4)))
    step = view(decoding(rng.randint(1, 40)), prefill_context=rng.randint(0, 3000))
    budget_s = rng.uniform(4e-3, 40e-3)
    found = search.largest_within(step, budget_s, least=0)
    fitting = [c for c in range(step.budget_left + 1) if search.seconds(step, c) <= budget_s]
    best = max(fitting, default=0)
    assert best - 16 < found <= best
    assert search.largest_within(step, 0.0, least=32) == 32


def test_search_respects_what_padding_costs() -> None:
    """A bucket's padding is computed: just above an edge a chunk costs as much as at the next."""

    class Padded(LinearCost):
        def seconds(self, bucket, features) -> float:
            return self.step_s + self.token_s * bucket.tokens

    search = ChunkSearch.from_context(
        make_context(num_slots=64, chunk_sizes=(128, 512, 2048), cost=Padded(1e-3, 1e-5))
    )
    step = view(decoding(8))
    assert search.seconds(step, 121) == search.seconds(step, 504) > search.seconds(step, 120)
    assert search.largest_within(step, 1e-3 + 512e-5, least=0) == 496


# ---------------------------------------------------------------------- slo


def test_slo_chunk_by_hand() -> None:
    policy = SloChunk.from_context(context(tpot_slo_s=0.02))
    step = view(decoding(10, first_token=0.0), now=0.0)
    # 0.9 x 20 ms allow (18 - 5) / 0.01 = 1300 tokens, 10 of them decodes; the search has a grain of 16.
    assert policy.prefill_tokens(step) == 1290 // 16 * 16
    assert policy.prefill_tokens(view([])) == 2048, "nobody decodes: nobody is held up"


def test_a_decode_that_is_behind_gets_shorter_steps_until_its_deadline_is_lost() -> None:
    policy = SloChunk.from_context(context(tpot_slo_s=0.02))
    on_time = view(decoding(10), now=0.0)
    behind = view(decoding(10), now=0.012)  # the next token is due at 0.02
    lost = view(decoding(10), now=0.018)
    assert policy.allowed_s(on_time) == 0.02
    assert policy.allowed_s(behind) == pytest.approx(0.008)
    assert policy.prefill_tokens(behind) < policy.prefill_tokens(on_time)
    assert policy.allowed_s(lost) == 0.02, "an empty step would miss it, too"
    assert SAFETY < 1.0


def test_prompts_get_on_even_when_every_objective_is_missed() -> None:
    policy = SloChunk.from_context(context(tpot_slo_s=0.001))
    assert policy.prefill_tokens(view(decoding(10))) == LEAST_CHUNK


# ---------------------------------------------------------------------- phases


def test_phases_have_a_dead_band() -> None:
    balanced, prefill, decode = Phase.BALANCED, Phase.PREFILL_HEAVY, Phase.DECODE_HEAVY
    assert next_phase(balanced, 1.19, 0.5, 0.5) is balanced
    assert next_phase(balanced, 1.21, 0.5, 0.5) is prefill
    assert next_phase(prefill, 1.06, 0.9, 0.5) is prefill, "kept until it fails by 0.15"
    assert next_phase(prefill, 1.04, 0.5, 0.5) is balanced
    assert next_phase(prefill, 2.0, 0.96, 0.5) is balanced
    assert next_phase(balanced, 5.0, 1.01, 0.5) is decode
    assert next_phase(balanced, 5.0, 0.5, 0.86) is decode
    assert next_phase(decode, 5.0, 0.86, 0.5) is decode
    assert next_phase(decode, 0.0, 0.84, 0.69) is balanced


def test_noise_within_the_band_switches_nothing_and_phases_dwell() -> None:
    rng = random.Random(0)
    phase = Phase.PREFILL_HEAVY
    for _ in range(2000):
        phase = next_phase(phase, 1.13 + rng.uniform(-0.07, 0.07), 0.5, 0.5)
        assert phase is Phase.PREFILL_HEAVY
    policy = PhasePressure.from_context(context(tpot_slo_s=0.05, ttft_slo_s=0.05))
    switches: list[int] = []
    for step in range(300):  # the worst: pressure comes and goes with every step
        before = policy.num_switches
        policy.prefill_tokens(view(decoding(8), waiting_tokens=90_000 if step % 2 else 0, now=0.01 * step))
        if policy.num_switches > before:
            switches.append(step)
    assert all(b - a >= 10 for a, b in itertools.pairwise(switches))


def test_chunks_change_by_at_most_a_factor_of_two() -> None:
    policy = PhasePressure.from_context(context(tpot_slo_s=0.03, ttft_slo_s=0.5))
    rng = random.Random(4)
    chunks: list[int] = []
    for step in range(500):
        occupancy = 0.95 if step // 50 % 2 else 0.2
        waiting = rng.choice([0, 100_000])
        step_view = view(decoding(20), waiting_tokens=waiting, page_occupancy=occupancy, now=0.02 * step)
        chunks.append(policy.prefill_tokens(step_view))
    assert all(b <= 2 * a and b >= a // 2 for a, b in itertools.pairwise(chunks))
    assert max(chunks) > 1000
    assert min(chunks) == LEAST_CHUNK
    assert policy.num_switches >= 5


def test_decodes_about_to_finish_do_not_count_as_memory_pressure() -> None:
    for left, phase in ((1000.0, Phase.DECODE_HEAVY), (10.0, Phase.BALANCED)):
        policy = PhasePressure.from_context(context(tpot_slo_s=0.05))
        policy.prefill_tokens(view(decoding(8, left=left), page_occupancy=0.9, waiting_tokens=0))
        assert policy.phase is phase


def test_holt_follows_a_ramp_and_forgets_after_silence() -> None:
    rate = HoltRate(bin_s=0.5)
    for step in range(400):  # 20 events a second more each second
        now = 0.05 * step
        rate.add(0.05 * 20.0 * now, now)
    assert rate.forecast(2.0, 20.0) == pytest.approx(20.0 * 22.0, rel=0.03)
    assert rate.forecast(0.0, 20.0) < rate.forecast(2.0, 20.0)
    assert rate.forecast(2.0, 90.0) == pytest.approx(0.0, abs=1.0)


def test_forecast_raises_pressure_before_the_queue_does() -> None:
    """A ramp of arrivals: with the trend the prefill phase begins earlier."""

    def first_heavy(forecast_s: float) -> int:
        made = context(token_s=1e-4, tpot_slo_s=0.5, ttft_slo_s=1.0)
        policy = PhasePressure(
            ChunkSearch.from_context(made), ttft_slo_s=1.0, tpot_slo_s=0.5, forecast_s=forecast_s
        )
        for step in range(2000):
            now = 0.05 * step
            policy.queued(make_request(f"r{step}", [1] * (1 + 5 * step), 1), now)
            policy.prefill_tokens(view(decoding(8), waiting_tokens=40 * step, now=now))
            if policy.phase is Phase.PREFILL_HEAVY:
                return step
        return 2000

    assert first_heavy(2.0) < first_heavy(0.0) < 2000


def test_arrivals_that_are_kept_up_with_are_no_pressure() -> None:
    """8,000 prompt tokens a second come, and a balanced step computes nearly 10,000."""
    search = ChunkSearch.from_context(context(token_s=1e-4))
    policy = PhasePressure(search, ttft_slo_s=1.0, tpot_slo_s=0.5)
    for step in range(200):
        now = 0.05 * step
        policy.queued(make_request(f"r{step}", [1] * 400, 1), now)
        policy.prefill_tokens(view(decoding(8), waiting_tokens=400, now=now))
        assert policy.phase is Phase.BALANCED


# ---------------------------------------------------------------------- partition


def test_greedy_share_equals_exhaustive_search_on_random_models() -> None:
    rng = random.Random(7)
    for _ in range(1000):
        limit, power = rng.uniform(-0.1, 1.1), rng.uniform(0.3, 3.0)

        def keeps(share: int, limit: float = limit, power: float = power) -> bool:
            return (share / 100) ** power <= limit

        found = largest_share(rng.randrange(101), keeps)
        assert found == max((s for s in range(101) if keeps(s)), default=0)


def test_partition_keeps_decode_fast_while_memory_is_ample_and_prefill_when_it_is_not() -> None:
    policy = PhasePartition.from_context(context(token_s=1e-6))
    step = view(decoding(10))
    search = ChunkSearch.from_context(context(token_s=1e-6))
    chunk = policy.prefill_tokens(step)
    assert search.seconds(step, chunk) <= 1.1 * search.seconds(step, 0)
    assert search.seconds(step, chunk + step.budget_left // 50) > 1.1 * search.seconds(step, 0)
    scarce = view(decoding(10), page_occupancy=0.8)
    small = policy.prefill_tokens(scarce)
    whole = scarce.budget_left
    rate_s = search.seconds(scarce, small) / small
    assert rate_s <= 1.3 * search.seconds(scarce, whole) / whole
    assert small > chunk


def test_crossing_seventy_percent_flips_the_objective_once() -> None:
    policy = PhasePartition.from_context(context(token_s=1e-6))
    rng = random.Random(0)
    for occupancy in [0.5 + 0.001 * i for i in range(300)]:
        jittered = occupancy + rng.uniform(-0.02, 0.02)
        policy.prefill_tokens(view(decoding(10), page_occupancy=jittered))
    assert policy.num_flips == 1


def test_white_noise_below_the_least_change_moves_no_share() -> None:
    policy = PhasePartition.from_context(context(token_s=1e-6))
    policy.prefill_tokens(view(decoding(10)))
    changes, rng = policy.num_changes, random.Random(0)
    asked_for: set[int] = set()
    for _ in range(500):
        step = view(decoding(10), budget_left=2038 + rng.randint(-100, 100))
        asked_for.add(policy.best_share(step))
        policy.prefill_tokens(step)
    assert 1 < len(asked_for) <= max(asked_for) - min(asked_for) + 1 <= LEAST_CHANGE
    assert policy.num_changes == changes


def test_a_constant_cost_model_adapts_nothing() -> None:
    """Poison: if every step costs the same, there is no reason to hold prompts back."""
    policy = PhasePartition.from_context(context(token_s=0.0))
    rng = random.Random(0)
    for _ in range(100):
        step = view(decoding(rng.randint(1, 40)), prefill_context=rng.randint(0, 5000))
        assert policy.prefill_tokens(step) == step.budget_left
    assert policy.num_changes == 0


# ---------------------------------------------------------------------- end to end


def burst(composition: Any, budget: int = 2048, prompts: int = 10, **options: Any) -> SimulationResult:
    """Twenty chats decode; some prompts of 6000 tokens come at once."""
    trace = [TraceRequest(0.0, 64, 300) for _ in range(20)]
    trace += [TraceRequest(1.0, 6000, 8) for _ in range(prompts)]
    scheduler = SchedulerConfig(
        max_num_seqs=32,
        max_num_batched_tokens=budget,
        composition=composition,
        **options,
    )
    buckets = tuple(n for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= budget)
    cluster = make_cluster(ClusterConfig(token_buckets=buckets), scheduler)
    return simulate(trace, cluster, SimulationOptions(predictor="oracle", keep_steps=True))


def test_chunks_bound_the_gap_between_tokens_under_a_burst_of_prompts() -> None:
    unchunked, chunked, slo = burst("chunked", 8192), burst("chunked"), burst("slo", tpot_slo_s=0.025)
    worst = [max(gap for gap, _ in run.gaps) for run in (unchunked, chunked, slo)]
    assert worst[0] > 3 * worst[1] > 3 * worst[2]
    assert worst[2] <= 0.025
    makespans = [run.metrics()["makespan_s"][0] for run in (unchunked, chunked, slo)]
    assert makespans[1] < 1.1 * makespans[0]


def test_no_decode_is_skipped_while_a_prefill_runs() -> None:
    for composition in ("chunked", "slo", "phase", "partition"):
        run = burst(composition, tpot_slo_s=0.03)
        plans = [step.plan for step in run.steps[0]]
        last = {row.request_id: plan.step for plan in plans for row in plan.rows}
        for earlier, later in itertools.pairwise(plans):
            sampled = {row.request_id for row in earlier.rows if row.samples}
            going_on = {name for name in sampled if last[name] > earlier.step}
            assert going_on <= {row.request_id for row in later.rows}


@pytest.mark.parametrize("composition", registry.COMPOSITIONS)
def test_each_prompt_token_is_computed_once_and_the_budget_is_kept(composition: str) -> None:
    """What a prompt finds in the prefix cache is not computed at all."""
    rng, budget = random.Random(6), 24
    core, fake = make_core(num_slots=4, num_pages=300, token_budget=budget, composition=composition)
    shared = [rng.randrange(101) for _ in range(20)]
    requests = [
        make_request(f"r{i}", [*shared[: rng.randint(0, 20)], *range(i, i + rng.randint(1, 60))], 8, seed=i)
        for i in range(40)
    ]
    for request in requests:
        core.add(request)
        core.step()
    run_to_end(core)
    computed: dict[str, list[int]] = {request.id: [] for request in requests}
    for batch in fake.batches:
        assert batch.plan.num_tokens <= budget
        for row in batch.plan.rows:
            computed[row.request_id] += range(row.start, row.start + row.num_tokens)
    for request in requests:
        last = request.num_prompt_tokens + len(request.output_token_ids) - 1  # of which nobody needs the keys
        assert computed[request.id] == list(range(request.num_cached_tokens, last))
    assert sum(request.num_cached_tokens for request in requests) > 100


def test_slo_chunks_keep_the_objective_where_fixed_chunks_do_not() -> None:
    fixed, searched = burst("chunked", prompts=30), burst("slo", prompts=30, tpot_slo_s=0.03)

    def attained(run: SimulationResult) -> float:
        total = sum(count for _, count in run.gaps)
        return sum(count for gap, count in run.gaps if gap <= 0.03) / total

    assert attained(searched) >= 0.99 > 0.8 > attained(fixed)
    ttft, fixed_ttft = (run.metrics()["ttft_mean_s"][0] for run in (searched, fixed))
    assert ttft <= 1.2 * fixed_ttft


WITHOUT_TREND = """
from jaxserve.core.policies.phase_pressure import PhasePressure
from jaxserve.core.policies.step_search import ChunkSearch

class WithoutTrend:
    prefill_tokens = PhasePressure.prefill_tokens

    @classmethod
    def from_context(cls, context):
        search, config = ChunkSearch.from_context(context), context.config
        slo = {"ttft_slo_s": config.ttft_slo_s, "tpot_slo_s": config.tpot_slo_s}
        return PhasePressure(search, **slo, forecast_s=0.0)
"""


def ramp(composition: str) -> float:
    """Mean TTFT; thirty chats decode; prompts of 2000 tokens come, three a second more each second."""
    trace = [TraceRequest(0.0, 64, 600) for _ in range(30)]
    trace += [TraceRequest(2.0 + (2 * i / 3) ** 0.5, 2000, 20) for i in range(110)]
    scheduler = SchedulerConfig(max_num_seqs=128, composition=composition, tpot_slo_s=0.03, ttft_slo_s=0.5)
    cluster = make_cluster(ClusterConfig(token_buckets=(256, 512, 1024, 2048)), scheduler)
    return simulate(trace, cluster, SimulationOptions(predictor="oracle")).metrics()["ttft_mean_s"][0]


def test_phases_do_not_end_themselves_and_a_trend_helps_on_a_ramp(tmp_path: Path) -> None:
    """A phase for prompts has long steps; if these counted as pressure of decodes, it would end at once."""
    file = tmp_path / "without_trend.py"
    file.write_text(WITHOUT_TREND)
    searched, phases, blind = ramp("slo"), ramp("phase"), ramp(f"{file}:WithoutTrend")
    assert blind < 1.02 * searched
    assert phases < 0.9 * blind
