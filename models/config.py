"""What a decoder's architecture is made of, as frozen data: no jax, nothing family-specific."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.errors import ConfigError

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """All rope frequencies divided by ``factor`` (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: low frequencies divided by ``factor``, high ones kept, a ramp between.

    Attributes:
        factor: what low frequencies are divided by.
        low_freq_factor: wavelengths above original_max_position_embeddings / this are fully scaled.
        high_freq_factor: wavelengths below original_max_position_embeddings / this are kept.
        original_max_position_embeddings: tokens of context before the extension.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base of the frequencies and how they were stretched."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What one layer's attention needs beyond its arrays; static, handed to the runner's ``attend``.

    Attributes:
        layer: index of the layer, from 0.
        scale: factor on the scores.
        sliding_window: a query at position p sees keys in (p - window, p]; None sees all of [0, p].
        soft_cap: scores become cap * tanh(scores / cap) before masking; None leaves them.
    """

    layer: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """An architecture that `jaxserve.models.decoder.Decoder` can run.

    Attributes:
        architecture: name in `jaxserve.models.registry.MODELS`, for messages.
        vocab_size: rows of the embedding, which is the width of the logits.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_heads, num_kv_heads: query heads, and the key/value heads that they share.
        head_dim: width of a head; need not be hidden_size / num_heads.
        max_position_embeddings: longest context in tokens that the model was made for.
        rope: rotary embedding of all layers, or of those without a window where local_rope is set.
        local_rope: rotary embedding of the layers that have a sliding window; None: the same as rope.
        sliding_windows: for each layer its window in tokens, or None for full attention.
        norm_eps: added to the mean square inside every norm.
        norm_plus_one: norms multiply by (1 + weight), in float32 (Gemma), not by weight.
        sandwich_norms: attention and feed-forward outputs are normed before they are added (Gemma).
        qk_norm: queries and keys are normed per head before rope.
        qkv_bias, o_bias: which attention projections have biases.
        tie_embeddings: the head is the embedding; there is no lm_head weight.
        activation: of the gate in the feed-forward layer.
        attention_scale: factor on the attention scores.
        attention_soft_cap, logit_soft_cap: tanh caps on attention scores and on the logits.
        embedding_scale: factor on embeddings, rounded to the model's precision; None: no scaling.
        eos_token_ids, bos_token_id: special tokens as the checkpoint's config names them.

    Raises:
        ConfigError: for numbers that do not fit each other.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    sliding_windows: tuple[int | None, ...]
    norm_eps: float
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    tie_embeddings: bool
    activation: Activation = "silu"
    attention_scale: float
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: must be even, rope rotates pairs")
        if not self.sliding_windows:
            raise ConfigError("num_hidden_layers=0: must be at least 1")

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, which is also the number of its KV cache arrays."""
        return len(self.sliding_windows)

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head; query head h uses kv head h // queries_per_kv."""
        return self.num_heads // self.num_kv_heads

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary embedding of a layer."""
        if self.local_rope is not None and self.sliding_windows[layer] is not None:
            return self.local_rope
        return self.rope

    def attention_options(self, layer: int) -> AttentionOptions:
        """The attention options of a layer."""
        return AttentionOptions(
            layer=layer,
            scale=self.attention_scale,
            sliding_window=self.sliding_windows[layer],
            soft_cap=self.attention_soft_cap,
        )
