"""A decoder in plain numpy, written from the papers: the whole sequence at once, dense attention, no cache.

It reads the same Hugging Face config and tensors as the real code but shares nothing with it, computes in
float64, and loops where a loop is easier to check than an einsum.
"""

from __future__ import annotations

import numpy as np


def forward(hf: dict, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits of every token of one sequence: float64 [T, vocab]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    gemma = hf["model_type"].startswith("gemma")
    x = w["model.embed_tokens.weight"][tokens]
    if gemma:
        x = x * hf["hidden_size"] ** 0.5
    for layer in range(hf["num_hidden_layers"]):
        there = f"model.layers.{layer}."

        def norm(name, y, there=there):
            return _norm(y, w[f"{there}{name}.weight"], hf)

        attended = _attention(norm("input_layernorm", x), w, f"{there}self_attn.", layer, hf)
        if gemma:
            x = x + norm("post_attention_layernorm", attended)
            x = x + norm(
                "post_feedforward_layernorm",
                _feed_forward(norm("pre_feedforward_layernorm", x), w, f"{there}mlp.", gemma),
            )
        else:
            x = x + attended
            x = x + _feed_forward(norm("post_attention_layernorm", x), w, f"{there}mlp.", gemma)
    x = _norm(x, w["model.norm.weight"], hf)
    logits = x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
    return _soft_cap(logits, hf.get("final_logit_softcapping"))


def sliding_window(hf: dict, layer: int) -> int | None:
    """The window of a layer, as each family's documentation has it."""
    match hf["model_type"]:
        case "mistral":
            return hf["sliding_window"]
        case "qwen2":
            return hf["sliding_window"] if layer >= hf["max_window_layers"] else None
        case "gemma2":
            return hf["sliding_window"] if layer % 2 == 0 else None
        case "gemma3_text":
            is_global = layer % hf["sliding_window_pattern"] == hf["sliding_window_pattern"] - 1
            return None if is_global else hf["sliding_window"]
        case _:
            return None


def _norm(x: np.ndarray, weight: np.ndarray, hf: dict) -> np.ndarray:
    scale = weight + 1.0 if hf["model_type"].startswith("gemma") else weight
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + hf["rms_norm_eps"]) * scale


def _attention(x: np.ndarray, w: dict, there: str, layer: int, hf: dict) -> np.ndarray:
    num_heads, num_kv, head_dim = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    window = sliding_window(hf, layer)
    heads = {}
    for p in "qkv":
        projected = x @ w[f"{there}{p}_proj.weight"].T + w.get(f"{there}{p}_proj.bias", 0.0)
        heads[p] = projected.reshape(len(x), -1, head_dim)
    for p in "qk":
        if f"{there}{p}_norm.weight" in w:
            heads[p] = _norm(heads[p], w[f"{there}{p}_norm.weight"], hf)
        heads[p] = _rope(heads[p], _frequencies(hf, window))
    scale = hf.get("query_pre_attn_scalar", head_dim) ** -0.5
    out = np.zeros((len(x), num_heads, head_dim))
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv)
        for t in range(len(x)):
            first = 0 if window is None else max(0, t - window + 1)
            keys, values = heads["k"][first : t + 1, kv_head], heads["v"][first : t + 1, kv_head]
            scores = _soft_cap(keys @ heads["q"][t, head] * scale, hf.get("attn_logit_softcapping"))
            probabilities = np.exp(scores - scores.max())
            out[t, head] = probabilities @ values / probabilities.sum()
    return out.reshape(len(x), -1) @ w[f"{there}o_proj.weight"].T + w.get(f"{there}o_proj.bias", 0.0)


def _frequencies(hf: dict, window: int | None) -> np.ndarray:
    theta = hf.get("rope_theta", 10000.0)
    scaling = hf.get("rope_scaling", {})
    if hf["model_type"] == "gemma3_text" and window is not None:
        theta, scaling = hf["rope_local_base_freq"], {}
    frequencies = theta ** -(np.arange(0, hf["head_dim"], 2) / hf["head_dim"])
    match scaling.get("rope_type", scaling.get("type")):
        case "linear":
            return frequencies / scaling["factor"]
        case "llama3":
            return np.array([_llama3_frequency(f, scaling) for f in frequencies])
        case _:
            return frequencies


def _llama3_frequency(frequency: float, scaling: dict) -> float:
    wavelength = 2 * np.pi / frequency
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / scaling["factor"]
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


def _rope(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = np.empty_like(x)
    for t in range(len(x)):
        rotation = np.exp(1j * t * frequencies)
        pairs = (x[t, :, :half] + 1j * x[t, :, half:]) * rotation
        turned[t] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return turned


def _feed_forward(x: np.ndarray, w: dict, there: str, gelu: bool) -> np.ndarray:
    gate, up = x @ w[f"{there}gate_proj.weight"].T, x @ w[f"{there}up_proj.weight"].T
    if gelu:
        gate = 0.5 * gate * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1.0 + np.exp(-gate))
    return (gate * up) @ w[f"{there}down_proj.weight"].T


def _soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else np.tanh(x / cap) * cap
