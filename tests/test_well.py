"""Files of The Well convert without configuration: scalars, vectors, tensors, and times of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from commands import run_lsim

from pipeline.storage import store

TRAJECTORIES, TIMES, X, Y = 2, 5, 12, 9


def write_well(
    path: Path, dims: tuple[str, ...] = ("x", "y"), seed: int = 0, names: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Write a file as docs/data_format.md of the_well (commit d23fd1ad) describes it; return its arrays.

    With some of the fields, or all.
    """
    rng = np.random.default_rng(seed)
    sizes = {"x": X, "y": Y, "z": 4, "theta": X, "phi": Y}
    shape = tuple(sizes[dim] for dim in dims)
    d = len(dims)
    arrays: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
        "density": ("t0_fields", (TRAJECTORIES, TIMES, *shape), {}),
        "coefficient": ("t0_fields", (TRAJECTORIES, *shape), {"time_varying": False}),
        "forcing": ("t0_fields", (TIMES, *shape), {"sample_varying": False}),
        "profile": (
            "t0_fields",
            (TRAJECTORIES, TIMES, shape[0]),
            {"dim_varying": [True, *[False] * (d - 1)]},
        ),
        "kept": (
            "t0_fields",
            (TRAJECTORIES, TIMES, *shape[:-1], 1),
            {"dim_varying": [True] * (d - 1) + [False]},
        ),
        "velocity": ("t1_fields", (TRAJECTORIES, TIMES, *shape, d), {}),
        "strain": ("t2_fields", (TRAJECTORIES, TIMES, *shape, d, d), {}),
        "stress": ("t2_fields", (TRAJECTORIES, TIMES, *shape, d * d), {}),
    }
    written = {}
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {
                "dataset_name": "example",
                "grid_type": "cartesian",
                "n_spatial_dims": d,
                "n_trajectories": TRAJECTORIES,
            }
        )
        file.attrs["simulation_parameters"] = ["viscosity"]
        file["dimensions/time"] = np.array([0.0, 0.5, 1.5, 2.0, 4.0], np.float32)
        for dim, size in zip(dims, shape, strict=True):
            file[f"dimensions/{dim}"] = np.linspace(0, 1, size, dtype=np.float32)
        file["dimensions"].attrs["spatial_dims"] = list(dims)
        file["boundary_conditions/walls/mask"] = np.zeros(shape[0], bool)
        for name in names or arrays:
            group, of_shape, attributes = arrays[name]
            written[name] = rng.standard_normal(of_shape).astype(np.float32)
            file[f"{group}/{name}"] = written[name]
            varying = {"sample_varying": True, "time_varying": True, "dim_varying": [True] * d}
            file[f"{group}/{name}"].attrs.update(varying | attributes)
        for group in ("t0_fields", "t1_fields", "t2_fields"):
            of_group = file.require_group(group)
            of_group.attrs["field_names"] = list(of_group)
    return written


def convert(tmp_path: Path, source: Path, **keys: Any) -> tuple[int, str]:
    catalog = {
        "name": "c",
        "title": "c",
        "datasets": [{"name": "w", "source": {"path": str(source)}, "reader": "well"} | keys],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(catalog))
    return run_lsim("convert", tmp_path / "c.yaml", "--out", tmp_path / "frames.zarr", "--cluster", "none")


def frames_of(tmp_path: Path, field: str, row: int) -> np.ndarray:
    return store.open_dataset(tmp_path / "frames.zarr", f"w/{field}")["frames"].values[row, ..., 0]


def test_all_fields_are_those_of_the_file(tmp_path):
    written = write_well(tmp_path / "a.hdf5")
    code, text = convert(tmp_path, tmp_path / "a.hdf5")
    assert code == 0, text
    fields = {
        key.split("/")[1] for key in store.field_keys(store.open_store(tmp_path / "frames.zarr"), "frames")
    }
    tensors = {f"{name}_{i}{j}" for name in ("strain", "stress") for i in "xy" for j in "xy"}
    assert fields == {"density", "forcing", "profile", "kept", "velocity_x", "velocity_y"} | tensors
    expected = {
        "density": written["density"][1],
        "forcing": written["forcing"],
        "profile": np.broadcast_to(written["profile"][1][..., None], (TIMES, X, Y)),
        "kept": np.broadcast_to(written["kept"][1], (TIMES, X, Y)),
        "velocity_y": written["velocity"][1, ..., 1],
        "strain_xy": written["strain"][1, ..., 0, 1],
        "stress_yx": written["stress"][1, ..., 2],
    }
    for field, values in expected.items():
        np.testing.assert_array_equal(frames_of(tmp_path, field, 1), values.swapaxes(1, 2), err_msg=field)
    dataset = store.open_dataset(tmp_path / "frames.zarr", "w/density")
    np.testing.assert_allclose(dataset["parameter"].values[0], np.array([0, 0.5, 1.5, 2, 4]) / 4)
    assert dataset["sequence"].values.tolist() == ["00000", "00001"]


def test_other_coordinates_keep_the_order_of_their_axes(tmp_path):
    written = write_well(tmp_path / "a.hdf5", ("theta", "phi"))
    assert convert(tmp_path, tmp_path / "a.hdf5")[0] == 0
    np.testing.assert_array_equal(frames_of(tmp_path, "velocity_phi", 0), written["velocity"][0, ..., 1])


def test_folders_of_files_are_read_at_any_depth_and_a_broken_file_is_named(tmp_path):
    for name in ("train/b", "train/a", "valid/c"):
        path = tmp_path / "data" / f"{name}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_well(path)
    content = (tmp_path / "data/train/b.hdf5").read_bytes()
    (tmp_path / "data/train/b.hdf5").write_bytes(content[: len(content) // 2])
    code, text = convert(tmp_path, tmp_path / "data", fields=["density"])
    assert code == 3, text
    assert "b.hdf5" in text
    names = sorted(store.open_dataset(tmp_path / "frames.zarr", "w/density")["sequence"].values.tolist())
    assert names == ["train/a/00000", "train/a/00001", "valid/c/00000", "valid/c/00001"]


def test_volumes_and_other_files_are_refused_with_the_reason(tmp_path):
    write_well(tmp_path / "volume.hdf5", ("x", "y", "z"))
    code, text = convert(tmp_path, tmp_path / "volume.hdf5")
    assert code == 1
    assert "3 spatial dims, x, y, z; expected 2" in text
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["tensor"] = np.zeros((2, 3))
    code, text = convert(tmp_path, tmp_path / "other.hdf5")
    assert code == 1
    assert "no file of The Well" in text
    (tmp_path / "text.hdf5").write_text("no HDF5")
    code, text = convert(tmp_path, tmp_path / "text.hdf5")
    assert code == 1
    assert "not an HDF5 file" in text


def test_models_are_compared_without_a_layout(tmp_path):
    for name, seed in (("reference", 0), ("model", 1)):
        write_well(tmp_path / f"{name}.hdf5", seed=seed, names=("density", "coefficient", "velocity"))
    code, text = run_lsim(
        *("compare", tmp_path / "reference.hdf5", f"m={tmp_path / 'model.hdf5'}", "--metrics", "l2"),
        *("--out", tmp_path / "r.zarr", "--cluster", "none"),
    )
    assert code == 0, text
    keys = store.field_keys(store.open_store(tmp_path / "r.zarr"), "model")
    assert keys == ["data/density", "data/velocity_x", "data/velocity_y"]
