"""From a checkpoint's tensors to parameters, one parameter at a time.

A family maps each of our parameters to the tensors that it is fused from. Only reshapes and concatenations
happen here, so a parameter needs the memory of its own tensors and no more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from jaxserve.errors import CheckpointError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.mlp import gate_up_block
from jaxserve.models.params import Params, ParamSpec

Tensor = npt.NDArray[Any]
Read = Callable[[str], Tensor]
Fuse = Callable[[Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightSource:
    """What a parameter is made of.

    Attributes:
        names: tensors of the checkpoint, in Hugging Face naming.
        fuse: from those tensors, in that order, to the parameter's shape.
    """

    names: tuple[str, ...]
    fuse: Fuse


def assemble(source: WeightSource, read: Read, spec: ParamSpec) -> Tensor:
    """Reads a parameter's tensors and fuses them: an array of the spec's shape and dtype.

    Args:
        source: from a family's weight map.
        read: gives a tensor by its name, in the layout and conventions of Hugging Face.
        spec: what the model declared.

    Raises:
        CheckpointError: if the tensors' shapes do not make up the parameter; whatever ``read`` raises.
    """
    tensors = [read(name) for name in source.names]
    try:
        value = source.fuse(tensors)
    except ValueError as error:
        raise CheckpointError(f"{_described(source, tensors)}: {error}") from error
    if value.shape != spec.shape:
        raise CheckpointError(f"{_described(source, tensors)}: must make up {list(spec.shape)}")
    return value.astype(spec.dtype, copy=False)


def random_params(
    specs: Mapping[str, ParamSpec], shardings: Mapping[str, NamedSharding], seed: int
) -> Params:
    """Random parameters made on the devices that hold them, for runs that need no checkpoint."""
    # Layers are alike: one program for each kind of parameter, not for each parameter.
    programs: dict[tuple[ParamSpec, NamedSharding], Callable[[jax.Array], jax.Array]] = {}
    root = jax.random.key(seed)
    params: Params = {}
    for index, (path, spec) in enumerate(specs.items()):
        kind = (spec, shardings[path])
        if kind not in programs:
            programs[kind] = jax.jit(functools.partial(_draw, spec), out_shardings=shardings[path])
        params[path] = programs[kind](jax.random.fold_in(root, index))
    return params


def _draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    if spec.std == 0.0:
        return jnp.full(spec.shape, spec.mean, spec.dtype)
    return jax.random.normal(key, spec.shape, spec.dtype) * jnp.asarray(spec.std, spec.dtype)


def fuse_whole(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor itself."""
    (tensor,) = tensors
    return tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FuseGateUp:
    """Gate and up: two [F, D] -> [F / block, 2, block, D]."""

    block: int

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        blocks = [t.reshape(-1, self.block, *t.shape[1:]) for t in tensors]
        return np.stack(blocks, axis=1)


@dataclasses.dataclass(frozen=True, slots=True)
class FuseHeads:
    """q [Hq * hd, ...], k and v [Hkv * hd, ...] -> [Hkv, g + 2, hd, ...], for weights and biases."""

    num_kv_heads: int
    head_dim: int

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        grouped = [t.reshape(self.num_kv_heads, -1, self.head_dim, *t.shape[1:]) for t in tensors]
        return np.concatenate(grouped, axis=1)


@dataclasses.dataclass(frozen=True, slots=True)
class SplitHeads:
    """The output projection [D, Hq * hd] -> [D, Hkv, g, hd]."""

    num_kv_heads: int
    head_dim: int

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor.reshape(*tensor.shape[:1], self.num_kv_heads, -1, self.head_dim)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """What a family calls the norms of a layer; the two after are None without sandwich norms."""

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    post_attention: str | None = None
    post_mlp: str | None = None


def decoder_weight_map(config: DecoderConfig, *, norms: NormNames) -> dict[str, WeightSource]:
    """The map of every family whose tensors are named like Llama's, from parameter path to source."""
    sources = {
        "embed.weight": _whole("model.embed_tokens.weight"),
        "final_norm.weight": _whole("model.norm.weight"),
    }
    if not config.tie_embeddings:
        sources["lm_head.weight"] = _whole("lm_head.weight")
    for layer in range(config.num_layers):
        there = f"model.layers.{layer}."
        for path, source in _layer_sources(config, there, norms):
            sources[f"layers.{layer}.{path}"] = source
    return sources


def _layer_sources(config: DecoderConfig, there: str, norms: NormNames) -> Iterable[tuple[str, WeightSource]]:
    attention, mlp = f"{there}self_attn.", f"{there}mlp."
    fuse_heads = FuseHeads(config.num_kv_heads, config.head_dim)
    split_heads = SplitHeads(config.num_kv_heads, config.head_dim)

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{attention}{name}_proj.{kind}" for name in "qkv")

    yield "attention_norm.weight", _whole(f"{there}{norms.attention}.weight")
    yield "mlp_norm.weight", _whole(f"{there}{norms.mlp}.weight")
    if norms.post_attention is not None:
        yield "post_attention_norm.weight", _whole(f"{there}{norms.post_attention}.weight")
    if norms.post_mlp is not None:
        yield "post_mlp_norm.weight", _whole(f"{there}{norms.post_mlp}.weight")
    yield "attention.qkv", WeightSource(projections("weight"), fuse_heads)
    yield "attention.o", WeightSource((f"{attention}o_proj.weight",), split_heads)
    if config.qkv_bias:
        yield "attention.qkv_bias", WeightSource(projections("bias"), fuse_heads)
    if config.o_bias:
        yield "attention.o_bias", _whole(f"{attention}o_proj.bias")
    if config.qk_norm:
        yield "attention.q_norm.weight", _whole(f"{attention}q_norm.weight")
        yield "attention.k_norm.weight", _whole(f"{attention}k_norm.weight")
    fuse_gate_up = FuseGateUp(gate_up_block(config.intermediate_size))
    yield "mlp.gate_up", WeightSource((f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), fuse_gate_up)
    yield "mlp.down", _whole(f"{mlp}down_proj.weight")


def _whole(name: str) -> WeightSource:
    return WeightSource((name,), fuse_whole)


def _described(source: WeightSource, tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in zip(source.names, tensors, strict=True))
