"""Readers: each format gives the frames that were stored, or says what is wrong with them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from pipeline.sources.catalog import Catalog, CatalogError, Dataset
from pipeline.sources.readers import READERS, LazySequence, ReaderError, find_reader, list_sequences
from pipeline.sources.readers.base import SourceFile, field_in_name, natural_key, scale_parameter


def entry(reader: str, **more: Any) -> Dataset:
    return Dataset.model_validate({"name": "D", "source": {"path": "."}, "reader": reader, **more})


def read_one(folder: Path, reader: str = "lsim", **more: Any) -> tuple[np.ndarray, np.ndarray]:
    (sequence,) = list_sequences(entry(reader, **more), folder)
    restored = pickle.loads(pickle.dumps(sequence))
    return restored.read()


def save_frames(
    folder: Path, frames: np.ndarray, numbers: list[int] | None = None, ending: str = "png"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(numbers or range(len(frames)), frames, strict=True):
        if ending == "png":
            Image.fromarray(frame.squeeze()).save(folder / f"frame{number:02d}.png")
        else:
            np.savez(folder / f"frame{number:02d}.npz", frame)


# -- the published layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "ending"),
    [
        ((6, 7, 3), np.uint8, "png"),
        ((6, 7, 1), np.uint8, "png"),
        ((6, 7, 1), np.uint16, "png"),
        ((6, 7, 2), np.float32, "npz"),
        ((6, 7, 1), np.float64, "npz"),
    ],
)
def test_frames_come_back_as_stored(tmp_path: Path, rng: np.random.Generator, shape, dtype, ending: str):
    frames = rng.integers(0, 250, (3, *shape)).astype(dtype)
    save_frames(tmp_path / "s", frames, [0, 2, 10], ending)
    (tmp_path / "s" / f"ref.{ending}").write_bytes(b"not an image")
    (tmp_path / "s" / "family.json").write_text("{}")
    (tmp_path / "family.json").write_text("{}")
    read, parameter = read_one(tmp_path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, frames)
    np.testing.assert_array_equal(parameter, [0, 0.2, 1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_alpha_is_dropped_and_palettes_are_colours(tmp_path: Path, rng: np.random.Generator, mode: str):
    (tmp_path / "s").mkdir()
    expected = []
    for number in range(2):
        image = Image.fromarray(rng.integers(0, 255, (5, 4, 4), dtype=np.uint8), "RGBA")
        image = (
            image.convert("L" if mode in ("LA", "1") else "RGB").convert(mode) if mode != "RGBA" else image
        )
        image.save(tmp_path / "s" / f"f{number:02d}.png")
        plain = np.asarray(image.convert("L" if mode in ("LA", "1") else "RGB"))
        expected.append(plain[..., None] if plain.ndim == 2 else plain)
    np.testing.assert_array_equal(read_one(tmp_path)[0], expected)


def test_four_channels_in_npz_lose_alpha(tmp_path: Path, rng: np.random.Generator):
    frames = rng.random((2, 3, 3, 4), dtype=np.float32)
    save_frames(tmp_path / "s", frames, ending="npz")
    np.testing.assert_array_equal(read_one(tmp_path)[0], frames[..., :3])


def test_colours_of_16_bits_are_not_cut_silently(tmp_path: Path):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = (b"\0" + bytes(range(12))) * 2
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "s").mkdir()
    for number in range(2):
        (tmp_path / "s" / f"f{number:02d}.png").write_bytes(png)
    with pytest.raises(ReaderError, match=r"f00.png: 16 bits"):
        read_one(tmp_path)


def test_fields_and_names_come_from_folders(tmp_path: Path):
    for name in ("plume10.density", "plume2.density", "plume2.vel", "shape1"):
        save_frames(tmp_path / name, np.zeros((2, 4, 4), np.uint8))
    found = list_sequences(entry("lsim", options={"field": "rgb"}), tmp_path)
    assert [(s.field, s.name) for s in found] == [
        ("density", "plume2.density"),
        ("density", "plume10.density"),
        ("rgb", "shape1"),
        ("vel", "plume2.vel"),
    ]
    assert field_in_name("density", "x") == "x"  # a name alone is a name, not a field


def test_listing_decodes_nothing(tmp_path: Path):
    for number in range(2):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"f{number:02d}.png").write_bytes(b"x" * number)
    (sequence,) = list_sequences(entry("lsim"), tmp_path)
    assert [(os.path.basename(f.path), f.size) for f in sequence.files] == [("f00.png", 0), ("f01.png", 1)]
    with pytest.raises(ReaderError, match="cannot be decoded"):
        sequence.read()


def break_nothing(folder: Path) -> None:
    pass


def truncate(folder: Path) -> None:
    file = folder / "frame04.png"
    file.write_bytes(file.read_bytes()[:60])


def resize(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(folder / "frame04.png")


def drop(folder: Path) -> None:
    (folder / "frame04.png").unlink()


def duplicate(folder: Path) -> None:
    np.savez(folder / "other04.npz", np.zeros((4, 4), np.uint8))


def rename(folder: Path) -> None:
    (folder / "frame04.png").rename(folder / "frame_four.png")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (truncate, r"frame04\.png: cannot be decoded"),
        (resize, r"frame04\.png: sequence b: frame of shape \(5, 4, 1\).*expected \(4, 4, 1\)"),
        (drop, r"sequence b: 5 frames \(0, 1, 2, 3, 5\); expected 6"),
        (duplicate, r"parameter does not rise: frame04\.png and other04\.npz both stand at 4"),
        (rename, r"frame_four\.png: sequence b: .*2 digits"),
        (empty, r"sequence b: no frame"),
    ],
)
def test_damage_names_the_sequence_and_file(tmp_path: Path, rng: np.random.Generator, damage, pattern: str):
    for name in ("a", "b", "c"):
        save_frames(tmp_path / name, rng.integers(0, 255, (6, 4, 4), dtype=np.uint8))
    damage(tmp_path / "b")
    a, b, c = list_sequences(entry("lsim"), tmp_path)
    with pytest.raises(ReaderError, match=pattern) as caught:
        b.read()
    assert str(tmp_path / "b") in caught.value.file
    a.read()
    c.read()


def test_the_number_of_frames_may_be_stated(tmp_path: Path):
    save_frames(tmp_path / "s", np.zeros((5, 4, 4), np.uint8))
    with pytest.raises(ReaderError, match=r"5 frames.*expected 11"):
        read_one(tmp_path, options={"frames": 11})


def test_equal_counts_with_other_numbers_are_another_parameter(tmp_path: Path):
    save_frames(tmp_path / "a", np.zeros((3, 4, 4), np.uint8), [0, 1, 2])
    save_frames(tmp_path / "b", np.zeros((3, 4, 4), np.uint8), [0, 4, 5])
    _, b = list_sequences(entry("lsim"), tmp_path)
    np.testing.assert_array_equal(b.read()[1], [0, 0.8, 1])


def test_a_link_to_nothing_breaks_one_sequence_alone(tmp_path: Path):
    for name in ("a", "b.Density", "c"):
        save_frames(tmp_path / name, np.zeros((3, 4, 4), np.uint8))
    gone = tmp_path / "b.Density" / "frame01.png"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "d").symlink_to(tmp_path / "nowhere")
    found = list_sequences(entry("lsim"), tmp_path)
    assert [(s.field, s.name) for s in found] == [
        ("density", "b.Density"),
        ("frames", "a"),
        ("frames", "c"),
        ("frames", "d"),
    ]
    for sequence, file in ((found[0], gone), (found[3], tmp_path / "d")):
        with pytest.raises(ReaderError, match="cannot be opened: No such file") as caught:
            pickle.loads(pickle.dumps(sequence)).read()
        assert caught.value.file == str(file)
    found[1].read()
    gone.unlink()
    save_frames(tmp_path / "b.Density", np.zeros((3, 4, 4), np.uint8))
    list_sequences(entry("lsim"), tmp_path)[0].read()


def test_a_folder_that_cannot_be_listed_breaks_its_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        save_frames(tmp_path / name, np.zeros((3, 4, 4), np.uint8))
    refuse_listing(monkeypatch, tmp_path / "b")
    a, b = list_sequences(entry("lsim"), tmp_path)
    a.read()
    with pytest.raises(ReaderError, match=r"b: sequence b: cannot be opened: Permission denied"):
        b.read()
    refuse_listing(monkeypatch, tmp_path)
    with pytest.raises(CatalogError, match=r"dataset D .*Permission denied"):
        list_sequences(entry("lsim"), tmp_path)


def refuse_listing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


@pytest.mark.parametrize("ending", ["png", "npz"])
def test_endings_count_in_any_case_and_folders_are_no_frames(
    tmp_path: Path, rng: np.random.Generator, ending: str
):
    frames = rng.integers(0, 250, (3, 4, 4, 3), dtype=np.uint8)
    save_frames(tmp_path / "s", frames, ending=ending)
    for file in list((tmp_path / "s").iterdir())[1:]:
        file.rename(file.with_suffix(f".{ending.upper()}"))
    (tmp_path / "s" / f"f10.{ending}").mkdir()
    (tmp_path / "s" / f"REF.{ending.upper()}").write_bytes(b"not an image")
    np.testing.assert_array_equal(read_one(tmp_path)[0], frames)


# -- stacks ------------------------------------------------------------------------------------------------


def test_stacks(tmp_path: Path, rng: np.random.Generator):
    scalar, vector = rng.random((3, 4, 5)), rng.random((3, 4, 5, 2), dtype=np.float32)
    parameter = np.array([1.0, 3.0, 5.0])
    np.savez(tmp_path / "run1.npz", frames=scalar, parameter=parameter)
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "run2.npy", vector)
    np.save(tmp_path / "more" / "run2.parameter.npy", parameter)
    found = {s.name: s for s in list_sequences(entry("stack"), tmp_path)}
    assert set(found) == {"run1", "more/run2"}
    np.testing.assert_array_equal(found["run1"].read()[0], scalar[..., None])
    frames, scaled = found["more/run2"].read()
    np.testing.assert_array_equal(frames, vector)
    np.testing.assert_array_equal(scaled, [0, 0.5, 1])
    assert len(found["more/run2"].files) == 2


def test_stacks_with_several_fields(tmp_path: Path, rng: np.random.Generator):
    arrays = {"rho": rng.random((2, 4, 4)), "u": rng.random((2, 4, 4, 2))}
    np.savez(tmp_path / "run.npz", **arrays, nu=np.array([1, 2]))
    options = {"arrays": {"density": "rho", "velocity": "u"}, "parameter": "nu"}
    fields = {"rho": {"source": "density"}, "v": {"source": "velocity", "channel": 1}}
    found = list_sequences(entry("stack", options=options, fields=fields), tmp_path)
    assert [s.field for s in found] == ["rho", "v"]
    np.testing.assert_array_equal(found[0].read()[0], arrays["rho"][..., None])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found[1])).read()[0], arrays["u"][..., 1:])


@pytest.mark.parametrize(
    ("arrays", "pattern"),
    [
        ({"frames": np.zeros((3, 4, 4))}, r"no array 'parameter'; found frames"),
        ({"parameter": np.arange(3)}, r"no array 'frames'"),
        ({"frames": np.zeros((3, 4, 4)), "parameter": np.arange(4)}, r"3 frames, but 4 values"),
        ({"frames": np.zeros((3, 4, 4)), "parameter": [0, 2, 1]}, r"does not rise: 0, 2, 1"),
        ({"frames": np.zeros((3, 4, 4)), "parameter": [0, np.nan, 1]}, r"not finite"),
        ({"frames": np.zeros((4, 4)), "parameter": np.arange(4)}, r"shape \(4, 4\); expected"),
        ({"frames": np.array([{}]), "parameter": np.arange(4)}, r"'frames' holds Python objects"),
    ],
)
def test_wrong_stacks_name_file_and_fault(tmp_path: Path, arrays: dict[str, Any], pattern: str):
    np.savez(tmp_path / "run.npz", **arrays)
    with pytest.raises(ReaderError, match=rf"run\.npz: .*{pattern}"):
        read_one(tmp_path, "stack")


def test_stacks_in_capitals_and_links_to_nothing(tmp_path: Path, rng: np.random.Generator):
    frames, parameter = rng.random((3, 4, 5)), np.array([1.0, 3.0, 5.0])
    np.savez(tmp_path / "a.npz", frames=frames, parameter=parameter)
    (tmp_path / "a.npz").rename(tmp_path / "a.NPZ")
    np.save(tmp_path / "b.npy", frames)
    (tmp_path / "b.npy").rename(tmp_path / "b.NPY")
    np.save(tmp_path / "b.parameter.npy", parameter)
    (tmp_path / "b.parameter.npy").rename(tmp_path / "b.parameter.NPY")
    (tmp_path / "c.npz").symlink_to(tmp_path / "nowhere.npz")
    (tmp_path / "d.npz").mkdir()
    a, b, c = list_sequences(entry("stack"), tmp_path)
    for sequence in (a, b):
        np.testing.assert_array_equal(sequence.read()[0], frames[..., None])
        np.testing.assert_array_equal(sequence.read()[1], [0, 0.5, 1])
    with pytest.raises(ReaderError, match=r"c\.npz: sequence c: cannot be opened: No such file"):
        c.read()


# -- what xarray opens -------------------------------------------------------------------------------------


def simulation(rng: np.random.Generator) -> xr.Dataset:
    return xr.Dataset(
        {
            "rho": (("run", "time", "lat", "lon"), rng.random((2, 3, 4, 5)), {"units": "kg m-3"}),
            "u": (("run", "lat", "lon", "time", "c"), rng.random((2, 4, 5, 3, 2))),
            "unrelated": (("run",), np.zeros(2)),
            "nu": (("run", "time"), np.array([[1.0, 2, 3], [2, 3, 6]])),
        },
        coords={"run": np.array(["r1", "r2"], dtype=object)},
    )


OPTIONS = {
    "dims": {"sequence": "run", "frame": "time", "y": "lat", "x": "lon", "channel": "c"},
    "parameter": "nu",
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["nc", "zarr2", "zarr3"])
def test_netcdf_and_zarr_with_a_mapping_of_dims(tmp_path: Path, rng: np.random.Generator, kind: str):
    data = simulation(rng)
    if kind == "nc":
        data.to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    else:
        data.to_zarr(tmp_path / "sim.zarr", zarr_format=int(kind[-1]), consolidated=False)
    found = list_sequences(entry("xarray", options=OPTIONS), tmp_path)
    assert [(s.field, s.name) for s in found] == [("rho", "r1"), ("rho", "r2"), ("u", "r1"), ("u", "r2")]
    assert found[0].attributes == {"units": "kg m-3"}
    sequences = pickle.loads(pickle.dumps(found))
    frames, parameter = sequences[1].read()
    np.testing.assert_array_equal(frames, data.rho.values[1][..., None])
    np.testing.assert_array_equal(parameter, [0, 0.25, 1])
    np.testing.assert_array_equal(sequences[2].read()[0], data.u.values[0].transpose(2, 0, 1, 3))


def test_a_store_is_seen_to_change(tmp_path: Path, rng: np.random.Generator):
    simulation(rng).to_zarr(tmp_path / "sim.zarr", zarr_format=3, consolidated=False)
    before = SourceFile.of(tmp_path / "sim.zarr")
    assert before == SourceFile.of(tmp_path / "sim.zarr")
    chunk = next(p for p in (tmp_path / "sim.zarr" / "rho" / "c").rglob("*") if p.is_file())
    os.utime(chunk, ns=(before.mtime_ns + 10**9,) * 2)
    assert before != SourceFile.of(tmp_path / "sim.zarr")


def test_several_files_and_a_parameter_for_all(tmp_path: Path, rng: np.random.Generator):
    for name in ("b10", "b9"):
        simulation(rng)[["rho"]].isel(run=0, drop=True).to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    options = {**OPTIONS, "variables": {"density": "rho"}, "parameter": [0, 1, 2]}
    found = list_sequences(entry("xarray", options=options), tmp_path)
    assert [(s.field, s.name) for s in found] == [("density", "b9"), ("density", "b10")]
    np.testing.assert_array_equal(found[0].read()[1], [0, 0.5, 1])


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({}, "no variable has the dims frame, y, x"),
        ({**OPTIONS, "variables": ["rh"]}, "no variable 'rh'; found .*rho"),
        ({**OPTIONS, "variables": ["unrelated"]}, "variable 'unrelated' has dims"),
        ({**OPTIONS, "dims": {"sequenze": "run"}}, r"dims.sequenze: unknown key.*'sequence'"),
    ],
)
def test_a_mapping_that_does_not_fit_stops_the_listing(
    tmp_path: Path, rng: np.random.Generator, options: dict[str, Any], pattern: str
):
    simulation(rng).to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    with pytest.raises(CatalogError, match=f"(?s)dataset D.*{pattern}"):
        list_sequences(entry("xarray", options=options), tmp_path)


def test_a_file_that_cannot_be_opened_is_one_broken_sequence(tmp_path: Path, rng: np.random.Generator):
    for name in ("a", "b", "c"):
        simulation(rng).to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    content = (tmp_path / "b.nc").read_bytes()
    (tmp_path / "b.nc").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.nc").unlink()
    (tmp_path / "c.nc").symlink_to(tmp_path / "nowhere.nc")
    xr.Dataset({"grid": ("x", [1.0])}).to_netcdf(tmp_path / "grid.nc", engine="h5netcdf")
    found = list_sequences(entry("xarray", options=OPTIONS), tmp_path)
    names = ["a/r1", "a/r2", "b", "c", "grid"]
    assert [(s.field, s.name) for s in found] == [*(("rho", n) for n in names), ("u", "a/r1"), ("u", "a/r2")]
    found[0].read()
    for sequence, reason in zip(
        found[2:5], ("truncated", "No such file", "no variable has the dims"), strict=True
    ):
        with pytest.raises(ReaderError, match=rf"/{sequence.name}\.nc: sequence {sequence.name}: .*{reason}"):
            pickle.loads(pickle.dumps(sequence)).read()
    # In a field that the catalog leaves out, the broken file would go unseen.
    chosen = list_sequences(entry("xarray", options=OPTIONS, fields={"v": {"source": "u"}}), tmp_path)
    assert [(s.field, s.name) for s in chosen] == [("v", n) for n in names]


def test_files_of_which_none_can_be_opened_stop_the_listing(tmp_path: Path):
    for name in ("a.nc", "b.nc"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(CatalogError, match=rf"dataset D.*{tmp_path}/a\.nc: cannot be opened: ValueError"):
        list_sequences(entry("xarray"), tmp_path)


def test_times_of_any_calendar_are_the_numbers_that_are_stored(tmp_path: Path, rng: np.random.Generator):
    data = xr.Dataset(
        {"rho": (("time", "y", "x"), rng.random((3, 4, 5)))},
        coords={
            "time": ("time", [29.0, 59.0, 149.0], {"units": "days since 2000-02-01", "calendar": "360_day"}),
            "start": ((), 1.0, {"units": "fortnights since never"}),
        },
    )
    data.to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    options = {"dims": {"frame": "time"}, "parameter": "time"}
    frames, parameter = read_one(tmp_path, "xarray", options=options)
    np.testing.assert_array_equal(frames, data.rho.values[..., None])
    np.testing.assert_allclose(parameter, [0, 0.25, 1], rtol=1e-15)


def test_masked_values_are_filled_or_named(tmp_path: Path):
    packed = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    attributes = {"_FillValue": np.int16(13), "scale_factor": np.float32(0.5)}
    data = xr.Dataset({"rho": (("frame", "y", "x"), packed, attributes)}, {"parameter": ("frame", [1, 2])})
    data.to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    with pytest.raises(ReaderError, match=r"sim: rho: 1 of 24 .* _FillValue = 13 \(frame 1\).*options\.fill"):
        read_one(tmp_path, "xarray")
    frames, _ = read_one(tmp_path, "xarray", options={"fill": -1})
    np.testing.assert_array_equal(frames[..., 0], np.where(packed == 13, -1, packed * 0.5))
    assert frames.dtype == np.float32
    with pytest.raises(CatalogError, match=r"options of reader 'xarray': fill"):
        read_one(tmp_path, "xarray", options={"fill": float("nan")})


# -- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["lsim", "stack", "xarray"])
def test_unknown_options_are_errors(tmp_path: Path, reader: str):
    with pytest.raises(CatalogError, match=r"dataset D, options of reader '\w+': feild: unknown key"):
        list_sequences(entry(reader, options={"feild": "rgb"}), tmp_path)


def test_an_unknown_reader_suggests_one():
    with pytest.raises(CatalogError, match=r"no reader 'lsmi'; did you mean 'lsim'\?"):
        find_reader("lsmi")


def test_no_sequences_is_an_error_not_an_empty_set(tmp_path: Path):
    with pytest.raises(CatalogError, match="found no sequences"):
        list_sequences(entry("lsim"), tmp_path)
    save_frames(tmp_path / "s", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(CatalogError, match=r"no sequences whose name holds one of plume1\."):
        list_sequences(entry("lsim", filter=["plume1."]), tmp_path)


def test_fields_that_are_not_there_are_errors(tmp_path: Path):
    save_frames(tmp_path / "p.density", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(CatalogError, match="no field 'pressure'; found density"):
        list_sequences(entry("lsim", fields=["density", "pressure"]), tmp_path)


def test_of_a_name_that_stands_twice_in_a_field_none_is_read(tmp_path: Path, rng: np.random.Generator):
    frames, parameter = rng.random((3, 4, 5)), np.array([1.0, 3.0, 5.0])
    for name in ("run", "other"):
        np.savez(tmp_path / f"{name}.npz", frames=frames, parameter=parameter)
    np.save(tmp_path / "run.npy", frames)
    found = list_sequences(entry("stack", missing="keep"), tmp_path)
    assert [(s.name, s.missing) for s in found] == [("other", "keep"), ("run", "keep")]
    np.testing.assert_array_equal(found[0].read()[0], frames[..., None])
    with pytest.raises(ReaderError) as fault:
        pickle.loads(pickle.dumps(found[1])).read()
    assert str(fault.value).startswith(f"{tmp_path}/run.npy: sequence run: 2 sequences of one name: ")
    assert "run.npy, run.npz. None is read" in str(fault.value)
    # In fields of channels, too; and the reason stays within bounds.
    for ending in ("Npy", "nPy", "npY", "NPy"):
        np.save(tmp_path / "run.npy", frames)
        (tmp_path / "run.npy").rename(tmp_path / f"run.{ending}")
    found = list_sequences(entry("stack", fields={"u": {"channel": 0}, "v": {"channel": 0}}), tmp_path)
    assert [(s.field, s.name) for s in found] == [(f, n) for f in "uv" for n in ("other", "run")]
    with pytest.raises(ReaderError, match=r"5 sequences of one name: run\.NPy, .* and 1 more"):
        found[3].read()


def test_labels_that_stand_twice_in_one_file_are_quarantined_alone(tmp_path: Path, rng: np.random.Generator):
    data = simulation(rng)[["rho", "nu"]]
    data = xr.concat([data, data.isel(run=[0])], "run")
    data.to_netcdf(tmp_path / "sim.nc", engine="h5netcdf")
    found = list_sequences(entry("xarray", options=OPTIONS), tmp_path)
    assert [s.name for s in found] == ["r1", "r2"]
    with pytest.raises(ReaderError, match=r"2 sequences of one name: sim\.nc \(2 times\)"):
        found[0].read()
    assert found[1].read()[0].shape == (3, 4, 5, 1)


def test_names_that_differ_in_case_alone_are_errors(tmp_path: Path):
    assert field_in_name("plume2.Density", "x") == "density"
    assert field_in_name("run1.Enstrophy", "x") == "enstrophy"
    for name in ("plume1.density", "shape1"):
        save_frames(tmp_path / name, np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(CatalogError, match="fields 'Density' and 'density' differ only in case"):
        list_sequences(entry("lsim", options={"field": "Density"}), tmp_path)
    document = {"name": "c", "datasets": [entry("lsim"), entry("lsim").model_copy(update={"name": "d"})]}
    with pytest.raises(ValueError, match="datasets 'D' and 'd' differ only in case"):
        Catalog.model_validate(document)


def test_channels_become_fields(tmp_path: Path, rng: np.random.Generator):
    frames = rng.random((2, 4, 4, 2))
    np.savez(tmp_path / "run.npz", frames=frames, parameter=[0, 1])
    fields = {"vx": {"channel": 0}, "both": {"channel": [1, 0]}, "bad": {"channel": 5}}
    found = {s.field: s for s in list_sequences(entry("stack", fields=fields), tmp_path)}
    np.testing.assert_array_equal(found["vx"].read()[0], frames[..., :1])
    np.testing.assert_array_equal(found["both"].read()[0], frames[..., ::-1])
    with pytest.raises(ReaderError, match="no channel 5"):
        found["bad"].read()


def test_a_reader_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        READERS, "ones", lambda entry, folder: [Ones(name=n, field="f", files=()) for n in "ba"]
    )
    assert [s.name for s in list_sequences(entry("ones"), tmp_path)] == ["a", "b"]
    assert [s.name for s in list_sequences(entry("ones", filter=["b"]), tmp_path)] == ["b"]


class Ones(LazySequence):
    def read(self) -> tuple[np.ndarray, np.ndarray]:
        return np.ones((2, 4, 4, 1)), np.array([0.0, 1.0])


def test_natural_order():
    names = ["p10.b", "p2.b", "p2.a", "p", "q1", "p02.a"]
    assert sorted(names, key=natural_key) == ["p", "p02.a", "p2.a", "p2.b", "p10.b", "q1"]


def test_parameters_are_scaled_to_their_range():
    np.testing.assert_array_equal(scale_parameter(np.array([5, 6, 9]), "s"), [0, 0.25, 1])
    with pytest.raises(ReaderError, match="sequence s: parameter of shape"):
        scale_parameter(np.array([1.0]), "s")
