"""Shared fixtures: reference data where it is at hand, two workers, and quiet numerical libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dask
import numpy as np
import pytest
import torch
import zarr

if TYPE_CHECKING:
    from pipeline.workers.cluster import Cluster

# A small chunk is read in less time than a thread is woken, and several that compete for the lock of the
# interpreter wake one another. In this process alone: workers and commands in their own read as users' do.
zarr.config.set({"threading.max_workers": 1})


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


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """Two worker processes that all tests share: starting one takes as long as twenty small tests."""
    # Imported before tests are collected, Dask's loggers would keep messages from the fixture caplog.
    from pipeline.workers.cluster import Cluster
    from pipeline.workers.profiles import Profile

    with Cluster(Profile(workers=2)) as cluster:
        assert cluster.client is not None
        # What tests compute without naming a scheduler stays in this process.
        with dask.config.set(scheduler="threads"):
            yield cluster


@pytest.fixture
def two_workers(running_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, for tests that leave its workers alive, idle and in their folder."""
    before = set(running_cluster.client.nthreads())
    yield running_cluster
    assert set(running_cluster.client.nthreads()) == before, "a worker of the shared cluster was lost"


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
