"""Every stage once, on small data. ``make test-oldest`` runs these tests on the lowest versions allowed.

The mark ``smoke`` selects them, and one test of each optional dependency among the tests of its module.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from commands import run_lsim

import lsim
import pipeline.accessor  # noqa: F401  registers .lsim
from lsim.export import export_metric
from lsim.loss import SimulationLoss
from lsim.training import Augmentation, TrainingSettings, train
from lsim.training.train import WEIGHTS
from pipeline.matrix.embeddings import load_embeddings
from pipeline.train import StoredSequences
from pipeline.workers.cluster import Cluster

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("ignore::lsim.SizeWarning")]

METRICS = ("lsim-open", "ssim")
SIZE = 64
FRAMES = 11
SIMULATIONS = 3
FIELD = "Adv/density"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, running_cluster: Cluster) -> Path:
    """Stores and results of ``lsim run``, from a catalog of simulations to the report, by two workers."""
    folder = tmp_path_factory.mktemp("smoke")
    datasets = [
        {
            "name": name,
            "reader": "lsim",
            "source": {
                "simulate": {"recipe": recipe, "families": SIMULATIONS, "size": SIZE, "format": format}
            },
        }
        for name, recipe, format in (("Adv", "advection-diffusion", "npz"), ("Shapes", "shapes", "png"))
    ]
    catalog = {"name": "smoke", "datasets": datasets, "pools": {"All": ["Adv", "Shapes"]}}
    workflow = {
        "catalog": "catalog.yaml",
        "fetch": True,
        "out": str(folder),
        "distances": {"metrics": list(METRICS), "size": SIZE},
        "correlate": {"protocols": ["published", "all-pairs"], "replicates": 50},
        "matrix": {"metrics": ["lsim-open"], "together": "all"},
    }
    (folder / "catalog.yaml").write_text(yaml.safe_dump(catalog))
    (folder / "workflow.yaml").write_text(yaml.safe_dump(workflow))
    assert running_cluster.client is not None
    address = running_cluster.client.scheduler.address
    code, text = run_lsim(
        "run", folder / "workflow.yaml", "--data-dir", folder / "data", "--cluster", address
    )
    assert code == 0, text
    return folder


@pytest.fixture(scope="module")
def frames(folder: Path) -> xr.DataArray:
    """Frames of a field as plain xarray reads them: (sequence, frame, y, x, channel)."""
    return open_group(folder / "frames.zarr", FIELD)["frames"].load()


def open_group(path: Path, key: str) -> xr.Dataset:
    with xr.open_datatree(path, engine="zarr") as tree:
        return tree[key].to_dataset().load()


def test_stored_distances_are_those_of_the_library(folder: Path, frames: xr.DataArray):
    assert frames.shape == (SIMULATIONS, FRAMES, SIZE, SIZE, 1)
    distances = open_group(folder / "distances.zarr", FIELD)
    for name in METRICS:
        expected = lsim.load_metric(name, size=SIZE).pairwise(frames.values[1])
        np.testing.assert_array_equal(distances[name].values[1], expected)


def test_a_second_run_has_nothing_to_do(folder: Path):
    code, text = run_lsim("run", folder / "workflow.yaml", "--data-dir", folder / "data")
    assert code == 0, text
    assert f"nothing to do: {len(METRICS) * 2 * SIMULATIONS} distance matrices are up to date" in text


def test_tables_and_pages_show_every_metric(folder: Path):
    table = pd.read_parquet(folder / "results" / "correlations.parquet")
    assert set(table["metric"]) == set(METRICS)
    assert set(table["protocol"]) == {"published", "all-pairs"}
    page = (folder / "results" / "report" / "index.html").read_text()
    assert all(name in page for name in METRICS)
    assert page.count("<img") + page.count("<svg") > SIMULATIONS
    code, text = run_lsim("report", folder / "matrix.zarr", "--out", folder / "map")
    assert code == 0, text
    assert len(pd.read_csv(folder / "map" / "map.csv")) == 2 * SIMULATIONS * FRAMES


def test_the_nearest_frame_is_one_of_the_same_simulation(folder: Path):
    name = f"{FIELD}/{open_group(folder / 'frames.zarr', FIELD)['sequence'].values[0]}"
    code, text = run_lsim("neighbours", folder / "matrix.zarr", "--of", f"{name}:5", "--k", "3", "--json")
    assert code == 0, text
    nearest = json.loads(text)["nearest"]
    assert len(nearest) == 3
    assert nearest[0]["name"].startswith(f"{name}:")


def test_embeddings_are_those_of_the_library(folder: Path, frames: xr.DataArray):
    options = ("--metric", "lsim-open", "--groups", FIELD, "--size", SIZE, "--scope", "0,1")
    out = folder / "embeddings.zarr"
    code, text = run_lsim("embed", folder / "frames.zarr", "--out", out, *options, "--cluster", "none")
    assert code == 0, text
    embeddings, left_out = load_embeddings(out, FIELD)
    assert not left_out
    assert embeddings["features"].shape[0] == SIMULATIONS * FRAMES
    assert bool(np.isfinite(embeddings["features"]).all())


@pytest.mark.parametrize("name", ["frames", "distances", "matrix"])
def test_stores_are_whole(folder: Path, name: str):
    code, text = run_lsim("verify", folder / f"{name}.zarr")
    assert code == 0, text


@pytest.mark.parametrize("chunks", [None, {"sequence": 1}])
def test_the_accessor_gives_the_stored_distances(folder: Path, frames: xr.DataArray, chunks):
    array = frames if chunks is None else frames.chunk(chunks)
    matrix = array.lsim.pairwise("frame", "ssim", channel="channel", size=SIZE)
    assert matrix.dims == ("sequence", "frame", "frame_other")
    assert (matrix.chunks is None) == (chunks is None)
    distances = open_group(folder / "distances.zarr", FIELD)
    np.testing.assert_array_equal(matrix.values, distances["ssim"].values)


def test_two_steps_of_training_make_a_metric_that_is_exported_and_trained_with(folder: Path, tmp_path: Path):
    settings = TrainingSettings(
        epochs=1,
        augmentation=Augmentation(size=48),
        validation_size=48,
        held_out=0.3,
        tensorboard=importlib.util.find_spec("tensorboard") is not None,
        device="cpu",
        threads=1,
    )
    result = train(StoredSequences(folder / "frames.zarr", ["Adv"]), settings, tmp_path)
    assert result.steps == SIMULATIONS - 1
    (path,) = export_metric("lsim", "safetensors", tmp_path / "exported", weights=tmp_path / WEIGHTS).paths

    loss = SimulationLoss("lsim", weights=path)
    prediction, target = torch.rand((2, 1, 1, 48, 48), generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    value = loss(prediction, target)
    value.backward()
    expected = lsim.load_metric("lsim", path, size=None).distance(
        *(frame.detach().numpy()[:, 0, :, :, None] for frame in (prediction, target)), scope="pair"
    )
    assert value.item() == pytest.approx(float(expected[0]), rel=1e-5)
    assert prediction.grad is not None
    assert float(prediction.grad.abs().max()) > 0
