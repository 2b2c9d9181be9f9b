"""Workflow files: those shipped are whole, and what they name is found beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run_lsim

from pipeline.catalog import open_catalog
from pipeline.resources import shipped_names
from pipeline.train import open_training
from pipeline.workflow import WorkflowError, open_workflow

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
