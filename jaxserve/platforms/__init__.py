"""What differs between devices: precision, memory, bucket defaults. One file a platform."""

from __future__ import annotations

import importlib
from typing import Protocol

import jax

from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.layout import KVLayout


class Platform(Protocol):
    """Facts and defaults of one kind of device."""

    @property
    def name(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``, as JAX calls it."""
        ...

    @property
    def default_dtype(self) -> str:
        """Precision when the user leaves it open."""
        ...

    @property
    def default_max_num_seqs(self) -> int:
        """Slots when the user leaves them open."""
        ...

    @property
    def default_token_budget(self) -> int:
        """Tokens of one step when the user leaves them open."""
        ...

    @property
    def default_page_size(self) -> int:
        """Tokens of a KV page when the user leaves them open."""
        ...

    @property
    def slow_first_run(self) -> bool:
        """Whether a program's first run costs more than the next, so that warm-up should run each once."""
        ...

    @property
    def smallest_rows(self) -> int:
        """Rows below which a decode step gains nothing."""
        ...

    @property
    def pairs_single_rows(self) -> bool:
        """Whether programs of one row read bfloat16 weights as pairs (`jaxserve.models.pairs`)."""
        ...

    @property
    def branches_on_host(self) -> bool:
        """Whether the host waits for the device at a branch inside a program."""
        ...

    def order_kv(self, layout: KVLayout) -> KVLayout:
        """The same layout in the order that attention reads best here; its heads are one device's."""
        ...

    def cache_bytes(self, memory_fraction: float, device: jax.Device, reserve_bytes: int) -> int:
        """Bytes on one device that the KV cache may take, weights being loaded already.

        Args:
            memory_fraction: share of the memory that the engine as a whole may use.
            device: where.
            reserve_bytes: estimate of a step's temporaries on that device.
        """
        ...


PLATFORMS = {
    "cpu": "jaxserve.platforms.cpu:Cpu",
    "gpu": "jaxserve.platforms.gpu:Gpu",
    "tpu": "jaxserve.platforms.tpu:Tpu",
}


def select_platform(device: str) -> Platform:
    """The platform of a ``--device`` name, ``auto`` being JAX's own default backend.

    Raises:
        ConfigError: if there is no such device here.
    """
    if device != "auto":
        try:
            jax.config.update("jax_default_device", jax.devices(device)[0])
        except RuntimeError as error:
            raise ConfigError(f"device={device!r}: none found here ({str(error).splitlines()[0]})") from None
    name = jax.default_backend() if device == "auto" else device
    module, _, symbol = PLATFORMS[name].partition(":")
    platform: Platform = getattr(importlib.import_module(module), symbol)()
    return platform
