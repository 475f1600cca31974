"""The folder must not be imported under its own name: a notebook's models.py would take its place."""

import importlib.util
from pathlib import Path

import pytest

import jaxserve.models


def test_importing_the_folder_by_another_name_is_refused():
    there = Path(jaxserve.models.__file__)
    spec = importlib.util.spec_from_file_location("models", there)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"import this package as jaxserve\.models, not models"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
