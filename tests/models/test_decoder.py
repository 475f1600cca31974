"""Every family against transformers' recorded logits and a numpy decoder; steps, padding and precision."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.params import bind
from tests.support.decoder_run import empty_cache, load_tiny, run
from tests.support.dense_reference import forward
from tests.support.tiny_models import HF_CONFIGS, hf_weights, token_ids

RECORDED = json.loads((Path(__file__).parent / "data" / "tiny_logits.json").read_text())["logits"]
# Measured: at most 2e-5 on logits of up to 7.
TOLERANCE = 1e-4
MODELS = sorted(HF_CONFIGS)


@functools.cache
def full_forward(name: str, dtype=jnp.float32, devices: int = 1) -> np.ndarray:
    decoder, params = load_tiny(name, dtype, devices)
    tokens = token_ids(name)
    positions = np.arange(len(tokens))
    cache = empty_cache(decoder.config, 1, len(tokens), dtype)
    return run(decoder, params, tokens, 0 * positions, positions, cache)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name):
    logits = full_forward(name)
    assert logits.dtype == np.float32
    assert RECORDED[name].keys() == {"3", "11", "23"}
    for position, expected in RECORDED[name].items():
        np.testing.assert_allclose(logits[int(position)], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_numpy_decoder_at_every_position(name):
    expected = forward(HF_CONFIGS[name], hf_weights(name), token_ids(name))
    np.testing.assert_allclose(full_forward(name), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("switch", ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_the_reference_notices_a_switch_that_is_off(switch):
    """A tolerance that passes with a window off by one or a cap missing would prove nothing."""
    hf = HF_CONFIGS["gemma2"]
    changed = hf | {switch: hf[switch] + 1}
    tokens, weights = token_ids("gemma2"), hf_weights("gemma2")
    difference = np.abs(forward(changed, weights, tokens) - forward(hf, weights, tokens)).max()
    assert difference > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3"])
def test_chunked_prefill_mixed_with_decodes_equals_one_forward(name):
    """Two sequences of different lengths share padded steps, in slots that are not in order."""
    bucket, num_slots = 14, 3
    decoder, params = load_tiny(name)
    tokens = {2: token_ids(name), 0: token_ids(name)[::-1][:17]}
    expected = {slot: forward(HF_CONFIGS[name], hf_weights(name), ids) for slot, ids in tokens.items()}
    cache = empty_cache(decoder.config, num_slots, 24)
    done = {2: 0, 0: 0}
    for chunks in [{2: 7}, {2: 1, 0: 9}, {0: 1, 2: 1}, {0: 3, 2: 11}, {2: 1, 0: 4}, {2: 3}]:
        rows = [(slot, done[slot] + i) for slot, n in chunks.items() for i in range(n)]
        # Padding has a slot out of range, an id of any value, and a position that somebody may be at.
        padding = [(num_slots, i % 5) for i in range(bucket - len(rows))]
        slots, positions = np.array(rows + padding).T
        ids = [tokens[slot][position] for slot, position in rows] + [10_000, -3, 60] * 5
        logits, cache = run(decoder, params, ids[:bucket], slots, positions, cache)
        for i, (slot, position) in enumerate(rows):
            np.testing.assert_allclose(logits[i], expected[slot][position], rtol=0, atol=TOLERANCE)
        for slot, n in chunks.items():
            done[slot] += n
    assert done == {2: 24, 0: 17}
    written = ~np.isnan(np.asarray(cache[0])).any(axis=(2, 3, 4))
    assert written.sum(axis=1).tolist() == [17, 0, 24]


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_bfloat16_stays_near_float32(name):
    """bfloat16 has 8 bits: the logits of three or four layers move by a few hundredths, not more."""
    logits = full_forward(name, dtype=jnp.bfloat16)
    assert logits.dtype == np.float32
    expected = forward(HF_CONFIGS[name], hf_weights(name), token_ids(name))
    error = np.abs(logits - expected)
    assert 1e-4 < error.max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "devices"), [("llama3", 2), ("qwen2", 2), ("gemma3", 2), ("llama2", 4)])
def test_several_devices_compute_what_one_does(name, devices):
    sharded = full_forward(name, devices=devices)
    np.testing.assert_allclose(sharded, full_forward(name), rtol=0, atol=TOLERANCE)


def test_a_bound_decoder_is_an_ordinary_module():
    decoder, params = load_tiny("llama2")
    model = bind(decoder, params)
    weight = model.layers[1].mlp.down[...]
    expected = hf_weights("llama2")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(np.asarray(weight), expected)
    # The template still has none: binding makes another module.
    assert isinstance(decoder.layers[1].mlp.down.get_value(), jax.ShapeDtypeStruct)
