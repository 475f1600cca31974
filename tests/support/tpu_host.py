"""Whether this machine has TPUs, without asking libtpu."""

from __future__ import annotations

from pathlib import Path


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """TPU VMs have ``/dev/accel0`` and so on, or ``/dev/vfio/0``; ``/dev/vfio/vfio`` alone is no device."""
    return any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))
