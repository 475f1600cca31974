"""What an admission puts into slots."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxserve.core.plan import Admission
from jaxserve.request import SamplingParams
from jaxserve.runner.slots import empty_slots, pack_admissions, slot_width, write_admissions

_SIZES = {"max_model_len": 40, "page_size": 16}


def _admission(slot: int, seed: int, params: SamplingParams) -> Admission:
    return Admission(
        request_id=str(slot),
        slot=slot,
        token_ids=tuple(range(seed, seed + 20)),
        page_ids=(slot + 1, slot + 10),
        num_prompt_tokens=18,
        params=params,
        seed=2**32 - seed,
        stop_token_ids=(7, 9),
    )


def test_every_array_arrives_bit_for_bit_and_other_slots_stay() -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, min_p=1e-30, presence_penalty=-1.5, logit_bias={3: -2.5}
    )
    admissions = [_admission(2, 5, params), _admission(0, 6, SamplingParams(seed=3, top_k=4))]
    packed = pack_admissions(admissions, 8, num_slots=4, **_SIZES)
    before = jax.tree.map(lambda a: np.full_like(a, 77), empty_slots(4, **_SIZES))
    assert packed.shape == (8, slot_width(before) + 1)
    after = jax.jit(write_admissions)(before, packed)
    assert after.tokens[2, :21].tolist() == [*range(5, 25), 0]
    assert after.page_table[0].tolist() == [1, 10, 0]
    assert after.sampling.seed.tolist() == [2**32 - 6, 77, 2**32 - 5, 77]
    assert after.sampling.temperature.tolist() == [1.0, 77.0, np.float32(0.7), 77.0]
    assert after.sampling.min_p[2] == np.float32(1e-30)
    assert after.sampling.presence_penalty[2] == -1.5
    assert after.sampling.top_k.tolist() == [4, 77, 0, 77]
    assert (after.sampling.bias_ids[2, 0], after.sampling.bias_values[2, 0]) == (3, -2.5)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(np.asarray(new)[[1, 3]], old[[1, 3]])


def test_hidden_states_stay() -> None:
    hidden = np.ones((4, 2, 3), np.float32)
    state = dataclasses.replace(empty_slots(4, **_SIZES), hidden=hidden)
    packed = pack_admissions([_admission(1, 5, SamplingParams())], 1, num_slots=4, **_SIZES)
    np.testing.assert_array_equal(jax.jit(write_admissions)(state, packed).hidden, hidden)
