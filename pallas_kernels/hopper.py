"""What kernels for Hopper GPUs ask of the device."""

from __future__ import annotations

import jax

_HOPPER = 9.0
_H100_MULTIPROCESSORS = 132  # where only an abstract device is in scope


def num_multiprocessors() -> int:
    """Of the GPU that this is traced for. Raises NotImplementedError where it is no Hopper."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "gpu":
        return _H100_MULTIPROCESSORS
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) < _HOPPER:
        raise NotImplementedError(f"{device.device_kind}: must be an NVIDIA Hopper GPU or newer")
    return int(device.core_count)
