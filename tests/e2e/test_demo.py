"""The main job through the command line: a catalog of simulations to a report, twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import run_lsim

from pipeline.storage import schema, store

CLASSIC = "l1,l2,psnr,ssim,vi"


def write_workflow(folder: Path) -> Path:
    """As the demo, with fewer and smaller families."""
    datasets = [
        {
            "name": name,
            "reader": "lsim",
            "source": {"simulate": {"recipe": recipe, "families": 3, "size": 64, "seed": 5}},
        }
        for name, recipe in (("Adv", "advection-diffusion"), ("Sha", "shapes"))
    ]
    catalog = {"name": "small", "datasets": datasets, "pools": {"All": ["Adv", "Sha"]}}
    (folder / "small.yaml").write_text(yaml.safe_dump(catalog))
    text = {"catalog": str(folder / "small.yaml"), "fetch": True, "out": str(folder / "out")}
    text |= {"distances": {"size": 64}, "correlate": {"replicates": 200}}
    (folder / "workflow.yaml").write_text(yaml.safe_dump(text))
    return folder / "workflow.yaml"


def run(workflow: Path, *more: object) -> tuple[int, str]:
    data = workflow.parent / "data"
    return run_lsim("run", workflow, "--data-dir", data, "--metrics", CLASSIC, *more)


@pytest.fixture(scope="module")
def first(running_cluster, tmp_path_factory) -> tuple[Path, str]:
    """A folder in which a workflow was run on a cluster, and what that said; tests leave it up to date."""
    folder = tmp_path_factory.mktemp("first")
    workflow = write_workflow(folder)
    code, text = run(workflow, "--cluster", running_cluster.client.scheduler.address)
    assert code == 0, text
    return folder, text


def test_stages_one_by_one_give_what_run_gives(first, tmp_path):
    folder, _ = first
    one = tmp_path / "one"
    here = ("--cluster", "none")
    steps = [
        (
            "convert",
            folder / "small.yaml",
            "--out",
            one / "frames.zarr",
            "--data-dir",
            folder / "data",
            *here,
        ),
        (
            *("distances", one / "frames.zarr", "--out", one / "distances.zarr"),
            *("--metrics", CLASSIC, "--size", 64, *here),
        ),
        ("correlate", one / "distances.zarr", "--out", one / "results", "--replicates", "200"),
        ("report", one / "results"),
    ]
    for step in steps:
        code, text = run_lsim(*step)
        assert code == 0, text
    for key in store.field_keys(store.open_store(one / "distances.zarr"), schema.PARAMETER):
        left = store.open_dataset(one / "distances.zarr", key)
        right = store.open_dataset(folder / "out" / "distances.zarr", key)
        for name in CLASSIC.split(","):
            np.testing.assert_array_equal(left[name].values, right[name].values)
    table = (one / "results" / "correlation.csv").read_text()
    assert table == (folder / "out" / "results" / "correlation.csv").read_text()
    shutil.rmtree(one / "frames.zarr")
    code, text = run_lsim("report", one / "results")
    assert code == 0, text
    # Without the frames there is a page all the same, and it says why there are no pictures.
    assert "are there no more" in (one / "results" / "report" / "index.html").read_text()


def test_run_twice_and_after_data_is_added_broken_and_mended(first):
    folder, text = first
    workflow = folder / "workflow.yaml"
    assert "Spearman" in text
    page = folder / "out" / "results" / "report" / "index.html"
    assert str(page) in text
    html = page.read_text()
    assert all(name in html for name in CLASSIC.split(","))

    code, text = run(workflow)
    assert code == 0, text
    assert "nothing to do: 30 distance matrices are up to date" in text
    assert "127.0.0.1" not in text, "workers were started for nothing"

    # One file breaks: its sequence is quarantined, named, and the rest goes on.
    broken = next((folder / "data").rglob("*05.*"))
    kept = broken.read_bytes()
    broken.write_bytes(kept[: len(kept) // 2])
    code, text = run(workflow, "--cluster", "none")
    assert code == 3, text
    assert broken.name in text
    assert "nothing to do: 25 distance matrices" in text
    assert broken.name in page.read_text()

    broken.write_bytes(kept)
    code, text = run(workflow, "--cluster", "none")
    assert code == 0, text
    assert "5 distance matrices computed, 25 up to date" in text
