"""Missing values from the source file to the report: kept or quarantined, left out by masks, or named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from commands import run_lsim
from matrices import archive_of, matrices_of, smooth_sequence, write_archive

import lsim
from pipeline.convert import ConversionReport, convert
from pipeline.distances import compute_distances
from pipeline.metrics.settings import Settings
from pipeline.sources.catalog import CatalogError, open_catalog
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import Profile

QUICK = Settings(metrics=("l1", "vi"), size=None)


def compute(frames: Path, out: Path, **changes):
    with Cluster(Profile(kind="none")) as cluster:
        return compute_distances(frames, out, QUICK.model_copy(update=changes), cluster=cluster)


class Stacks:
    """Stacked sequences as NPZ files, and a catalog that says what becomes of missing values."""

    def __init__(self, folder: Path, **sequences: np.ndarray) -> None:
        self.folder, self.out = folder, folder / "frames.zarr"
        (folder / "data").mkdir()
        for name, frames in sequences.items():
            np.savez(folder / "data" / f"{name}.npz", frames=frames, parameter=np.arange(len(frames)))

    def convert(self, missing: str | None, fields: str = "[]") -> ConversionReport:
        key = "" if missing is None else f", missing: {missing}"
        self.catalog.write_text(
            "name: c\ndatasets:\n- {name: A, source: {path: data}, reader: stack, options: {field: density}, "
            f"fields: {fields}{key}}}\n"
        )
        return convert(open_catalog(self.catalog), self.out)

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.yaml"

    def frames(self, field: str = "density") -> dict[str, np.ndarray]:
        """What is stored, by sequence; held against the schema and the content's hash."""
        group = store.open_dataset(self.out, f"A/{field}").load()
        schema.validate_frames(group, field)
        found = {}
        for row, name in enumerate(group["sequence"].values):
            found[str(name)] = group["frames"].values[row]
            hashed = content_hash(found[str(name)], group["parameter"].values[row])
            assert group["content"].values[row] == hashed
        return found


def spoilt(*places: tuple[int, ...], seed: int = 0, value: float = np.nan, **how: int) -> np.ndarray:
    """A smooth sequence with a value in the given places (frame, y, x, channel)."""
    frames = smooth_sequence(seed, **({"frames": 4, "size": 16} | how))
    for place in places:
        frames[place] = value
    return frames


def test_kept_or_quarantined_as_the_catalog_says_and_again_when_it_says_otherwise(tmp_path):
    given = {
        "finite": spoilt(seed=1),
        "holes": spoilt((1, 3, 3, 0), (2, 3, 3, 0)),
        "infinite": spoilt((0, 5, 5, 0), value=-np.inf),
        "blank": spoilt((2,)),
    }
    stacks = Stacks(tmp_path, **given)
    everything = {f"A/density/{name}" for name in given}

    first = stacks.convert(None)
    assert {q.sequence for q in first.quarantined} == {"holes", "infinite", "blank"}
    assert all("missing: keep" in q.reason for q in first.quarantined)
    assert stacks.convert("quarantine").unchanged == ["A/density/finite"]  # nothing else is to be done

    kept = stacks.convert("keep")
    assert set(kept.converted) == {"A/density/holes", "A/density/infinite"}
    (left_out,) = kept.quarantined
    assert "frame 2 has no finite value" in left_out.reason
    found = stacks.frames()
    assert found.keys() == {"finite", "holes", "infinite"}
    for name, frames in found.items():
        np.testing.assert_array_equal(frames, given[name])
    again = stacks.convert("keep")
    assert not again.changed
    assert {*again.unchanged, "A/density/blank"} == everything

    back = stacks.convert("quarantine")
    assert {q.sequence for q in back.quarantined} == {"holes", "infinite", "blank"}
    assert (back.converted, back.unchanged) == ([], ["A/density/finite"])
    assert stacks.frames().keys() == {"finite"}
    assert set(stacks.convert("keep").converted) == {"A/density/holes", "A/density/infinite"}


def test_fields_made_of_channels_keep_missing_values_too_and_a_parameter_never(tmp_path):
    stacks = Stacks(tmp_path, s=spoilt((1, 2, 2, 1), channels=2), t=spoilt((1, 2, 2, 1), channels=2))
    np.savez(tmp_path / "data" / "t.npz", frames=spoilt(channels=2), parameter=[0, 1, np.nan, 3])
    report = stacks.convert("keep", "{u: {source: density, channel: 0}, v: {source: density, channel: 1}}")
    assert {(q.field, q.sequence) for q in report.quarantined} == {("u", "t"), ("v", "t")}
    assert all("parameter" in q.reason for q in report.quarantined)
    assert np.isfinite(stacks.frames("u")["s"]).all()
    assert np.argwhere(np.isnan(stacks.frames("v")["s"])).tolist() == [[1, 2, 2, 0]]


def test_an_unknown_choice_names_file_and_key(tmp_path):
    with pytest.raises(
        CatalogError, match=r"catalog\.yaml: datasets.*missing.*'quarantine', 'keep' or 'frames'"
    ):
        Stacks(tmp_path, s=spoilt()).convert("ignore")


def test_a_fill_value_wins_and_masked_values_are_nan_otherwise(tmp_path):
    packed = np.arange(48, dtype=np.int16).reshape(2, 4, 6)
    attributes = {"_FillValue": np.int16(13), "scale_factor": np.float32(0.5)}
    data = xr.Dataset({"rho": (("frame", "y", "x"), packed, attributes)}, {"parameter": ("frame", [1, 2])})
    data.to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    for options, replaced in (("{}", np.nan), ("{fill: -1}", -1)):
        (tmp_path / "c.yaml").write_text(
            f"name: c\ndatasets:\n- {{name: A, source: {{path: sim.nc}}, reader: xarray, options: {options}, "
            "missing: keep}\n"
        )
        report = convert(open_catalog(tmp_path / "c.yaml"), tmp_path / "frames.zarr")
        assert (report.converted, report.quarantined) == (["A/rho/sim"], [])
        frames = store.open_dataset(tmp_path / "frames.zarr", "A/rho")["frames"].values
        np.testing.assert_array_equal(frames[0, ..., 0], np.where(packed == 13, replaced, packed * 0.5))


def mean_differences(frames: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """l1 over the pixels that both frames have, by NumPy."""
    scaled = np.where(np.isfinite(frames), (frames.astype(float) - lo) / (hi - lo), np.nan)
    return np.nanmean(np.abs(scaled[:, None] - scaled[None, :]), axis=(2, 3, 4))


def test_land_in_every_frame_from_netcdf_to_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    sea = np.stack([smooth_sequence(k, size=24)[..., 0] for k in range(3)])
    sea[:, :, :10, 4:9] = np.nan  # land
    sea[1, 2] = np.where(rng.random((24, 24)) < 0.3, np.nan, sea[1, 2])  # clouds
    data = xr.Dataset(
        {
            "sst": (("run", "time", "lat", "lon"), sea, {"units": "K"}),
            "time": ("time", np.arange(5.0)),
        }
    )
    data.to_netcdf("ocean.nc", engine="h5netcdf", encoding={"sst": {"_FillValue": np.float32(1e20)}})
    Path("catalog.yaml").write_text(
        "name: ocean\ndatasets:\n- name: Sea\n  source: {path: ocean.nc}\n  reader: xarray\n  missing: keep\n"
        "  options: {dims: {sequence: run, frame: time, y: lat, x: lon}, parameter: time}\n"
    )
    Path("study.yaml").write_text(
        "catalog: catalog.yaml\nout: out\ndistances: {size: null, metrics: [l1, vi]}\n"
        "correlate: {replicates: 0}\n"
    )
    code, text = run_lsim("run", "study.yaml", "--mask", "nan", "--cluster", "none")
    assert code == 3, text
    page = Path("out/results/report/index.html")
    assert "hold NaN or infinity, and this metric takes no mask" in page.read_text()
    found = matrices_of(Path("out/distances.zarr"), "Sea/sst")
    for row, frames in enumerate(sea[..., None]):
        expected = mean_differences(frames, np.nanmin(frames), np.nanmax(frames))
        np.testing.assert_allclose(found["l1"][row], expected, rtol=1e-5, atol=1e-9)
    assert np.isnan(found["vi"][:, ~np.eye(5, dtype=bool)]).all()
    again = compute(Path("out/frames.zarr"), Path("out/distances.zarr"), mask="nan")
    assert {(f.sequence, f.metric) for f in again.failures} == {(f"0000{k}", "vi") for k in range(3)}
    assert (again.computed, again.up_to_date) == (0, 6)

    code, text = run_lsim("run", "study.yaml", "--cluster", "none")
    assert code == 3, text
    assert "3 distance matrices computed, 3 up to date" in text  # vi is as it was
    found = matrices_of(Path("out/distances.zarr"), "Sea/sst")
    assert np.isnan(found["l1"][:, ~np.eye(5, dtype=bool)]).all()
    assert "frames 0, 1, 2, 3, 4 hold NaN or infinity" in page.read_text()


def test_real_sea_temperatures_with_land(tmp_path):
    samples = pytest.importorskip("iris_sample_data", reason="needs the package iris-sample-data")
    (tmp_path / "c.yaml").write_text(
        "name: c\ndatasets:\n- name: Ostia\n  reader: xarray\n  missing: keep\n"
        f"  source: {{path: {samples.path}/ostia_monthly.nc}}\n"
        "  options: {dims: {frame: time, y: latitude, x: longitude}, parameter: time, "
        "variables: [surface_temperature]}\n"
    )
    frames, out = tmp_path / "frames.zarr", tmp_path / "d.zarr"
    assert len(convert(open_catalog(tmp_path / "c.yaml"), frames).converted) == 1
    report = compute(frames, out, mask="nan", metrics=("l1", "ssim", "vi"))
    assert {f.metric for f in report.failures} == {"vi"}
    sea = store.open_dataset(frames, "Ostia/surface_temperature")["frames"].values[0]
    assert 0.2 < np.isnan(sea).mean() < 0.3
    found = matrices_of(out, "Ostia/surface_temperature")
    expected = mean_differences(sea, np.nanmin(sea), np.nanmax(sea))
    np.testing.assert_allclose(found["l1"][0], expected, rtol=1e-5, atol=1e-9)
    metric = lsim.load_metric("ssim", size=None)
    np.testing.assert_array_equal(found["ssim"][0], metric.pairwise(sea, mask="nan"))


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("mask", ["nan", None])
def test_the_range_of_a_dataset_counts_what_metrics_compare(tmp_path, mask, size):
    """With a mask every pixel that is there counts, and without one every frame that is whole."""
    archive = archive_of(3, frames=3, size=17)
    sequences = archive["A/density"]
    sequences["s0"][1] = 10 * sequences["s0"][1]  # beyond all others, in a frame that isn't whole
    sequences["s0"][1, 8, 8], sequences["s0"][1, 4, 4] = np.nan, np.inf
    sequences["s1"][:] = 3 * sequences["s1"]
    sequences["s2"][:, 2, 2] = -np.inf  # nowhere whole
    frames, out = write_archive(tmp_path / "frames.zarr", archive), tmp_path / "d.zarr"
    compute(frames, out, metrics=("l1",), scope="dataset", size=size, mask=mask)

    step = 1 if size is None else 2  # 17 to 9 by the nearest sample: every other
    sampled = {name: s[:, ::step, ::step] for name, s in sequences.items()}
    counted = np.concatenate(list(sampled.values()))
    if mask is None:
        counted = counted[np.isfinite(counted).all(axis=(1, 2, 3))]
    counted = counted[np.isfinite(counted)]
    found = matrices_of(out)["l1"]
    for row, sequence in enumerate(sampled.values()):
        expected = mean_differences(sequence, counted.min(), counted.max())
        if mask is None:
            bad = ~np.isfinite(sequence).all(axis=(1, 2, 3))
            expected[bad], expected[:, bad] = np.nan, np.nan
            np.fill_diagonal(expected, 0)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-9)

    # Ranges that are known are those of this mask, and what was not counted is no NaN in the metadata.
    other = compute(frames, out, metrics=("l1",), scope="dataset", size=size, mask=None if mask else "nan")
    assert other.computed == 3
    document = (out / "A/density/provenance/zarr.json").read_text()
    json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_dataset_without_any_whole_frame_has_no_distances_and_says_so(tmp_path):
    archive = archive_of(2, frames=3, size=16)
    for sequence in archive["A/density"].values():
        sequence[:, :4] = np.nan
    frames, out = write_archive(tmp_path / "frames.zarr", archive), tmp_path / "d.zarr"
    report = compute(frames, out, scope="dataset")
    assert {f.reason for f in report.failures} == {"frames 0, 1, 2 hold NaN or infinity"}
    assert len(report.failures) == 4
    assert compute(frames, out, scope="dataset").computed == 0  # that is known, and not tried again
    masked = compute(frames, out, scope="dataset", mask="nan")
    assert {f.metric for f in masked.failures} == {"vi"}
    assert masked.computed == 2
