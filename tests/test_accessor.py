"""``array.lsim``: labelled, lazy where the array is, and the library's own bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dask
import dask.array
import numpy as np
import pytest
import xarray as xr
from matrices import smooth_sequence

import lsim
import pipeline.accessor  # noqa: F401  registers .lsim
from pipeline.workers import worker_metrics


@pytest.fixture
def ensemble() -> xr.DataArray:
    """Three members of five frames of 24 × 32; the looped dimension stands within."""
    values = np.stack([smooth_sequence(seed, frames=5, size=32)[:, :24, :, 0] for seed in range(3)])
    return xr.DataArray(
        values,
        dims=("member", "time", "lat", "lon"),
        coords={
            "member": ["a", "b", "c"],
            "time": np.datetime64("2026-01-01", "ns") + np.arange(5) * np.timedelta64(1, "D"),
            "month": ("time", [1, 1, 1, 2, 2], {"units": "1"}),
            "area": (("lat", "lon"), np.ones((24, 32))),
        },
        name="density",
        attrs={"units": "kg m-3"},
    ).transpose("time", "member", "lat", "lon")


def by_hand(array: xr.DataArray, metric: lsim.Metric, **how) -> np.ndarray:
    """A matrix a member, by the library."""
    values = array.transpose("member", "time", "lat", "lon").values
    return np.stack([metric.pairwise(member, **how) for member in values])


@pytest.mark.parametrize("scope", ["sequence", "pair", (-2.0, 2.0)])
@pytest.mark.parametrize("name", ["ssim", "vi"])
def test_matrices_are_the_librarys_with_labels(ensemble, name, scope):
    found = ensemble.lsim.pairwise("time", name, size=24, scope=scope)
    assert found.dims == ("member", "time", "time_other")
    expected = by_hand(ensemble, lsim.load_metric(name, size=24), scope=scope)
    np.testing.assert_array_equal(found.values, expected)
    assert found.name == name
    assert found.attrs["title"] == lsim.load_metric(name).info.title
    assert json.loads(found.attrs["specification"]) == lsim.load_metric(name, size=24).specification()
    assert found.attrs["units"]
    assert set(found.coords) == {"member", "time", "month", "time_other", "month_other"}
    day = found.sel(member="b", time="2026-01-02", time_other="2026-01-05")
    assert float(day) == expected[1, 1, 4]
    assert found["month_other"].values.tolist() == [1, 1, 1, 2, 2]


CHUNKS = [{"member": 1}, {"member": 2, "time": 2, "lat": 7}, {"time": 1, "lon": 16}]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_lazy_arrays_stay_lazy_and_give_the_same_bits(ensemble, chunks, monkeypatch):
    expected = ensemble.lsim.pairwise("time", "ssim", size=None)
    computed = []
    monkeypatch.setattr(lsim.Metric, "pairwise", counting(lsim.Metric.pairwise, computed))
    found = ensemble.chunk(chunks).lsim.pairwise("time", "ssim", size=None)
    assert found.chunks is not None
    assert not computed
    assert found.chunks[found.dims.index("member")] == ensemble.chunk(chunks).chunksizes.get("member", (3,))
    with dask.config.set(scheduler="threads"):
        xr.testing.assert_identical(found.compute(), expected)
    assert len(computed) == 3


def counting(function, calls):
    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return counted


def test_each_process_of_a_cluster_loads_a_metric_once_and_none_travels(ensemble, two_workers):
    client = two_workers.client

    def loaded() -> list[int]:
        counts = client.run(worker_metrics.load_counts)
        return [counts[worker].get("gmsd", 0) for worker in sorted(counts)]

    expected = ensemble.lsim.pairwise("time", "gmsd", size=None, data_range=200.0)
    before = loaded()
    found = ensemble.chunk({"member": 1}).lsim.pairwise("time", "gmsd", size=None, data_range=200.0)
    graph = dask.base.collections_to_expr([found.data]).__dask_graph__()
    assert not any("GMSD" in repr(task) for task in graph.values())
    xr.testing.assert_identical(found.compute(scheduler=client), expected)
    times = [after - earlier for earlier, after in zip(before, loaded(), strict=True)]
    assert set(times) <= {0, 1}
    assert sum(times) >= 1


def test_one_array_of_frames_alone(ensemble):
    one = ensemble.sel(member="a")
    found = one.lsim.pairwise("time", "l2", size=None)
    assert found.dims == ("time", "time_other")
    np.testing.assert_array_equal(found.values, lsim.load_metric("l2", size=None).pairwise(one.values))


def test_channels_and_spatial_dimensions_by_name():
    frames = smooth_sequence(1, frames=4, size=20, channels=3)
    array = xr.DataArray(frames, dims=("step", "y", "x", "rgb"))
    metric = lsim.load_metric("ssim", size=None)
    expected = metric.pairwise(frames)
    np.testing.assert_array_equal(
        array.transpose("rgb", "y", "step", "x").lsim.pairwise("step", "ssim", channel="rgb", size=None),
        expected,
    )
    by_name = array.lsim.pairwise("step", "ssim", channel="rgb", spatial=("x", "y"), size=None)
    np.testing.assert_array_equal(by_name, metric.pairwise(frames.swapaxes(1, 2)))
    # Without channels each colour is a field of its own.
    looped = array.lsim.pairwise("step", "ssim", spatial=("y", "x"), size=None)
    assert looped.dims == ("rgb", "step", "step_other")
    np.testing.assert_array_equal(looped[1], metric.pairwise(frames[..., [1]]))


def test_frames_with_nan_are_left_out(ensemble):
    spoilt = ensemble.where((ensemble.member != "b") | (ensemble.month != 2))
    found = spoilt.lsim.pairwise("time", "l1", size=None)
    assert np.isnan(found.sel(member="b")[3:]).all()
    assert np.isfinite(found.sel(member=["a", "c"])).all()


def test_masks(ensemble):
    name = "l1"
    kept = xr.DataArray(np.arange(24) > 5, dims="lat") & (ensemble.sel(member="a", drop=True) > -0.9)
    found = ensemble.lsim.pairwise("time", name, mask=kept, size=None)
    metric = lsim.load_metric(name, size=None)
    values = np.where(
        kept.transpose("time", "lat", "lon"), ensemble.transpose("member", "time", "lat", "lon"), np.nan
    )
    expected = np.stack([metric.pairwise(member, mask="nan") for member in values])
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)
    lazy = ensemble.where(kept).chunk(member=1).lsim.pairwise("time", name, mask="nan", size=None)
    np.testing.assert_array_equal(lazy, expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_distances_to_another_array(ensemble, lazy):
    reference = ensemble.sel(member="c", drop=True)
    metric = lsim.load_metric("ssim", size=None)
    values = ensemble.transpose("member", "time", "lat", "lon").values[..., None]
    arrays = (ensemble.chunk(member=1, time=2), reference.chunk(time=2)) if lazy else (ensemble, reference)
    found = arrays[0].lsim.distance(arrays[1], "ssim", size=None)
    assert (found.chunks is not None) == lazy
    found = found.transpose("member", "time")
    np.testing.assert_array_equal(found, [metric.distance(member, values[2], "pair") for member in values])
    together = arrays[0].lsim.distance(arrays[1], "ssim", dim="time", size=None).transpose("member", "time")
    np.testing.assert_array_equal(together, [metric.distance(member, values[2]) for member in values])
    fixed = arrays[0].lsim.distance(arrays[1], "ssim", scope=(-2.0, 2.0), size=None)
    np.testing.assert_array_equal(
        fixed.transpose("member", "time"), [metric.distance(m, values[2], (-2.0, 2.0)) for m in values]
    )
    assert "month" in found.coords


def test_frames_at_other_times_are_not_compared(ensemble):
    later = ensemble.assign_coords(time=ensemble.time + np.timedelta64(1, "D"))
    with pytest.raises(ValueError, match="time"):
        ensemble.lsim.distance(later, "l1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": "tme"}, "no dimension 'tme'; the array has"),
        ({"metric": "sim"}, "did you mean 'ssim'"),
        ({"widow": 3}, "has no option widow"),
        ({"scope": "dataset"}, "scope must be"),
        ({"mask": np.ones(3)}, "mask must be 'nan' or a DataArray of bool"),
        ({"spatial": ("lat", "time")}, "need a dimension each"),
        ({"size": 0}, "size must be"),
        ({"spatial": ("lat",)}, "a frame has two dimensions"),
        ({"size": 6}, "'ssim' cannot take frames of 6×6"),
        ({"size": None, "metric": "ssim", "spatial": ("member", "lat")}, "cannot take frames of 3×24"),
        ({"scope": (2.0, 1.0)}, r"fixed scope \(2.0, 1.0\): expected finite lo <= hi"),
        ({"scope": ([0, 0], [1, 1])}, "expected one value or 1, one per channel"),
        ({"channel": "member", "scope": ([0, 0], [1, 1])}, "expected one value or 3, one per channel"),
        ({"metric": "vi", "mask": "nan"}, "takes no mask"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_computed(ensemble, arguments, message):
    with pytest.raises((ValueError, lsim.UnknownMetricError), match=message):
        ensemble.chunk().lsim.pairwise(**({"dim": "time", "metric": "ssim"} | arguments))


@pytest.mark.parametrize(
    ("wrong", "arguments", "message"),
    [
        (lambda a: a.astype(complex), {}, "expected an integer or floating dtype, found complex128"),
        (lambda a: a.astype("datetime64[s]"), {}, "found datetime64"),
        (lambda a: a.isel(member=[0, 1]), {"channel": "member"}, "frames have 2 channels"),
        (lambda a: a.isel(lon=slice(0, 0)), {}, "empty"),
        (lambda a: a.isel(lon=slice(0, 6)), {"size": None}, "cannot take frames of 24×6"),
        (lambda a: a, {"scope": (2.0, 1.0)}, "expected finite lo <= hi"),
    ],
    ids=["complex", "dates", "channels", "empty", "size", "scope"],
)
def test_frames_that_no_task_could_take_are_errors_before_anything_is_computed(
    ensemble, wrong, arguments, message
):
    lazy = wrong(ensemble).chunk(time=1)
    with pytest.raises(ValueError, match=message):
        lazy.lsim.pairwise("time", "ssim", **arguments)
    with pytest.raises(ValueError, match=message):
        lazy.lsim.distance(lazy.isel(time=0, drop=True), "ssim", **arguments)


def test_metrics_published_on_8_bit_are_asked_for_the_size_that_frames_have(ensemble):
    small = ensemble.isel(lat=slice(0, 6)).chunk()
    published = {"metric": "ssim", "size": 24, "compat": "published"}
    assert small.lsim.pairwise("time", **published).compute().notnull().all()
    with pytest.raises(ValueError, match="cannot take frames of 6×32"):
        small.lsim.distance(small, **published)


def test_a_mask_of_other_frames_is_refused(ensemble):
    kept = xr.DataArray(np.ones(5, bool), dims="time", coords={"time": ensemble.time})
    later = kept.assign_coords(time=ensemble.time + np.timedelta64(1, "D"))
    with pytest.raises(ValueError, match="time"):
        ensemble.lsim.pairwise("time", "l1", mask=later)


def test_results_are_written_as_netcdf(ensemble, tmp_path):
    found = ensemble.lsim.pairwise("time", "l1", size=None)
    found.to_netcdf(tmp_path / "d.nc", engine="h5netcdf")
    with xr.open_dataarray(tmp_path / "d.nc", engine="h5netcdf") as back:
        xr.testing.assert_allclose(back.load(), found)
        assert back.attrs == found.attrs


def test_registering_it_loads_neither_torch_nor_dask():
    command = (
        "import sys, pipeline.accessor; print([m for m in ('torch', 'distributed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_fields_from_netcdf():
    samples = pytest.importorskip("iris_sample_data", reason="needs the package iris-sample-data")
    path = Path(samples.path) / "A1B_north_america.nc"
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as dataset:
        field = dataset["air_temperature"].isel(time=slice(0, 6)).load()
    found = field.chunk(time=2).lsim.pairwise("time", "ssim").compute()
    np.testing.assert_array_equal(found, lsim.load_metric("ssim").pairwise(field.values))
    np.testing.assert_array_equal(found["time_other"], field["time"])


def test_masked_blocks_of_a_lazy_array_are_missing_pixels(rng: np.random.Generator) -> None:
    values = rng.random((3, 16, 16))
    missing = rng.random(values.shape) < 0.1
    blocks = dask.array.from_array(
        np.ma.masked_array(np.where(missing, 1e9, values), missing), chunks=(1, 16, 16)
    )
    lazy = xr.DataArray(blocks, dims=("time", "y", "x"))
    plain = xr.DataArray(np.where(missing, np.nan, values), dims=("time", "y", "x"))
    for found, expected in (
        (
            lazy.lsim.pairwise("time", "l2", size=None, mask="nan"),
            plain.lsim.pairwise("time", "l2", size=None, mask="nan"),
        ),
        (
            lazy.lsim.distance(plain[0], "l2", size=None, mask="nan"),
            plain.lsim.distance(plain[0], "l2", size=None, mask="nan"),
        ),
    ):
        np.testing.assert_array_equal(found.compute(), expected)


def test_the_argument_is_the_reference(ensemble):
    reference = ensemble.sel(member="a", drop=True).rename("truth") + 300
    half = 300 + ensemble.sel(member="b", drop=True)
    found = half.lsim.distance(reference, "vrmse", scope="none", size=None)
    metric = lsim.load_metric("vrmse", size=None)
    a, b = (array.transpose("time", "lat", "lon").values for array in (reference, half))
    np.testing.assert_array_equal(found, metric.distance(a[..., None], b[..., None], "none"))
    assert found.attrs["reference"] == "truth"
    flat = xr.full_like(reference, float(reference.mean()))
    assert float(flat.lsim.distance(reference, "vrmse", scope="none", size=None).max()) < 3
    assert float(reference.lsim.distance(flat, "vrmse", scope="none", size=None).min()) > 100
    matrix = reference.lsim.pairwise("time", "nrmse", size=None, scope="none")
    assert matrix.attrs["reference"] == "time"
    assert float(matrix[1, 3]) == metric_of(a, "nrmse", 1, 3)


def metric_of(frames: np.ndarray, name: str, reference: int, other: int) -> float:
    metric = lsim.load_metric(name, size=None)
    return float(metric.distance(frames[reference], frames[other], "none")[0])


def test_results_in_the_units_of_the_array(ensemble):
    reference = ensemble.sel(member="c", drop=True)
    assert ensemble.lsim.pairwise("time", "l2", scope="none", size=None).attrs["units"] == "kg2 m-6"
    assert ensemble.lsim.distance(reference, "l1", scope="none", size=None).attrs["units"] == "kg m-3"
    assert ensemble.lsim.distance(reference, "l1", size=None).attrs["units"] == "1"
    bare = ensemble.drop_attrs()
    assert "units" not in bare.lsim.pairwise("time", "l1", scope="none", size=None).attrs
    with pytest.raises(ValueError, match="in 'kg m-3' and the reference in 'g cm-3'"):
        ensemble.lsim.distance(reference.assign_attrs(units="g cm-3"), "l1", scope="none")
    with pytest.raises(ValueError, match=r"'ssim' .* give the range"):
        ensemble.chunk().lsim.pairwise("time", "ssim", scope="none")
