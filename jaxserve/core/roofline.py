"""Step times from a device's peaks and a model's size: the cost model's prior, and its sanity bound."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, final

from jaxserve.core.cost_model import StepCost, StepFeatures, UnknownDevice
from jaxserve.core.plan import Bucket
from jaxserve.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One accelerator.

    Attributes:
        peak_flops: dense bf16 operations a second.
        memory_bytes_s, memory_bytes: bandwidth and size of its memory.
        link_bytes_s: to its neighbours, one direction.
        flops_efficiency, memory_efficiency: shares of the peaks that steps reach.
        step_overhead_s: of every step, whatever is in it.
        collective_s: latency of one all-reduce.
        calibrated: whether the last four were fitted to measured steps.
        host_bytes_s: of a copy from or to the host's memory, one direction.
        source: where the numbers come from.
    """

    name: str
    peak_flops: float
    memory_bytes_s: float
    memory_bytes: float
    link_bytes_s: float
    flops_efficiency: float
    memory_efficiency: float
    step_overhead_s: float
    collective_s: float
    calibrated: bool
    source: str
    host_bytes_s: float = 25e9  # assumed: PCIe 4.0 with 16 lanes


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step's time depends on in a dense decoder.

    Attributes:
        num_params: parameters that a token passes through, embeddings read by lookup not counted.
        bytes_per_value: of weights, and of KV unless ``kv_bytes_per_value`` is given.
        kv_bytes_per_value: with its share of a scale, if it has one.
    """

    name: str
    num_params: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    bytes_per_value: int = 2
    kv_bytes_per_value: float | None = None

    def is_alike(self, other: ModelShape) -> bool:
        """Whether steps of both take the same time: all but the name and how parameters are counted."""
        ignored = {"name": self.name, "num_params": self.num_params}
        return dataclasses.replace(other, **ignored) == self

    @property
    def weight_bytes(self) -> float:
        return self.num_params * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> float:
        each = self.bytes_per_value if self.kv_bytes_per_value is None else self.kv_bytes_per_value
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * each


MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3-8b", 8.03e9, 32, 32, 8, 128, 4096),
        ModelShape("llama-3-70b", 70.55e9, 80, 64, 8, 128, 8192),
        ModelShape("llama-3.2-1b", 1.24e9, 16, 32, 8, 64, 2048),
        ModelShape("smollm2-135m", 134.5e6, 30, 9, 3, 64, 576),
    )
}


def device_profile(name: str) -> DeviceProfile:
    """A profile by name. Raises ConfigError, listing the names, for one that is unknown."""
    text = (importlib.resources.files("jaxserve.core") / "device_profiles.json").read_text(encoding="utf-8")
    profiles = json.loads(text)
    if name not in profiles:
        raise ConfigError(f"device profile {name!r}: must be one of {', '.join(profiles)}")
    return DeviceProfile(name=name, **profiles[name])


def model_shape(name: str) -> ModelShape:
    """A model's shape by name. Raises ConfigError, listing the names, for one that is unknown."""
    if name not in MODEL_SHAPES:
        raise ConfigError(f"model shape {name!r}: must be one of {', '.join(MODEL_SHAPES)}")
    return MODEL_SHAPES[name]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Roofline:
    """``overhead + max(bytes / bandwidth, operations / peak) + collectives``, tensor-parallel over devices.

    Padding of a bucket is computed as any token is; weights are read once, and the keys and values of every
    token that is attended to.
    """

    device: DeviceProfile
    model: ModelShape
    num_devices: int = 1

    def seconds(self, bucket: Bucket, features: StepFeatures) -> float:
        device = self.device
        memory_s, compute_s = self.least_seconds(bucket.tokens, features)
        work_s = max(memory_s / device.memory_efficiency, compute_s / device.flops_efficiency)
        return device.step_overhead_s + work_s + self.collective_seconds(bucket.tokens)

    def floor(self, bucket: Bucket, features: StepFeatures) -> float:
        return max(self.least_seconds(features.tokens, features))

    def least_seconds(self, tokens: int, features: StepFeatures) -> tuple[float, float]:
        """Seconds at the device's peaks for the bytes that are read, and for the operations.

        Args:
            tokens: computed, padding included if it is to count.
        """
        model, device = self.model, self.device
        attended = features.decode_context + features.prefill_pairs
        num_bytes = model.weight_bytes + model.kv_bytes_per_token * features.decode_context
        flops = 2 * model.num_params * tokens
        flops += 4 * model.num_layers * model.num_heads * model.head_dim * attended
        return (
            num_bytes / (self.num_devices * device.memory_bytes_s),
            flops / (self.num_devices * device.peak_flops),
        )

    def collective_seconds(self, tokens: int) -> float:
        """Two all-reduces a layer, each of the tokens' activations there and back."""
        if self.num_devices == 1:
            return 0.0
        num_bytes = 2 * tokens * self.model.hidden_size * self.model.bytes_per_value
        share = (self.num_devices - 1) / self.num_devices
        each_s = self.device.collective_s + num_bytes * share / self.device.link_bytes_s
        return 2 * self.model.num_layers * each_s


def prior_to_json(prior: StepCost) -> dict[str, Any]:
    """A prior as plain values. Raises TypeError for a kind of which there is no inverse."""
    if not isinstance(prior, Roofline | UnknownDevice):
        raise TypeError(f"a prior of {type(prior).__name__} cannot be written down")
    return {"kind": type(prior).__name__, **dataclasses.asdict(prior)}


def prior_from_json(values: Mapping[str, Any]) -> StepCost:
    """The inverse of `prior_to_json`."""
    fields = {name: value for name, value in values.items() if name != "kind"}
    if values["kind"] == UnknownDevice.__name__:
        return UnknownDevice(**fields)
    return Roofline(DeviceProfile(**fields["device"]), ModelShape(**fields["model"]), fields["num_devices"])


def known_device(kind: str) -> DeviceProfile | None:
    """The profile of a device that its runtime calls so, e.g. ``NVIDIA H100 80GB HBM3``; None if unknown."""
    words = {"H100": "H100", "H200": "H200", "TPU v5 lite": "TPU-v5e", "TPU v6 lite": "TPU-v6e"}
    return next((device_profile(name) for word, name in words.items() if word in kind), None)
