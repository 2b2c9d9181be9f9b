"""Shared fixtures: reference data where it is at hand, and quiet numerical libraries."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch


def _shared_folder() -> Path:
    return Path(os.environ.get("LSIM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the reference data (published weights, distances of the authors' code)."""
    folder = _shared_folder()
    if not (folder / "reference").is_dir():
        pytest.skip(f"no reference data at {folder}: set LSIM_SHARED to its folder")
    return folder


@pytest.fixture
def published_weights(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published weights, found through ``$LSIM_WEIGHTS``."""
    folder = shared / "reference" / "weights"
    monkeypatch.setenv("LSIM_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20200713)


@pytest.fixture(autouse=True)
def _threads_as_before():
    """Tests that change torch's thread count don't leak it into others."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
