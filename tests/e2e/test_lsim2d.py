"""The published evaluation, whole, on a small tree in the layout of the published data."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import run_lsim
from PIL import Image

from pipeline.metrics.settings import choose_metrics
from pipeline.storage import store
from pipeline.workflow import open_workflow

FOLDERS = {
    # set: (folder, sequence folders that the evaluation takes, one that it must not)
    "Smo": ("Smoke", ["plume1.density", "plume2.vel", "plume11.pressure"], "plume3.density"),
    "Liq": ("Liquid", ["drop1.flags", "drop21.phi"], "drop4.flags"),
    "Adv": ("AdvDiff", ["advDiff1.density", "advDiff10.density"], "advDiff11.density"),
    "Bur": ("BurgersEq", ["burgersEq1.vel", "burgersEq12.vel"], "burgersEq13.vel"),
    "AdvD": ("AdvDiffDensity", ["advDiff2.density", "advDiff3.density"], "advDiff20.density"),
    "LiqN": ("LiquidNoise", ["drop1.flags", "drop7.vel"], None),
    "Sha": ("Shapes", ["shapes1", "shapes2"], None),
    "Vid": ("Video", ["scene1_a", "scene1_b"], "scene2_a"),
    "TID": ("TID2013", ["tid01", "tid02"], "tid13"),
}


def draw_sequence(folder: Path, seed: int) -> None:
    """Eleven RGB images of a disc that moves, in noise, and a ref.png that is not a frame."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:64, 0:64]
    for step in range(11):
        disc = np.hypot(y - 20 - 2 * step, x - 32) < 12
        image = 60 + 120 * disc[..., None] * rng.uniform(0.9, 1, 3) + rng.normal(0, 8, (64, 64, 3))
        pixels = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        pixels.save(folder / f"{folder.name.split('.')[0]}_{step:02d}.png")
        if step == 0:
            pixels.save(folder / "ref.png")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lsim2d")
    seed = 0
    for name, taken, not_taken in FOLDERS.values():
        for sequence in [*taken, *([not_taken] if not_taken else [])]:
            draw_sequence(root / "Data" / name / sequence, seed)
            seed += 1
    return root


def test_the_published_table_from_a_tree_in_the_published_layout(tree, tmp_path):
    out = tmp_path / "out"
    published = {"l2", "psnr", "ssim", "vi"}
    assert published <= choose_metrics(open_workflow("lsim2d").distances).requests.keys()
    # Those, and one that is always resized; by itself the run would take thirty more.
    chosen = ("--metrics", ",".join(["l1", *sorted(published)]))
    code, text = run_lsim("run", "lsim2d", "--data-dir", tree, "--out", out, "--cluster", "none", *chosen)
    assert code == 0, text
    with (out / "results" / "correlation.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Metric", *FOLDERS, "All"]
    assert {row[0] for row in rows[1:]} >= published
    assert all(-1 <= float(cell) <= 1 for row in rows[1:] for cell in row[1:])

    sequences: dict[str, set[str]] = {}
    for key, dataset in store.iterate_datasets(out / "frames.zarr", "frames"):
        names = {str(name) for name in dataset["sequence"].values}
        sequences.setdefault(key.split("/")[0], set()).update(names)
    for name, (_, taken, _) in FOLDERS.items():
        assert len(sequences[name]) == len(taken), f"{name}: {sequences[name]}"
    fields = set(store.field_keys(store.open_store(out / "frames.zarr"), "frames"))
    assert {"Smo/density", "Smo/vel", "Liq/phi"} <= fields
    table = pd.read_parquet(out / "results" / "correlations.parquet")
    assert set(table["field"]) >= {"all", "density", "vel"}
    assert (out / "results" / "report" / "index.html").stat().st_size > 10_000


def test_absent_data_says_plainly_what_to_download(tmp_path):
    code, text = run_lsim("run", "lsim2d", "--data-dir", tmp_path / "empty", "--out", tmp_path / "out")
    assert code == 1
    for part in ("10.14459/2020mp1552055", "3.9 GB", "LSIM_2D_Data.zip", "lsim catalog fetch lsim2d"):
        assert part in text, text
    assert "Traceback" not in text
