"""A folder of compiled programs that was made on one machine for the devices of another.

The programs lie in it as JAX's compile cache keeps them; a manifest beside them says for what they were made,
and pins every size that a program's shape depends on. Programs are native code: take bundles only from
whom you would take a program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import EngineConfig, flat_fields
from jaxserve.errors import ConfigError
from jaxserve.files import whole_file
from jaxserve.models.config import DecoderConfig
from jaxserve.runner.resolve import ResolvedConfig

MANIFEST = "bundle.json"
_FORMAT = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """For what a bundle was made.

    Attributes:
        versions: package -> version; all must be the same here.
        device_kind: as JAX names it.
        topology: as the user gave it, for messages.
        slice_shape: devices of the whole slice along x, y, z and in a chip; empty if they have no places.
        places: of the devices that the engine takes, in its order, by the same axes, from the slice's corner.
        model: fingerprint of the architecture.
        options: engine options that it was made with; the engine takes them from here.
    """

    versions: Mapping[str, str]
    device_kind: str
    topology: str
    slice_shape: Sequence[int]
    places: Sequence[Sequence[int]]
    model: str
    options: Mapping[str, Any]


def programs_folder(bundle: Path) -> Path:
    """Where in a bundle the compiled programs are."""
    return bundle / "xla"


def make_manifest(
    config: EngineConfig,
    resolved: ResolvedConfig,
    model: DecoderConfig,
    devices: Sequence[Any],
    all_devices: Sequence[Any],
    topology: str,
) -> Manifest:
    """The manifest of programs that are being compiled here.

    Args:
        config: the engine's.
        resolved: its sizes.
        model: the architecture.
        devices: that the engine takes, in its order.
        all_devices: of the slice that they are in.
        topology: as the user gave it.
    """
    options = {
        "dtype": resolved.dtype,
        "max_model_len": resolved.max_model_len,
        "max_num_seqs": resolved.num_slots,
        "max_num_batched_tokens": resolved.ladder.token_budget,
        "page_size": resolved.layout.page_size,
        "kv_cache_dtype": config.cache.kv_cache_dtype,
        "num_pages": resolved.num_pages,
        "row_buckets": resolved.ladder.decode_rows,
        "token_buckets": resolved.ladder.mixed_tokens,
        "max_decode_steps": resolved.ladder.decode_steps,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "attention": config.runner.attention,
    }
    return Manifest(
        versions=_versions(),
        device_kind=devices[0].device_kind,
        topology=topology,
        slice_shape=_slice_shape(all_devices),
        places=_places(devices, all_devices),
        model=fingerprint(model),
        options=options,
    )


def write_manifest(manifest: Manifest, bundle: Path) -> None:
    """Writes the manifest, last: a folder without one is no bundle. Raises StorageError."""
    content = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    with whole_file(bundle / MANIFEST) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(bundle: Path) -> Manifest:
    """Reads a bundle's manifest. Raises ConfigError if the folder is no bundle of this format."""
    path = bundle / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ConfigError(f"bundle={bundle}: made by another version of jaxserve; compile it again")
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"bundle={bundle}: not a folder made by `jaxserve compile` ({error})") from None


def with_bundle(config: EngineConfig) -> EngineConfig:
    """The configuration with every option that its bundle pins; as it is without a bundle.

    Raises:
        ConfigError: if the bundle was made with other versions, or an option was given another value.
    """
    bundle = config.runner.bundle
    if bundle is None:
        return config
    manifest = read_manifest(bundle)
    for name, version in _versions().items():
        if manifest.versions.get(name) != version:
            raise ConfigError(
                f"bundle={bundle}: made with {name} {manifest.versions.get(name)}, here is {version}; "
                "compile it again with the versions that are here"
            )
    flat = {name: value for name, value, _ in _values(config)}
    for name, value, default in _values(config):
        wanted = manifest.options.get(name, value)
        wanted = tuple(wanted) if isinstance(wanted, list) else wanted
        if value not in (default, wanted):
            raise ConfigError(f"{name}={value!r}: the bundle {bundle} was made with {wanted!r}")
        flat[name] = wanted
    return EngineConfig.from_flat(flat)


def check_devices(
    bundle: Path | None, model: DecoderConfig, devices: Sequence[Any], all_devices: Sequence[Any]
) -> None:
    """Checks that a bundle was made for these devices and this model.

    Programs know the whole slice: those for a slice of four chips do not run on four chips of eight.

    Args:
        bundle: its folder, if any.
        model: the architecture.
        devices: that the engine takes, in its order.
        all_devices: of the slice that they are in.

    Raises:
        ConfigError: if it was made for devices of another kind, number or place, or for another model.
    """
    if bundle is None:
        return
    manifest = read_manifest(bundle)
    needed = manifest.options["tensor_parallel_size"]
    for name, made_for, here in (
        ("devices", manifest.device_kind, devices[0].device_kind),
        ("number of devices", needed, len(devices)),
        ("shape of the whole slice", manifest.slice_shape, _slice_shape(all_devices)),
        ("places of the devices", manifest.places, _places(devices, all_devices)),
        ("model", manifest.model, fingerprint(model)),
    ):
        if made_for != here:
            raise ConfigError(
                f"bundle={bundle}: made for {manifest.topology}; {name} {made_for!r} there, {here!r} here"
            )


def fingerprint(model: DecoderConfig) -> str:
    """A digest of an architecture."""
    return hashlib.sha256(repr(model).encode()).hexdigest()[:16]


def _slice_shape(all_devices: Sequence[Any]) -> list[int]:
    places = _places(all_devices, all_devices)
    return [max(along) + 1 for along in zip(*places, strict=True)]


def _places(devices: Sequence[Any], all_devices: Sequence[Any]) -> list[list[int]]:
    """Where each device is, from the corner of the slice; nothing for devices that have no places."""
    if any(getattr(device, "coords", None) is None for device in all_devices):
        return []

    def place(device: Any) -> list[int]:
        return [*device.coords, getattr(device, "core_on_chip", 0)]

    corner = [min(along) for along in zip(*map(place, all_devices), strict=True)]
    return [[at - least for at, least in zip(place(each), corner, strict=True)] for each in devices]


def _versions() -> dict[str, str]:
    versions = {"jax": jax.__version__}
    for name in ("jaxlib", "libtpu", "jaxserve-engine"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _values(config: EngineConfig) -> list[tuple[str, Any, Any]]:
    """Every option's name, value and default."""
    values: list[tuple[str, Any, Any]] = []
    default = EngineConfig()
    for name, _ in flat_fields():
        section = next(
            (s for s in dataclasses.fields(config) if hasattr(getattr(config, s.name), name)), None
        )
        if section is None:
            values.append((name, getattr(config, name), getattr(default, name)))
        else:
            holder, defaults = getattr(config, section.name), getattr(default, section.name)
            values.append((name, getattr(holder, name), getattr(defaults, name)))
    return values
