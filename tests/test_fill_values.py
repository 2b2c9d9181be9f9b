"""Missing values as the formats and CF mean them: fill values, valid ranges, records never written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.io import netcdf_file

from pipeline.sources.catalog import CatalogError, Dataset
from pipeline.sources.readers import LazySequence, ReaderError, list_sequences
from pipeline.sources.readers.formats import missing_filters
from pipeline.sources.readers.missing import FILL_VALUES, Coding, decode, list_frames

TIMES = np.array([0.0, 1.0, 3.0])
FRAMES = np.arange(36, dtype=np.float32).reshape(3, 3, 4)


def list_one(path: Path, missing: str = "quarantine", **options: Any) -> LazySequence:
    options = {"dims": {"frame": "time"}, "parameter": "time", "variables": ["u"], **options}
    entry = Dataset(name="D", source={"path": "."}, reader="xarray", options=options, missing=missing)
    (sequence,) = list_sequences(entry, path)
    return sequence


def read(path: Path, missing: str = "quarantine", **options: Any) -> np.ndarray:
    return list_one(path, missing, **options).read()[0][..., 0]


def reason(path: Path, missing: str = "quarantine", **options: Any) -> str:
    """The reason for which a sequence is not read, on one line."""
    with pytest.raises((ReaderError, CatalogError)) as caught:
        read(path, missing, **options)
    return str(caught.value)


def write(
    path: Path, frames: np.ndarray, attributes: dict[str, Any], times: Any = TIMES, **of_time: Any
) -> Path:
    """Write NetCDF-4 by h5netcdf with the attributes just as they are."""
    import h5netcdf

    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"time": len(times), "y": frames.shape[1], "x": frames.shape[2]}
        variable = file.create_variable("u", ("time", "y", "x"), data=frames)
        time = file.create_variable("time", ("time",), data=np.asarray(times))
        for target, values in ((variable, attributes), (time, of_time)):
            for name, value in values.items():
                target.attrs[name] = value
    return path


def write_declared(
    path: Path, written: int, dtype: str, attributes: dict[str, Any], fill: Any = None
) -> Path:
    """Write what NetCDF's own library does for a run that was cut off: fill values stated in the file."""
    with h5py.File(path, "w") as file:
        dims = {"time": TIMES, "y": np.zeros(3), "x": np.zeros(4)}
        for name, values in dims.items():
            file.create_dataset(name, data=values, maxshape=(None,) if name == "time" else None).make_scale(
                name
            )
        fill = FILL_VALUES[dtype] if fill is None else fill
        frames = file.create_dataset(
            "u", (written, 3, 4), dtype, maxshape=(None, 3, 4), chunks=(1, 3, 4), fillvalue=fill
        )
        frames[...] = FRAMES[:written]
        for axis, name in enumerate(dims):
            frames.dims[axis].attach_scale(file[name])
        frames.attrs.update(attributes)
    return path


# -- records never written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FILL_VALUES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("missing", ["quarantine", "keep"])
def test_records_that_were_never_written_are_no_frames(
    tmp_path: Path, dtype: str, packed: bool, missing: str
):
    attributes = {"scale_factor": np.float32(0.5), "add_offset": np.float32(10)} if packed else {}
    path = write_declared(tmp_path / "u.nc", 1, dtype, attributes)
    for options in ({}, {"fill": -1}):
        text = reason(path, missing, **options)
        assert (
            "24 of 36 values missing: 24 never written (frames 1-2); frames 1-2 have no finite value" in text
        )


@pytest.mark.parametrize("dtype", FILL_VALUES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_default_fill_value_is_missing_where_the_file_states_it(tmp_path: Path, dtype: str, packed: bool):
    attributes = {"scale_factor": np.float32(0.5)} if packed else {}
    path = write_declared(tmp_path / "u.nc", 3, dtype, attributes)
    with h5py.File(path, "a") as file:
        file["u"][1, 2] = FILL_VALUES[dtype]
    text = reason(path)
    assert "4 of 36 values missing: 4 equal to NetCDF's default fill value" in text
    assert "(frame 1)" in text
    frames = read(path, "keep")
    expected = FRAMES * np.float64(0.5 if packed else 1)
    expected[1, 2] = np.nan
    np.testing.assert_array_equal(frames, expected)


def test_hdf5_that_is_no_netcdf_has_no_default_fill_value(tmp_path: Path):
    path = write_declared(tmp_path / "u.nc", 3, "f4", {}, fill=0)
    with h5py.File(path, "a") as file:
        file["u"][1, 2] = [0, FILL_VALUES["f4"], 0, 0]
    frames = read(path)
    np.testing.assert_array_equal(frames[1, 2], np.float32([0, FILL_VALUES["f4"], 0, 0]))


def test_an_attribute_replaces_the_default_fill_value(tmp_path: Path):
    path = write_declared(tmp_path / "u.nc", 3, "i2", {"_FillValue": np.int16(5)}, fill=-32767)
    with h5py.File(path, "a") as file:
        file["u"][1, 2] = -32767
    frames = read(path, "keep")
    assert (frames[1, 2] == -32767).all()
    assert np.isnan(frames).sum() == 1


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "f4", "f8"])
def test_classic_netcdf_has_default_fill_values(tmp_path: Path, dtype: str):
    frames = FRAMES.astype(dtype)
    frames[2, 1, 1] = FILL_VALUES[dtype]
    with netcdf_file(tmp_path / "u.nc", "w") as file:
        for name, length in (("time", None), ("y", 3), ("x", 4)):
            file.createDimension(name, length)
        file.createVariable("time", "f8", ("time",))[:] = TIMES
        file.createVariable("u", dtype, ("time", "y", "x"))[:] = frames
    assert "1 of 36 values missing: 1 equal to NetCDF's default fill value" in reason(tmp_path / "u.nc")
    assert np.argwhere(np.isnan(read(tmp_path / "u.nc", "keep"))).tolist() == [[2, 1, 1]]
    assert read(tmp_path / "u.nc", fill=7)[2, 1, 1] == 7


def test_a_parameter_that_was_not_written_is_named(tmp_path: Path):
    path = write_declared(tmp_path / "u.nc", 3, "f4", {})
    with h5py.File(path, "a") as file:
        file["time"].attrs["missing_value"] = np.float32(3)
    assert "parameter 'time': 1 of 3 values missing: 1 equal to missing_value = 3.0 (frame 2)" in reason(path)
    with h5py.File(path, "a") as file:
        file["time"].attrs["valid_max"] = 0.5
    assert "1 equal to missing_value = 3.0 (frame 2), 1 above valid_max = 0.5 (frame 1)" in reason(path)
    _, parameter = list_one(path, parameter=[1, 2, 3]).read()
    np.testing.assert_array_equal(parameter, [0, 0.5, 1])


def test_a_whole_frame_of_the_default_is_missing_where_unsigned_changes_it(tmp_path: Path):
    path = write_declared(tmp_path / "u.nc", 3, "i1", {"_Unsigned": "true"})
    with h5py.File(path, "a") as file:
        file["u"][1, 0] = -127
    assert (read(path)[1, 0] == 129).all()
    with h5py.File(path, "a") as file:
        file["u"][1] = -127
    assert "12 equal to NetCDF's default fill value 129" in reason(path)


# -- attributes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_FillValue", "missing_value"])
@pytest.mark.parametrize("number", [1e20, -999.9, 1e300])
def test_a_fill_value_of_another_dtype_is_cast_to_the_data_s(tmp_path: Path, name: str, number: float):
    frames = FRAMES.copy()
    with np.errstate(over="ignore"):
        frames[1, 0, 2] = np.float64(number)
    path = write(tmp_path / "u.nc", frames, {name: np.float64(number)})
    assert f"1 of 36 values missing: 1 equal to {name} = " in reason(path)
    assert np.argwhere(np.isnan(read(path, "keep"))).tolist() == [[1, 0, 2]]


def test_every_one_of_several_missing_values_counts_once_by_its_first_cause(tmp_path: Path):
    attributes = {"_FillValue": np.float32(3), "missing_value": np.array([3.0, 7, 8]), "valid_max": 34}
    text = reason(write(tmp_path / "u.nc", FRAMES, attributes))
    assert "4 of 36 values missing: 1 equal to _FillValue = 3.0 (frame 0)" in text
    assert (
        "missing_value = 7.0 (frame 0), 1 equal to missing_value = 8.0 (frame 0), 1 above valid_max" in text
    )


@pytest.mark.parametrize(
    ("attributes", "valid"),
    [
        ({"valid_min": np.int16(4)}, (4, 35)),
        ({"valid_max": 30.0}, (0, 30)),
        ({"valid_range": np.array([4, 30], "i2")}, (4, 30)),
        ({"valid_min": np.int16(4), "valid_max": np.int16(30)}, (4, 30)),
        ({"valid_range": np.array([4, 30], "i2"), "valid_min": np.int16(4)}, (4, 30)),
    ],
)
def test_a_valid_range_is_in_stored_values(
    tmp_path: Path, attributes: dict[str, Any], valid: tuple[int, int]
):
    stored = FRAMES.astype("i2")
    packing = {"scale_factor": 0.1, "add_offset": 100.0}
    frames = read(write(tmp_path / "u.nc", stored, {**attributes, **packing}), "keep")
    outside = (stored < valid[0]) | (stored > valid[1])
    np.testing.assert_array_equal(np.isnan(frames), outside)
    np.testing.assert_array_equal(frames[~outside], (stored * 0.1 + 100)[~outside])


@pytest.mark.parametrize("bounds", [(1, -2), (1, 254)])
def test_unsigned_integers_are_compared_as_such(tmp_path: Path, bounds: tuple[int, int]):
    stored = FRAMES.astype("i1")
    stored[1, 1] = [-1, -2, -3, 0]
    attributes = {"_Unsigned": "true", "valid_range": np.array(bounds, "i2"), "_FillValue": np.int16(253)}
    frames = read(write(tmp_path / "u.nc", stored, attributes), "keep")
    np.testing.assert_array_equal(frames[1, 1], [np.nan, 254, np.nan, np.nan])


@pytest.mark.parametrize(
    ("attributes", "pattern"),
    [
        ({"_FillValue": "none"}, "_FillValue is 'none'; expected a number"),
        ({"missing_value": "-999"}, "missing_value is '-999'; expected a number"),
        ({"_FillValue": np.array([1.0, 2])}, "_FillValue holds 2 numbers; expected 1"),
        ({"valid_range": "0 100"}, "valid_range is '0 100'; expected a number"),
        ({"valid_range": 5.0}, "valid_range holds 1 numbers; expected 2"),
        ({"valid_range": np.array([5.0, 1])}, "expected lower, upper"),
        ({"valid_min": np.array([1.0, 2])}, "valid_min holds 2 numbers; expected 1"),
        ({"valid_max": np.nan}, "valid_max is nan; expected numbers"),
        ({"valid_range": np.array([0.0, 50]), "valid_max": 40.0}, "expected one of them"),
        ({"scale_factor": "0.5"}, "scale_factor is '0.5'; expected a number"),
        ({"add_offset": np.array([1.0, 2])}, "add_offset holds 2 numbers; expected 1"),
        ({"scale_factor": np.inf}, "scale_factor is inf; expected a finite number"),
    ],
)
def test_a_malformed_attribute_is_a_reason(tmp_path: Path, attributes: dict[str, Any], pattern: str):
    for options in ({}, {"fill": -1}):
        text = reason(write(tmp_path / "u.nc", FRAMES, attributes), "keep", **options)
        assert f"u.nc: variable 'u': attribute {pattern}" in text or pattern in text


@pytest.mark.parametrize(
    ("name", "number"), [("valid_max", 3.55), ("missing_value", -999.9), ("_FillValue", 4e9)]
)
def test_an_attribute_in_unpacked_units_is_a_reason(tmp_path: Path, name: str, number: float):
    attributes = {name: number, "scale_factor": 0.1}
    text = reason(write(tmp_path / "u.nc", FRAMES.astype("i2"), attributes), "keep")
    assert f"attribute {name} is {number}, which is no value of the stored type int16" in text


def test_integers_that_floating_point_would_round_are_refused(tmp_path: Path):
    large = FRAMES.astype("i8") + 2**60
    path = write(tmp_path / "u.nc", large, {"_FillValue": np.int64(0)})
    assert "64-bit integers beyond 2^53" in reason(path)
    np.testing.assert_array_equal(read(write(tmp_path / "v.nc", large, {})), large)
    small = FRAMES.astype("i8")
    frames = read(write(tmp_path / "w.nc", small, {"_FillValue": np.int64(-(2**63))}))
    np.testing.assert_array_equal(frames, small)


def test_unpacked_values_are_not_rounded_to_the_precision_of_the_scale(tmp_path: Path):
    stored = FRAMES.astype("i4") + 2**30
    frames = read(
        write(tmp_path / "u.nc", stored, {"scale_factor": np.float32(0.5), "_FillValue": np.int32(0)})
    )
    np.testing.assert_array_equal(frames, stored * 0.5)
    twice = read(
        write(tmp_path / "v.nc", FRAMES.astype("i2"), {"scale_factor": 2, "_FillValue": np.int16(-1)})
    )
    np.testing.assert_array_equal(twice, FRAMES * 2)


def test_nan_that_is_stored_is_counted_with_its_frames(tmp_path: Path):
    frames = FRAMES.copy()
    frames[0, 0, 0] = frames[2] = np.nan
    text = reason(write(tmp_path / "u.nc", frames, {}))
    assert "13 of 36 values missing: 13 stored as NaN (frames 0, 2); frame 2 has no finite value" in text
    assert list_frames([1, 2, 4, 6, 8, 10]) == "frames 1-2, 4, 6, 8 and more"


# -- Zarr --------------------------------------------------------------------------------------------------


def write_zarr(path: Path, zarr_format: int, frames: np.ndarray, fill: Any, attribute: Any = None) -> Path:
    """Write a store by zarr itself, whose default fill value is 0."""
    group = zarr.create_group(path, zarr_format=zarr_format)
    for name, values in (("u", frames), ("time", TIMES.astype(frames.dtype))):
        dims = ("time", "y", "x")[: values.ndim]
        how: dict[str, Any] = {"dimension_names": dims} if zarr_format == 3 else {}
        chunks = (1, *values.shape[1:])
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks, fill_value=fill, **how
        )
        if zarr_format == 2:
            array.attrs["_ARRAY_DIMENSIONS"] = list(dims)
        if attribute is not None and name == "u":
            array.attrs["_FillValue"] = attribute
        array[...] = values
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1"])
def test_zeros_of_zarr_are_data(tmp_path: Path, zarr_format: int, dtype: str):
    frames = FRAMES.astype(dtype)
    frames[1] = 0  # a chunk that isn't stored, as it holds what it would read as
    path = write_zarr(tmp_path / "u.zarr", zarr_format, frames, 0)
    for missing in ("quarantine", "keep"):
        np.testing.assert_array_equal(read(path, missing), frames)
    np.testing.assert_array_equal(list_one(path).read()[1], [0, 1 / 3, 1])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_a_fill_value_among_the_attributes_counts(tmp_path: Path, zarr_format: int, number: int, dtype: str):
    path = write_zarr(tmp_path / "u.zarr", zarr_format, FRAMES.astype(dtype), 0, attribute=number)
    assert f"1 of 36 values missing: 1 equal to _FillValue = {number}" in reason(path)
    assert np.argwhere(np.isnan(read(path, "keep"))).tolist() == [[0, number // 4, number % 4]]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_fill_values_that_xarray_writes_to_zarr_count(tmp_path: Path, zarr_format: int):
    frames = FRAMES.copy()
    frames[1, 1, 1] = np.nan
    data = xr.Dataset({"u": (("time", "y", "x"), frames)}, {"time": TIMES})
    for number, (dtype, fill) in enumerate((("f4", -999.0), ("i2", -1), ("f4", np.nan))):
        path = tmp_path / f"{number}.zarr"
        encoding = {"u": {"dtype": dtype, "_FillValue": fill}}
        data.to_zarr(path, zarr_format=zarr_format, consolidated=False, encoding=encoding)
        np.testing.assert_array_equal(read(path, "keep"), frames)
        assert "1 of 36 values missing" in reason(path)


# -- files that can't be read ------------------------------------------------------------------------------


def write_compressed(path: Path, number: int) -> Path:
    """Write a variable that needs a filter of HDF5 which isn't there."""
    write(path, FRAMES, {})
    with h5py.File(path, "a") as file:
        scales = [file[name] for name in ("time", "y", "x")]
        del file["u"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, 3, 4))
        plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(FRAMES.shape)
        identity = h5py.h5d.create(file.id, b"u", h5py.h5t.NATIVE_FLOAT, space, dcpl=plist)
        variable = h5py.Dataset(identity)
        for frame in range(len(FRAMES)):
            variable.id.write_direct_chunk((frame, 0, 0), b"compressed" * 10)
        for axis, scale in enumerate(scales):
            variable.dims[axis].attach_scale(scale)
    return path


@pytest.mark.parametrize(
    ("number", "words"), [(32013, "compressed with ZFP.*hdf5plugin"), (300, "filter 300 of HDF5")]
)
def test_a_filter_that_is_not_there_is_named(
    tmp_path: Path, number: int, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    path = write_compressed(tmp_path / "u.h5", number)
    if h5py.h5z.filter_avail(number):
        pytest.skip("hdf5plugin was imported already")
    with pytest.raises(ReaderError, match=rf"u\.h5: variable 'u' is .*{words}"):
        list_one(path, engine="h5netcdf").read()


@pytest.mark.smoke
@pytest.mark.parametrize("filter_name", ["Blosc", "Zstd"])
def test_hdf5plugin_is_used_where_it_is_installed(tmp_path: Path, filter_name: str):
    pytest.importorskip("hdf5plugin")
    path = write(tmp_path / "u.h5", FRAMES, {})
    # In a process of its own, as netCDF4 makes h5py find its filters, which can't write.
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_PLUGIN_PATH"}
    program = f"""
import h5py, hdf5plugin
with h5py.File({str(path)!r}, "a") as file:
    values = file["u"][...]
    del file["u"]
    how = hdf5plugin.{filter_name}()
    variable = file.create_dataset("u", data=values, chunks=(1, 3, 4), compression=how)
    for axis, name in enumerate(("time", "y", "x")):
        variable.dims[axis].attach_scale(file[name])
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    np.testing.assert_array_equal(read(path, engine="h5netcdf"), FRAMES)
    assert missing_filters(path, None) == {}


def test_64_bit_classic_netcdf_is_named(tmp_path: Path):
    with netcdf_file(tmp_path / "u.nc", "w") as file:
        for name, length in (("time", 3), ("y", 3), ("x", 4)):
            file.createDimension(name, length)
        file.createVariable("u", "f4", ("time", "y", "x"))[:] = FRAMES
    content = (tmp_path / "u.nc").read_bytes()
    (tmp_path / "u.nc").write_bytes(b"CDF\x05" + content[4:])
    assert "NetCDF-3 with 64-bit data (CDF-5)" in reason(tmp_path / "u.nc", engine="scipy")


@pytest.mark.parametrize("group", [None, "tasks"])
def test_scales_of_a_sibling_group_are_named(tmp_path: Path, group: str | None):
    with h5py.File(tmp_path / "u.h5", "w") as file:
        file["scales/sim_time"] = TIMES
        file["scales/x"] = np.arange(4.0)
        file["tasks/u"] = FRAMES
        for axis, name in ((0, "sim_time"), (2, "x")):
            file[f"scales/{name}"].make_scale(name)
            file["tasks/u"].dims[axis].attach_scale(file[f"scales/{name}"])
    text = reason(tmp_path / "u.h5", group=group, variables=[], engine="h5netcdf")
    assert "'tasks/u' has its dimension scales in another group ('/scales/sim_time')" in text
    assert "NPZ" in text


# -- against the NetCDF library ----------------------------------------------------------------------------


@st.composite
def variables(draw: st.DrawFn) -> dict[str, Any]:
    """A variable as the NetCDF library takes it: stored values, attributes and records that are written."""
    file_format = draw(
        st.sampled_from(["NETCDF4", "NETCDF4_CLASSIC", "NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET"])
    )
    classic = ["i1", "i2", "i4", "f4", "f8"]
    dtype = draw(st.sampled_from(classic if file_format != "NETCDF4" else list(FILL_VALUES)))
    special = [FILL_VALUES[dtype], 0, 1, 7, 90, 100]
    numbers = st.sampled_from(special + ([np.nan, 1e20] if dtype[0] == "f" else []))
    values = np.array(draw(st.lists(numbers, min_size=18, max_size=18)), dtype=dtype).reshape(3, 2, 3)
    attributes: dict[str, Any] = {}
    some = st.sampled_from([value for value in special if value == value]).map(
        lambda v: np.dtype(dtype).type(v)
    )
    fill = st.none() | some
    if draw(st.booleans()):
        attributes["missing_value"] = draw(some | st.lists(some, min_size=2, max_size=3).map(np.array))
    low, high = np.dtype(dtype).type(1), np.dtype(dtype).type(90)
    attributes |= draw(
        st.sampled_from([{}, {"valid_min": low}, {"valid_max": high}, {"valid_range": np.array([low, high])}])
    )
    if draw(st.booleans()):
        attributes |= {"scale_factor": draw(st.sampled_from([np.float32(0.5), 0.1])), "add_offset": 3.0}
    if dtype in ("i1", "i2", "i4") and draw(st.booleans()):
        attributes["_Unsigned"] = "true"  # without a fill value the library can't mask its own default
        fill = some
    return {
        "format": file_format,
        "values": values,
        "attributes": attributes,
        "fill": draw(fill),
        "written": draw(st.sampled_from([2, 3])),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(variable=variables())
def test_missing_values_are_those_of_the_netcdf_library(tmp_path: Path, variable: dict[str, Any]):
    netcdf = pytest.importorskip("netCDF4")
    path = tmp_path / "u.nc"
    with netcdf.Dataset(path, "w", format=variable["format"]) as file:
        for name, length in (("time", None), ("y", 2), ("x", 3)):
            file.createDimension(name, length)
        file.createVariable("time", "f8", ("time",))[:] = TIMES
        values = variable["values"]
        created = file.createVariable("u", values.dtype, ("time", "y", "x"), fill_value=variable["fill"])
        created.set_auto_maskandscale(False)
        created.setncatts(variable["attributes"])
        created[: variable["written"]] = values[: variable["written"]]
    # Larger ones are refused: floating point, which missing values need, doesn't hold them.
    assume(values.dtype.kind not in "iu" or np.abs(values.astype(float)).max() <= 2**53)
    with netcdf.Dataset(path) as file:
        expected = file["u"][:]
    missing = np.ma.getmaskarray(expected) | np.isnan(np.ma.getdata(expected))
    for engine in ("h5netcdf" if "4" in variable["format"][:7] else "scipy", "netcdf4"):
        empty = missing.all(axis=(1, 2))
        if empty.any():
            text = reason(path, "keep", engine=engine)
            assert f"{list_frames(np.flatnonzero(empty))} ha" in text or "64-bit integers beyond" in text
            continue
        frames = read(path, "keep", engine=engine)
        np.testing.assert_array_equal(np.isnan(frames), missing)
        np.testing.assert_allclose(
            frames[~missing], np.ma.getdata(expected)[~missing].astype(float), rtol=1e-6
        )


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["i1", "u1", "i2", "i4", "f4", "f8"]),
    st.lists(st.integers(-3, 100), min_size=12, max_size=12),
    st.integers(-3, 100),
    st.integers(-3, 100),
)
def test_each_value_is_missing_by_the_rule_alone(dtype: str, numbers: list[int], fill: int, bound: int):
    values = np.array(numbers).astype(dtype).reshape(3, 2, 2)
    fill, bound = (int(np.array(number).astype(dtype)) for number in (fill, bound))
    attributes = {"missing_value": [fill], "valid_max": float(bound)}
    coding = Coding.of(attributes, values.dtype, default_fill=True, as_float=True)
    decoded, missing = decode(values, coding)
    expected = (values == fill) | (values > bound)
    np.testing.assert_array_equal(np.isnan(decoded), expected)
    np.testing.assert_array_equal(decoded[~expected], values[~expected])
    assert sum(sum(frames.values()) for frames in missing.causes.values()) == expected.sum()
