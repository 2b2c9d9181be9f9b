"""Workflow files: those shipped are whole, and what they name is found beside them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import xarray as xr
from commands import run_lsim

import lsim
from pipeline.metrics.settings import Settings
from pipeline.resources import shipped_names
from pipeline.sources.catalog import open_catalog
from pipeline.train import open_training
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workflow import MatrixSection, Workflow, WorkflowError, open_workflow, run_workflow

TRAINING = [name for name in shipped_names("workflows") if name.startswith("train_")]
RUNS = [name for name in shipped_names("workflows") if name not in TRAINING]


@pytest.mark.parametrize("name", RUNS)
def test_shipped_workflows_name_shipped_catalogs(name):
    workflow = open_workflow(name)
    catalog = open_catalog(workflow.catalog)
    known = {entry.name for entry in catalog.datasets}
    assert set(workflow.datasets or ()) <= known


@pytest.mark.parametrize("name", TRAINING)
def test_shipped_training_files_open(name):
    assert open_training(name).simulate


def test_a_training_file_is_not_run_as_a_workflow():
    with pytest.raises(WorkflowError, match="run it with 'lsim train train_lsim'"):
        open_workflow("train_lsim")


def test_weights_and_catalogs_are_looked_for_beside_the_workflow(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"")
    (tmp_path / "mine.yaml").write_text(
        "catalog: archive.yaml\nout: results\n"
        "distances: {weights: {mine: mine.safetensors, other: shipped.safetensors}}\n"
    )
    workflow = open_workflow(tmp_path / "mine.yaml")
    assert workflow.catalog == str(tmp_path / "archive.yaml")
    # What is not beside it is left to the search for weights.
    assert workflow.distances.weights == {
        "mine": str(tmp_path / "mine.safetensors"),
        "other": "shipped.safetensors",
    }


def test_wrong_keys_are_named_with_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("catalog: demo\nout: x\ndistances: {weight: {a: b}}\n")
    with pytest.raises(WorkflowError, match=r"mine\.yaml: distances\.weight: Extra inputs"):
        open_workflow(path)


def test_weights_on_the_command_line_need_a_name(tmp_path: Path):
    code, text = run_lsim("run", "demo", "--weights", "mine.safetensors", "--out", tmp_path / "out")
    assert code == 2
    assert "expected NAME=FILE" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("l1", "nosuch")}, "no metric named 'nosuch'"),
        ({"metrics": ("lpips-vgg",)}, "'lpips-vgg' is not available: .*lsim weights fetch lpips-vgg"),
        ({"metrics": ("ssim",), "options": {"ssim": {"widow": 1}}}, "has no option widow"),
        ({"options": {"ssim": {"window": "round"}}}, "window must be one of"),
        ({"metrics": ("ms-ssim",), "size": 100}, "'ms-ssim' cannot take frames of 100×100"),
        ({"weights": {"mine": "absent.safetensors"}}, "no weights at absent"),
        ({"mask": "nan", "order": 3}, "a mask goes with order 0 or 1"),
    ],
    ids=["name", "unavailable", "option", "value", "size", "weights", "mask"],
)
def test_wrong_settings_of_metrics_are_errors_before_any_stage(tmp_path, monkeypatch, settings, message):
    monkeypatch.setenv("LSIM_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("lsim.weights.cache_folder", lambda: tmp_path / "cache")
    begun = []

    def progress(title):
        begun.append(title)
        return contextlib.nullcontext(lambda done, total: None)

    out = tmp_path / "out"
    workflow = Workflow(catalog="demo", fetch=True, out=str(out), distances=Settings(**settings))
    with (
        Cluster(Profile(kind="none")) as cluster,
        pytest.raises((ValueError, lsim.UnknownMetricError, lsim.WeightsError), match=message),
    ):
        run_workflow(workflow, cluster, data_dir=tmp_path / "data", progress=progress)
    assert begun == []
    assert not out.exists()
    assert not (tmp_path / "data").exists()


def test_a_workflow_with_a_matrix_shows_its_map(tmp_path):
    (tmp_path / "waves.yaml").write_text(
        "name: waves\ndatasets:\n- name: Waves\n  reader: lsim\n"
        "  source: {simulate: {recipe: waves, families: 2, size: 64, seed: 4}}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "catalog: waves.yaml\nfetch: true\nout: results\ndistances: {metrics: [l1], size: 64}\n"
        "correlate: {replicates: 0}\nmatrix: {metrics: [l2, l1], together: all}\n"
    )
    workflow = open_workflow(tmp_path / "mine.yaml")
    out = tmp_path / "out"
    begun, shown = [], []

    def progress(title):
        begun.append(title)
        return contextlib.nullcontext(lambda done, total: None)

    def run():
        with Cluster(Profile(kind="none")) as cluster:
            return run_workflow(
                workflow,
                cluster,
                out=out,
                data_dir=tmp_path / "data",
                progress=progress,
                announce=shown.append,
            )

    report = run()
    assert begun == ["fetch", "convert", "distances", "matrix", "correlate", "report"]
    assert report.matrix is not None
    assert report.matrix.frames == 22
    assert shown[0] == "Waves: simulating 2 families (waves)"
    assert "together/all: 22 frames" in shown[1]
    assert report.complete
    matrices = xr.open_datatree(report.stores["matrix"], engine="zarr")["together/all"]
    assert matrices.sizes["frame"] == 22
    assert {"l1", "l2"} <= set(matrices.data_vars)
    assert '<svg class="map' in Path(report.page).read_text()
    again = run()
    assert again.matrix is not None
    assert again.matrix.tiles == 0


def test_the_metrics_of_a_matrix_have_the_options_of_distances():
    distances = Settings(
        metrics=("ssim",),
        size=64,
        options={"ssim": {"window": "gaussian"}},
        weights={"mine": "a", "other": "b"},
    )
    section = MatrixSection(metrics=("ssim", "mine"), scope=(0.0, 1.0))
    found = section.settings(distances)
    assert (found.metrics, found.scope, found.size) == (("ssim", "mine"), (0.0, 1.0), 64)
    assert (found.options, found.weights) == (distances.options, {"mine": "a"})


def test_wrong_metrics_of_a_matrix_are_errors_before_any_stage(tmp_path):
    section = MatrixSection(metrics=("nosuch",))
    workflow = Workflow(catalog="demo", fetch=True, out=str(tmp_path / "out"), matrix=section)
    with Cluster(Profile(kind="none")) as cluster, pytest.raises(lsim.UnknownMetricError, match="nosuch"):
        run_workflow(workflow, cluster, data_dir=tmp_path / "data", progress=contextlib.nullcontext)
    assert not (tmp_path / "data").exists()
