"""Weights of pixels from a variable of the source: read, stored, found where damaged, and used in runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matrices import matrices_of
from test_convert import before_each_change  # noqa: F401  a fixture

import lsim
from pipeline import cli
from pipeline.convert import ConversionReport, convert
from pipeline.correlate import correlate
from pipeline.distances import DistancesReport, compute_distances
from pipeline.matrix import MatrixReport, MatrixRequest, compute_matrix
from pipeline.matrix.embeddings import compute_embeddings
from pipeline.metrics.pixel_weights import FieldWeights, _cached_metric, get_weighted
from pipeline.metrics.settings import Settings, choose_metrics
from pipeline.report import write_report
from pipeline.sources.catalog import open_catalog
from pipeline.sources.readers import ReaderError
from pipeline.sources.readers.base import checked_weights
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import hash_weights
from pipeline.verify import verify
from pipeline.verify.repair import repair
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile
from pipeline.workflow import Workflow

LATITUDE = np.linspace(-90, 90, 7, dtype=np.float32)
COSINE = np.broadcast_to(np.cos(np.deg2rad(LATITUDE.astype(float)))[:, None], (7, 9))
MEANS = ("l1", "rmse", "vrmse", "correlation", "crmse")
WEIGHTED = Settings(metrics=MEANS, size=None, scope="none", pixel_weights=True, block=2)
DIMS = {"sequence": "member", "frame": "time", "y": "latitude", "x": "longitude"}


def globe(seed: int = 0, members: int = 2) -> xr.Dataset:
    """Temperatures on a regular grid, with areas of cells and the latitude of each row."""
    rng = np.random.default_rng(seed)
    frames = 280 + rng.normal(0, 10, (members, 3, 7, 9)).astype(np.float32)
    area = (1 + rng.exponential(1, (7, 9)) ** 3) * 1e10
    return xr.Dataset(
        {
            "t2m": (("member", "time", "latitude", "longitude"), frames, {"units": "K"}),
            "cell_area": (("latitude", "longitude"), area, {"units": "m2"}),
        },
        coords={
            "latitude": ("latitude", LATITUDE, {"units": "degrees_north"}),
            "time": ("time", np.arange(3.0)),
        },
    )


class Source:
    """A folder of NetCDF files, its catalog, and its stores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.frames, self.out = folder / "frames.zarr", folder / "distances.zarr"
        (folder / "data").mkdir(parents=True)

    def write(self, data: xr.Dataset | None = None, name: str = "era") -> xr.Dataset:
        data = globe() if data is None else data
        path = self.folder / "data" / f"{name}.nc"
        path.unlink(missing_ok=True)
        data.to_netcdf(path, engine="h5netcdf")
        return data

    def convert(self, weights: str | None = "cell_area", missing: str = "quarantine") -> ConversionReport:
        options = {"dims": DIMS, "parameter": "time", "variables": ["t2m"], "weights": weights}
        entry = {"name": "E", "source": {"path": "data"}, "reader": "xarray", "missing": missing}
        entry["options"] = {name: value for name, value in options.items() if value is not None}
        catalog = self.folder / "catalog.yaml"
        catalog.write_text(yaml.safe_dump({"name": "c", "datasets": [entry]}))
        return convert(open_catalog(catalog), self.frames)

    def weights(self) -> np.ndarray:
        return store.read(store.get_array(self.group(), schema.WEIGHTS))

    def group(self) -> store.Group:
        return store.get_group(store.open_store(self.frames), "E/t2m")

    def distances(self, chosen: Settings = WEIGHTED, **changes: Any) -> DistancesReport:
        with Cluster(Profile(kind="none")) as cluster:
            return compute_distances(
                self.frames, self.out, chosen.model_copy(update=changes), cluster=cluster
            )

    def matrix(self, matrix: MatrixRequest | None = None, **changes: Any) -> MatrixReport:
        with Cluster(Profile(kind="none")) as cluster:
            chosen = WEIGHTED.model_copy(update={"block": None, **changes})
            out = self.folder / "matrix.zarr"
            return compute_matrix(self.frames, out, chosen, matrix, cluster=cluster)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def expected(frames: np.ndarray, name: str, weights: np.ndarray, scope: Any, mask: Any = None) -> np.ndarray:
    """The library's distances of (n, y, x), as stores have them."""
    metric = lsim.load_metric(name, device="cpu", size=None, symmetrise=True)
    found = metric.pairwise(frames, scope, mask, weights)
    np.fill_diagonal(found, 0)
    return found


# -- from the source to the store --------------------------------------------------------------------------


def test_forms_of_weights_in_a_source(source: Source):
    data = globe()
    area = data["cell_area"]
    data["turned"] = area.transpose("longitude", "latitude")
    data["of_rows"] = area.isel(longitude=0, drop=True)
    data["of_columns"] = area.isel(latitude=0, drop=True)
    data["packed"] = area.copy()
    data["packed"].encoding = {"dtype": "int16", "scale_factor": 1e9, "_FillValue": -1}
    data["radians"] = ("latitude", np.deg2rad(LATITUDE), {"units": "radian"})
    data["nav_lat"] = (("longitude", "latitude"), np.broadcast_to(LATITUDE, (9, 7)))
    source.write(data)
    forms = {
        "cell_area": area.values,
        "turned": area.values,
        "of_rows": np.broadcast_to(area.values[:, :1], area.shape),
        "of_columns": np.broadcast_to(area.values[:1], area.shape),
        "packed": np.round(area.values / 1e9) * 1e9,
        "cos(latitude)": COSINE,
        "cos(radians)": COSINE,
        "cos(nav_lat)": COSINE,
    }
    for name, weights in forms.items():
        report = source.convert(name)
        assert not report.quarantined, name
        np.testing.assert_allclose(source.weights(), weights, rtol=1e-6, atol=1e-7, err_msg=name)
        with xr.open_datatree(source.frames, engine="zarr") as tree:
            field = tree["E/t2m"].to_dataset()
            assert field["weights"].dims == ("y", "x")
            schema.validate_frames(field, "E/t2m")
        assert verify(source.frames).whole
    source.convert(None)
    assert schema.WEIGHTS not in source.group()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nope", None, "no variable 'nope' for weights; found .*cell_area"),
        ("t2m", None, r"weights 't2m' have dims .*; expected latitude and longitude, or one of them"),
        ("latitude", None, r"an angle \(units degrees\) is no weight; expected .*cos\(latitude\)"),
        ("lat", lambda d: LATITUDE + 90, r"an angle \(by its name\)"),
        ("cos(cell_area)", None, "expected latitudes"),
        ("cos(lat)", lambda d: LATITUDE / 90, "without units may be degrees or radians"),
        ("cos(lat)", lambda d: LATITUDE + 1, "values up to 91; expected latitudes, from -90 to 90"),
        ("w", lambda d: -np.ones(7), "weights 'w': 63 of 63 are negative, down to -1; expected 0 or more"),
        ("w", lambda d: np.zeros(7), "weights 'w': all are 0 where frames have values"),
        ("w", lambda d: np.where(LATITUDE == 0, np.nan, 1), "9 of 63 are missing or not finite .* y 3, x 0"),
        ("w", lambda d: np.where(LATITUDE == 0, np.inf, 1), "9 of 63 are missing or not finite"),
        ("w", lambda d: np.array(list("abcdefg"), object), r"expected real numbers of the shape \(y, x\)"),
    ],
)
def test_weights_that_are_none_quarantine_with_the_reason(
    source: Source, name: str, change: Callable[..., Any] | None, message: str
):
    data = globe(members=1)
    if change is not None:
        data[name.removeprefix("cos(").removesuffix(")")] = ("latitude", change(data))
    source.write(data)
    (entry,) = source.convert(name).quarantined
    assert entry.file.endswith("era.nc")
    assert re.search(message, entry.reason), entry.reason


def test_weights_may_be_missing_where_frames_are(source: Source):
    data = globe()
    data["t2m"][..., 2:4, 5] = np.nan
    data["cell_area"][2:4, 5] = np.nan
    area = data["cell_area"].fillna(0).values
    source.write(data)
    assert not source.convert(missing="keep").quarantined
    np.testing.assert_array_equal(source.weights(), area)
    source.distances(mask="nan")
    for row, frames in enumerate(data["t2m"].values):
        for name, found in matrices_of(source.out, "E/t2m").items():
            np.testing.assert_array_equal(found[row], expected(frames, name, area, "none", "nan"))
    data["t2m"][0, 1, 2, 5] = 280
    source.write(data)
    (entry,) = source.convert(missing="keep").quarantined
    assert "1 of 63 are missing or not finite where frames have values, the first at y 2, x 5" in entry.reason


def test_stacks_have_weights_beside_their_frames(tmp_path: Path, rng: np.random.Generator):
    frames, weights = rng.random((3, 4, 5)), rng.random((4, 5))
    np.savez(tmp_path / "run.npz", frames=frames, parameter=np.arange(3), area=weights)
    np.save(tmp_path / "lone.npy", frames)
    np.save(tmp_path / "lone.parameter.npy", np.arange(3))
    entry = {"name": "E", "source": {"path": "."}, "reader": "stack", "options": {"weights": "area"}}
    entry["fields"] = {"u": {"source": "frames", "channel": 0}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"name": "c", "datasets": [entry]}))
    (broken,) = convert(open_catalog(tmp_path / "c.yaml"), tmp_path / "frames.zarr").quarantined
    assert "without weights 'area'; expected an NPZ file" in broken.reason
    group = store.get_group(store.open_store(tmp_path / "frames.zarr"), "E/u")
    np.testing.assert_array_equal(store.read(store.get_array(group, schema.WEIGHTS)), weights)


@settings(max_examples=200, deadline=None)
@given(
    weights=hnp.arrays(st.sampled_from([np.float64, np.float32, np.int16, np.bool_]), (3, 4)),
    frames=hnp.arrays(np.float32, (2, 3, 4, 2), elements=st.sampled_from([0.0, 1.0, np.nan])),
)
def test_weights_are_kept_where_they_are_numbers_and_refused_where_a_pixel_needs_one(
    weights: np.ndarray, frames: np.ndarray
):
    finite = np.isfinite(weights)
    used = np.isfinite(frames).all(-1).any(0)
    sound = not (weights < 0).any() and finite[used].all() and (weights[used & finite] > 0).any()
    if not sound:
        with pytest.raises(ReaderError, match="area"):
            checked_weights(weights, frames, "area", "file.nc")
        return
    found = checked_weights(weights, frames, "area", "file.nc")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.where(finite, weights, 0).astype(np.float64))


def test_sequences_of_other_weights_are_quarantined_and_a_field_of_others_is_made_anew(source: Source):
    data = source.write(globe(members=1), "a")
    source.write(data, "b")
    assert len(source.convert().converted) == 2
    changed = data.assign(cell_area=data["cell_area"] + 1)
    source.write(changed, "b")
    report = source.convert()
    assert [entry.sequence for entry in report.quarantined] == ["b/00000"]
    assert "weights 'cell_area' are other than those of the field's first sequence" in (
        report.quarantined[0].reason
    )
    assert len(report.unchanged) == 1
    source.write(changed, "a")
    report = source.convert()
    assert (len(report.converted), report.quarantined) == (2, [])
    np.testing.assert_array_equal(source.weights(), changed["cell_area"])
    assert not source.convert().changed
    assert verify(source.frames).whole
    # Bytes that are known by their hash aren't decoded, and keep what is recorded of weights.
    os.utime(source.folder / "data" / "a.nc", ns=(1, 1))
    assert not source.convert().changed
    assert verify(source.frames).whole


def test_records_without_weights_are_as_they_were(source: Source):
    source.write()
    source.convert(None)
    (record, *_) = map(json.loads, store.read(store.get_array(source.group(), schema.SOURCE)))
    assert "weights" not in record
    assert "weights" not in record["settings"]


def test_killed_at_any_change_weights_are_those_of_the_sequences(
    source: Source,
    before_each_change,  # noqa: F811
):
    """Weights change in a conversion that is killed at one change in four, which end in every state.

    What a kill leaves is what is on the disk: one change in four is preceded by a copy of that.
    """
    data = source.write(globe(members=1), "a")
    source.convert()
    left: list[Path] = []

    def copy(count: int) -> None:
        if count % 4 == 0:
            left.append(shutil.copytree(source.frames, source.folder / f"killed-{count}.zarr"))

    before_each_change(copy)
    source.convert("cos(latitude)")
    before_each_change(lambda _: None)
    assert len(left) > 5
    for state in left:
        shutil.rmtree(source.frames)
        state.rename(source.frames)
        assert not source.convert("cos(latitude)").quarantined
        np.testing.assert_allclose(source.weights(), COSINE, atol=1e-15)
        assert verify(source.frames).whole
        frames = store.read(store.get_array(source.group(), schema.FRAMES))
        np.testing.assert_array_equal(frames[0, ..., 0], data["t2m"][0])


# -- damage ------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_values(path: Path) -> None:
    """Write other weights, as Zarr would: no checksum tells."""
    array = store.get_array(store.get_group(store.open_store(path.parents[5], "r+"), "E/t2m"), schema.WEIGHTS)
    store.write_rows(array, 0, store.read(array)[::-1])


# Converting finds each kind of damage in a way of its own; a repair is told by the report.
@pytest.mark.parametrize(
    ("damage", "mended_by"),
    [(flip, "convert"), (Path.unlink, "convert"), (replace_values, "convert"), (replace_values, "repair")],
)
def test_damaged_weights_are_found_by_readers_and_mended(
    source: Source, damage: Callable[[Path], None], mended_by: str
):
    data = source.write()
    source.convert()
    source.distances()
    damage(source.frames / "E" / "t2m" / "weights" / "c" / "0" / "0")
    report = verify(source.frames)
    assert [(found.array, found.rows) for found in report.damages] == [("weights", (0, 1))]
    for compute in (source.distances, source.matrix):
        with pytest.raises(store.DamagedError, match="weights"):
            compute()
    if mended_by == "repair":
        assert repair(source.frames, report) == 2
    assert len(source.convert().converted) == 2
    assert verify(source.frames).whole
    np.testing.assert_array_equal(source.weights(), data["cell_area"])
    assert source.distances().computed == 0


def test_an_array_of_weights_that_is_lost_is_found(source: Source):
    source.write()
    source.convert()
    shutil.rmtree(source.frames / "E" / "t2m" / "weights")
    assert [found.array for found in verify(source.frames).damages] == ["weights"]
    with pytest.raises(store.DamagedError, match="weights"):
        source.distances()
    source.convert()
    assert verify(source.frames).whole
    assert source.distances().computed == 2 * len(MEANS)


def test_a_worker_takes_no_other_weights_than_the_driver_meant(source: Source):
    source.write()
    source.convert()
    digest = hash_weights(source.weights())
    request = choose_metrics(WEIGHTED).requests["l1"]
    named = FieldWeights(str(source.frames), "E/t2m", digest)
    assert get_weighted(request, named) is get_weighted(request, FieldWeights("elsewhere", "E/t2m", digest))
    _cached_metric.cache_clear()
    replace_values(source.frames / "E" / "t2m" / "weights" / "c" / "0" / "0")
    with pytest.raises(store.DamagedError, match="weights are not those that were converted"):
        get_weighted(request, named)


# -- runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["none", "sequence", "pair", "dataset"])
def test_distances_are_those_of_the_library_and_of_xarray(source: Source, scope: Any):
    data = source.write()
    source.convert("cos(latitude)")
    report = source.distances(scope=scope)
    assert (report.weighted, report.failures) == (list(MEANS), [])
    found = matrices_of(source.out, "E/t2m")
    everything = data["t2m"].values
    fixed = (float(everything.min()), float(everything.max())) if scope == "dataset" else scope
    for name in MEANS:
        for row, frames in enumerate(everything):
            np.testing.assert_allclose(
                found[name][row], expected(frames, name, COSINE, fixed), rtol=1e-6, err_msg=name
            )
    if scope == "none":
        weights = np.cos(np.deg2rad(data["latitude"].astype(float)))
        frames = data["t2m"].astype(float)
        difference = frames - frames.isel(time=0)
        squared = (difference**2).weighted(weights).mean(("latitude", "longitude")) ** 0.5
        np.testing.assert_allclose(found["rmse"][:, 0], squared, rtol=1e-6)
    assert verify(source.out).whole


def test_a_matrix_of_an_archive_is_weighted_too(source: Source):
    names, scope = ("l1", "correlation"), (250.0, 310.0)
    data = source.write()
    source.convert()
    report = source.matrix(metrics=names, scope=scope)
    assert (report.weighted, report.failures) == (list(names), [])
    everything = np.concatenate(data["t2m"].values)
    dataset = store.open_dataset(source.folder / "matrix.zarr", "E/t2m")
    for name in names:
        values = expected(everything, name, data["cell_area"].values, scope)
        np.testing.assert_allclose(dataset[name], values, rtol=1e-5, err_msg=name)
    assert verify(source.folder / "matrix.zarr").whole
    assert source.matrix(metrics=names, scope=scope).tiles == 0
    source.convert("cos(latitude)")
    source.matrix(scope=scope, metrics=("l1",))
    left = store.get_array(
        store.get_group(store.open_store(source.folder / "matrix.zarr"), "E/t2m/provenance"),
        schema.FINGERPRINT,
    )
    assert int((store.read(left) != "").sum()) == 1  # others' were computed with the weights of before


def test_changed_weights_make_weighted_distances_stale_and_no_others(source: Source):
    source.write()
    source.convert()
    plain = Settings(metrics=("max-error",), size=None, block=2)
    source.distances()
    source.distances(plain)
    assert source.distances().computed == 0
    before = matrices_of(source.out, "E/t2m")
    source.convert("cos(latitude)")
    assert source.distances(plain).computed == 0
    report = source.distances(metrics=("l1",))
    assert report.computed == 2
    after = matrices_of(source.out, "E/t2m")
    assert not np.isclose(before["l1"], after["l1"])[:, 0, 1:].any()
    left = correlate(source.out, source.folder / "results", replicates=0).left_out
    assert set(left[left.reason.str.contains("not computed")].metric) == set(MEANS) - {"l1"}
    assert source.distances().computed == 2 * (len(MEANS) - 1)
    source.convert(None)
    assert source.distances(plain).computed == 0
    left = correlate(source.out, source.folder / "results", replicates=0).left_out
    assert set(left.metric) == set(MEANS)


def test_only_ratios_of_weights_count(source: Source):
    data = source.write()
    source.convert()
    source.distances()
    source.write(data.assign(cell_area=4 * data["cell_area"]))
    assert source.convert().converted
    assert source.distances().computed == 0


def test_results_say_that_means_are_weighted(source: Source):
    source.write()
    source.convert()
    source.distances(scope="sequence")
    source.distances(Settings(metrics=("max-error",), size=None))
    source.matrix(metrics=("l1", "rmse"))
    root = store.open_store(source.out)
    assert [run["pixel_weights"] for run in root.attrs["runs"]] == [True, False]  # type: ignore[union-attr]
    specifications = dict(store.specifications(source.out))
    weights = specifications["l1"]["weights_of_pixels"]
    assert weights["shape"] == [7, 9]
    assert "weights_of_pixels" not in specifications["max-error"]
    notes = correlate(source.out, source.folder / "results", replicates=0).notes
    named = ", ".join(MEANS)
    assert f"Means over pixels are weighted by the weights of the field's pixels: {named}" in notes
    assert any("same weights of pixels: the field's for l1" in note for note in notes)
    page = Path(write_report(source.folder / "results", matrix=source.folder / "matrix.zarr")).read_text()
    assert page.count("weighted by the weights of the field") == 2


def test_what_takes_no_weights_is_refused_by_name_and_left_out_of_all(source: Source):
    source.write()
    source.convert()
    with pytest.raises(ValueError, match="'ssim' takes no weights of pixels"):
        source.distances(metrics=("l1", "ssim"), scope="sequence")
    with pytest.raises(ValueError, match="size 224 resizes them: set --size 0"):
        source.distances(size=224)
    with pytest.raises(ValueError, match="not in a store of them"):
        compute_embeddings(source.frames, source.folder / "e.zarr", WEIGHTED)
    report = source.distances(metrics="all", scope=(200.0, 350.0))
    takes = {one.name for one in lsim.describe_metrics() if one.info.takes_weights}
    assert set(report.weighted) == takes
    assert "takes no weights" in report.unavailable["ssim"]
    assert not report.failures


def test_metrics_that_cannot_take_the_weights_of_a_field_are_left_out_of_all(source: Source):
    data = globe()
    data["cell_area"][[0, -1]] = 0
    data["cell_area"][:, [0, -1]] = 0
    source.write(data)
    source.convert()
    with pytest.raises(ValueError, match="E/t2m: metric 'brmse' is a mean along the rim"):
        source.distances(metrics=("brmse",))
    report = source.distances(metrics="all")
    assert "E/t2m: metric 'brmse' is a mean along the rim" in report.unavailable["brmse"]
    assert "brmse" not in matrices_of(source.out, "E/t2m")
    assert "brmse" not in source.matrix(metrics="all").weighted


def test_fields_without_weights_are_named(source: Source):
    source.write()
    source.convert(None)
    for compute in (source.distances, source.matrix):
        with pytest.raises(ValueError, match=r"E/t2m has no weights of pixels; .*options: weights"):
            compute()


def test_fields_of_other_weights_make_no_matrix_together(tmp_path: Path):
    for name in ("A", "B"):
        source = Source(tmp_path / name)
        source.write()
        source.convert("cell_area" if name == "A" else "cos(latitude)")
    shutil.copytree(tmp_path / "A" / "frames.zarr" / "E", tmp_path / "B" / "frames.zarr" / "F")
    # Sources are bound to the field that they are of; one of others has none.
    shutil.rmtree(tmp_path / "B" / "frames.zarr" / "F" / "t2m" / "source")
    with pytest.raises(ValueError, match="F/t2m and E/t2m have pixels of other weights"):
        source.matrix(MatrixRequest(together="both"))
    assert source.matrix(metrics=("l1",)).tiles == 2


def test_the_command_and_workflows_take_the_option(source: Source, monkeypatch, capsys):
    data = source.write()
    source.convert()
    arguments = ["lsim", "distances", source.frames, "--out", source.out, "--cluster", "none"]
    arguments += ["--metrics", "l1", "--size", "0", "--scope", "none", "--pixel-weights"]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "weighted by the fields' pixel weights: l1" in capsys.readouterr().err
    values = expected(data["t2m"].values[1], "l1", data["cell_area"].values, "none")
    np.testing.assert_array_equal(matrices_of(source.out, "E/t2m")["l1"][1], values)
    workflow = Workflow.model_validate(
        {"catalog": "c", "out": "o", "distances": {"pixel_weights": True, "size": None}}
    )
    assert workflow.distances.pixel_weights
