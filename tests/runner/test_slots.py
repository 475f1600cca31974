"""What an admission puts into slots."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.core.plan import Admission
from jaxserve.request import SamplingParams
from jaxserve.runner.slots import (
    AdmissionShape,
    admission_shapes,
    choose_admission,
    empty_slots,
    pack_admissions,
    packed_shape,
    write_admissions,
)

_SIZES = {"max_model_len": 40, "page_size": 16}
_PACKED = {"num_slots": 4, "num_pages": 3}


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


@pytest.mark.parametrize("tokens", [20, 24, 41])
def test_every_array_arrives_bit_for_bit_and_other_slots_stay(tokens: int) -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, min_p=1e-30, presence_penalty=-1.5, logit_bias={3: -2.5}
    )
    admissions = [_admission(2, 5, params), _admission(0, 6, SamplingParams(seed=3, top_k=4))]
    shape = AdmissionShape(8, tokens)
    packed = pack_admissions(admissions, shape, **_PACKED)
    before = jax.tree.map(lambda a: np.full_like(a, 77), empty_slots(4, **_SIZES))
    assert packed.shape == packed_shape(before, shape)
    after = jax.jit(write_admissions)(before, packed)
    assert after.tokens[2].tolist() == [*range(5, 25), *[0] * (tokens - 20), *[77] * (41 - tokens)]
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
    packed = pack_admissions([_admission(1, 5, SamplingParams())], AdmissionShape(1, 41), **_PACKED)
    np.testing.assert_array_equal(jax.jit(write_admissions)(state, packed).hidden, hidden)


def test_an_admission_is_as_narrow_as_its_requests() -> None:
    shapes = admission_shapes(64, 131_072)
    assert set(shapes) == {(1, 8192), (8, 8192), (1, 131_073), (8, 131_073)}
    short = _admission(0, 5, SamplingParams())
    long = dataclasses.replace(short, token_ids=range(8193))
    full = dataclasses.replace(short, token_ids=range(8192))
    assert choose_admission(shapes, [short]) == (1, 8192)
    assert choose_admission(shapes, [full, full]) == (8, 8192)
    assert choose_admission(shapes, [short, long]) == (8, 131_073)
    assert choose_admission(shapes, [long]) == (1, 131_073)
    assert choose_admission(shapes, [short] * 8 + [long]) == (8, 8192), "the ninth comes with the next"
    assert admission_shapes(2, 100) == ((1, 101),)
