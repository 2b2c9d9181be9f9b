"""Conversion: what is stored, what is quarantined, what is decoded again, and what a crash leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from pipeline.convert import ConversionError, ConversionReport, convert
from pipeline.sources.catalog import Catalog, CatalogError, open_catalog
from pipeline.sources.readers import READERS, LazySequence, lsim
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import content_hash
from pipeline.workers.cluster import Cluster

SHAPE = (6, 8, 3)
FRAMES = 3
SEQUENCE_BYTES = FRAMES * int(np.prod(SHAPE))


# -- an archive of real files, and a reader that counts what it decodes --------------------------------------


@dataclass(frozen=True, kw_only=True)
class CountedSequence(LazySequence):
    """Another sequence; each decoding leaves a line in a file, whichever process does it."""

    source: LazySequence
    log: str
    seconds: float

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.seconds)
        with open(self.log, "a") as log:
            log.write(f"{self.name}\n")
        return self.source.read()


def counted(entry: Any, folder: Path) -> list[LazySequence]:
    plain = entry.model_copy(update={"options": {}})
    return [
        CountedSequence(
            name=s.name, field=s.field, files=s.files, settings=s.settings, source=s, **entry.options
        )
        for s in lsim.read(plain, folder)
    ]


READERS["counted"] = counted


class Archive:
    """A folder of sequences in the published layout, its catalog, and its store."""

    def __init__(self, folder: Path, seconds: float = 0) -> None:
        self.folder = folder
        self.log = folder / "decoded.txt"
        self.out = folder / "frames.zarr"
        self.data.mkdir(parents=True, exist_ok=True)
        (folder / "catalog.yaml").write_text(
            "name: mine\ntitle: Mine\nlicence: MIT\ndatasets:\n"
            "- name: A\n  title: First\n  role: validation\n  source: {path: data}\n  reader: counted\n"
            f"  options: {{log: '{self.log}', seconds: {seconds}}}\npools: {{All: [A]}}\n"
        )

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def catalog(self) -> Catalog:
        return open_catalog(self.folder / "catalog.yaml")

    def add(self, *names: str, seed: int = 0, shape: tuple[int, ...] = SHAPE, frames: int = FRAMES) -> None:
        for name in names:
            rng = np.random.default_rng([seed, *name.encode()])
            (self.data / name).mkdir(exist_ok=True)
            for number in range(frames):
                image = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
                image.save(self.data / name / f"f{number:02d}.png")

    def convert(self, out: Path | None = None, **more: Any) -> ConversionReport:
        return convert(self.catalog, out or self.out, **more)

    def decoded(self) -> list[str]:
        """Names decoded since the last call, sorted."""
        names = sorted(self.log.read_text().split()) if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return names

    def expected(self, *, without: str = "") -> dict[str, bytes]:
        """The pixels of every sequence, read without the project's readers."""
        return {
            folder.name: b"".join(np.asarray(Image.open(p)).tobytes() for p in sorted(folder.glob("*.png")))
            for folder in self.data.iterdir()
            if folder.name != without
        }


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """Seven sequences, two a shard."""
    monkeypatch.setattr(store, "SHARD_BYTES", 2 * SEQUENCE_BYTES)
    made = Archive(tmp_path)
    made.add(*(f"p{n}" for n in range(1, 8)))
    return made


def open_tree(path: Path) -> xr.DataTree:
    """As a user opens it: plainly, and with no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return xr.open_datatree(path, engine="zarr")


def check(path: Path) -> dict[str, bytes]:
    """Hold every field against the schema and every row against its record; the pixels by sequence."""
    pixels = {}
    with open_tree(path) as tree:
        for leaf in tree.leaves:
            if "frames" not in leaf.variables:
                continue
            group = leaf.to_dataset().load()
            schema.validate_frames(group, leaf.path)
            for row, name in enumerate(group["sequence"].values):
                frames = group["frames"].values[row]
                assert group["content"].values[row] == content_hash(frames, group["parameter"].values[row])
                pixels[str(name)] = frames.tobytes()
    return pixels


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store that holds values, by its place, and metadata without timings and times."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_dir() or file.suffix == ".partial":
            continue
        data = file.read_bytes()
        if file.name == "zarr.json":
            document = json.loads(data)
            document["attributes"].pop("convert_seconds", None)
            document["attributes"].pop("digest", None)  # of timings, too
            document.pop("consolidated_metadata", None)
            data = json.dumps(document, sort_keys=True).encode()
        found[str(file.relative_to(path))] = data
    return found


def quarantined(report: ConversionReport) -> dict[str, str]:
    return {q.sequence: q.reason for q in report.quarantined}


# -- what is stored ------------------------------------------------------------------------------------------


def test_round_trip(archive: Archive):
    calls: list[tuple[int, int]] = []
    report = archive.convert(progress=lambda done, total: calls.append((done, total)))
    assert check(archive.out) == archive.expected()
    assert report.converted == [f"A/frames/p{n}" for n in range(1, 8)]
    assert report.bytes == 7 * SEQUENCE_BYTES
    assert not report.quarantined
    assert calls[0] == (0, 7)
    assert calls[-1] == (7, 7)
    tree = open_tree(archive.out)
    assert list(tree["A/frames"]["sequence"].values) == [f"p{n}" for n in range(1, 8)]
    np.testing.assert_array_equal(tree["A/frames"]["parameter"].values[0], [0, 0.5, 1])
    assert tree.attrs["schema_version"] == schema.SCHEMA_VERSION
    assert tree.attrs["pools"] == {"All": ["A"]}
    assert tree.attrs["convert_seconds"] > 0
    assert tree.attrs["versions"]["zarr"]
    about = tree["A"].attrs
    assert (about["title"], about["role"], about["licence"], about["pools"]) == (
        "First",
        "validation",
        "MIT",
        ["All"],
    )
    assert about["quarantined"] == []


def test_one_chunk_a_frame_and_whole_sequences_a_shard(archive: Archive):
    archive.convert()
    group = store.get_group(store.open_store(archive.out), "A/frames")
    frames = store.get_array(group, "frames")
    assert frames.chunks == (1, 1, *SHAPE)
    assert frames.shards == (2, FRAMES, *SHAPE)
    assert len(list((archive.out / "A" / "frames" / "frames" / "c").iterdir())) == 4
    for name in ("parameter", "sequence", "content", "source"):
        assert store.get_array(group, name).chunks[0] == 2


def test_fields_and_dtypes_are_groups_of_their_own(tmp_path: Path, rng: np.random.Generator):
    arrays = {"rho": rng.random((3, 4, 5), dtype=np.float32), "u": rng.random((3, 4, 5, 2)).astype(">f8")}
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        np.savez(tmp_path / "data" / f"{name}.npz", **arrays, parameter=[1, 2, 4])
    (tmp_path / "catalog.yaml").write_text(
        "name: mine\ndatasets:\n- name: D\n  source: {path: data}\n  reader: stack\n"
        "  options: {arrays: {density: rho, velocity: u}}\n"
        "  fields: {density: {}, velocity-x: {source: velocity, channel: 0}}\n"
    )
    convert(open_catalog(tmp_path / "catalog.yaml"), tmp_path / "frames.zarr")
    check(tmp_path / "frames.zarr")
    tree = open_tree(tmp_path / "frames.zarr")
    assert set(tree["D"].children) == {"density", "velocity-x"}
    np.testing.assert_array_equal(tree["D/density"]["frames"].values[1, ..., 0], arrays["rho"])
    stored = tree["D/velocity-x"]["frames"]
    assert stored.dtype == np.float64
    np.testing.assert_array_equal(stored.values[0], arrays["u"][..., :1])


def test_units_that_changed_beside_the_same_values_are_updated(tmp_path: Path, rng: np.random.Generator):
    values, out = rng.random((2, 3, 4, 5)), tmp_path / "frames.zarr"
    (tmp_path / "data").mkdir()
    (tmp_path / "c.yaml").write_text(
        "name: c\ndatasets:\n- {name: D, source: {path: data}, reader: xarray}\n"
    )
    units = {}
    for attributes in ({}, {"units": "K"}, {"units": "mK"}, {}):
        rho = (("sequence", "frame", "y", "x"), values, attributes)
        data = xr.Dataset({"rho": rho, "parameter": ("frame", [0.0, 1.0, 2.0])})
        data.to_netcdf(tmp_path / "data" / "sim.nc", engine="h5netcdf")
        report = convert(open_catalog(tmp_path / "c.yaml"), out)
        units[len(units)] = open_tree(out)["D/rho"]["frames"].attrs.get("units")
        assert len(report.converted) == (2 if len(units) == 1 else 0)
        before = contents(out)
        assert not convert(open_catalog(tmp_path / "c.yaml"), out).changed
        assert contents(out) == before
    # A source that says nothing takes nothing away: somebody may have said it in the store.
    assert list(units.values()) == [None, "K", "mK", "mK"]


def test_units_and_a_store_that_is_read_again(tmp_path: Path, rng: np.random.Generator):
    """The project's own store is a source like any other, and NetCDF keeps its units."""
    data = xr.Dataset(
        {
            "rho": (("sequence", "frame", "y", "x"), rng.random((2, 3, 4, 5)), {"units": "kg m-3"}),
            "parameter": ("frame", [0.0, 1.0, 2.0]),
        }
    )
    (tmp_path / "data").mkdir()
    data.to_netcdf(tmp_path / "data" / "sim.nc", engine="h5netcdf")
    (tmp_path / "first.yaml").write_text(
        "name: first\ndatasets:\n- {name: D, source: {path: data}, reader: xarray}\n"
    )
    (tmp_path / "second.yaml").write_text(
        "name: second\ndatasets:\n- name: E\n  source: {path: first.zarr}\n  reader: xarray\n"
        "  options: {group: D/rho, variables: {density: frames}}\n"
    )
    first, second = tmp_path / "first.zarr", tmp_path / "second.zarr"
    assert len(convert(open_catalog(tmp_path / "first.yaml"), first).converted) == 2
    assert len(convert(open_catalog(tmp_path / "second.yaml"), second).converted) == 2
    assert open_tree(first)["D/rho"]["frames"].attrs["units"] == "kg m-3"
    assert check(first) == check(second)
    # A file of several sequences that was only touched: decoded to compare, not written.
    before = contents(first)
    os.utime(tmp_path / "data" / "sim.nc", ns=(1, 1))
    again = convert(open_catalog(tmp_path / "first.yaml"), first)
    assert (len(again.converted), len(again.unchanged)) == (0, 2)
    changed = [name for name, data in contents(first).items() if before[name] != data]
    assert changed == ["D/rho/source/c/0"]


# -- what is broken ------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "f01.png"
    file.write_bytes(file.read_bytes()[:70])


def other_frame_shape(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "f01.png")


def other_shape(folder: Path) -> None:
    for number in range(FRAMES):
        Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(folder / f"f{number:02d}.png")


def other_dtype(folder: Path) -> None:
    for number in range(FRAMES):
        (folder / f"f{number:02d}.png").unlink()
        np.savez(folder / f"f{number:02d}.npz", np.zeros(SHAPE, np.float32))


def missing_frame(folder: Path) -> None:
    (folder / "f01.png").unlink()


def not_rising(folder: Path) -> None:
    (folder / "f01.png").rename(folder / "g02.png")


def not_a_number(folder: Path) -> None:
    for number in range(FRAMES):
        (folder / f"f{number:02d}.png").unlink()
        frame = np.zeros(SHAPE, np.float32)
        frame[2, 2] = np.nan if number == 1 else 0
        np.savez(folder / f"f{number:02d}.npz", frame)


def unknown_dtype(folder: Path) -> None:
    for number in range(FRAMES):
        (folder / f"f{number:02d}.png").unlink()
        np.savez(folder / f"f{number:02d}.npz", np.zeros(SHAPE, np.complex64))


def no_frames(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


DAMAGES = [
    (truncate, "f01.png", "cannot be decoded"),
    (other_frame_shape, "f01.png", "shape (5, 5, 3)"),
    (other_shape, "f00.png", "(3, 4, 8, 3) uint8; the field has (3, 6, 8, 3) uint8"),
    (other_dtype, "f00.npz", "float32; the field has (3, 6, 8, 3) uint8"),
    (missing_frame, "", "2 frames (0, 2); expected 3"),
    (not_rising, "", "f02.png and g02.png both stand at 2"),
    (unknown_dtype, "f00.npz", "complex64; expected one of uint8"),
    (no_frames, "", "no frame"),
]


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_a_broken_sequence_is_quarantined_and_picked_up_once_repaired(
    archive: Archive, damage: Callable[[Path], None], file: str, reason: str
):
    damage(archive.data / "p3")
    report = archive.convert()
    (found,) = report.quarantined
    assert (found.dataset, found.field, found.sequence) == ("A", "frames", "p3")
    assert reason in found.reason
    assert str(archive.data / "p3" / file) in found.file
    assert check(archive.out) == archive.expected(without="p3")
    (noted,) = open_tree(archive.out)["A"].attrs["quarantined"]
    assert (noted["sequence"], noted["field"], noted["file"]) == ("p3", "frames", found.file)
    assert noted["reason"] == found.reason

    archive.decoded()
    before = contents(archive.out)
    again = archive.convert()
    assert again.quarantined == report.quarantined
    assert archive.decoded() == []
    assert contents(archive.out) == before

    no_frames(archive.data / "p3")
    archive.add("p3")
    assert archive.convert().converted == ["A/frames/p3"]
    assert archive.decoded() == ["p3"]
    assert check(archive.out) == archive.expected()
    assert open_tree(archive.out)["A"].attrs["quarantined"] == []


def test_nan_is_quarantined_with_its_frame(tmp_path: Path, rng: np.random.Generator):
    archive = Archive(tmp_path)
    for name in ("a", "b", "c"):
        archive.add(name)
        not_a_number(archive.data / name)
        if name != "b":
            np.savez(archive.data / name / "f01.npz", rng.random(SHAPE, dtype=np.float32))
    report = archive.convert()
    (found,) = report.quarantined
    assert (found.sequence, found.file) == ("b", str(archive.data / "b" / "f01.npz"))
    assert "frame 1 holds NaN" in found.reason
    assert set(check(archive.out)) == {"a", "c"}


def test_a_sequence_that_breaks_later_leaves_the_store(archive: Archive):
    archive.convert()
    truncate(archive.data / "p2")
    truncate(archive.data / "p7")
    report = archive.convert()
    assert set(quarantined(report)) == {"p2", "p7"}
    assert set(check(archive.out)) == {"p1", "p3", "p4", "p5", "p6"}


def test_all_broken_leaves_no_field_but_all_reasons(archive: Archive):
    for folder in archive.data.iterdir():
        truncate(folder)
    assert len(archive.convert().quarantined) == 7
    assert check(archive.out) == {}
    assert len(open_tree(archive.out)["A"].attrs["quarantined"]) == 7
    archive.decoded()
    assert len(archive.convert().quarantined) == 7
    assert archive.decoded() == []
    archive.add("p5")
    assert archive.convert().converted == ["A/frames/p5"]
    assert set(check(archive.out)) == {"p5"}


def test_the_first_good_sequence_gives_the_shape_wherever_it_is(archive: Archive):
    for n in range(1, 6):
        truncate(archive.data / f"p{n}")
    archive.convert()
    assert set(check(archive.out)) == {"p6", "p7"}


def test_a_field_made_with_another_resolution_is_made_anew(archive: Archive):
    archive.convert()
    names = [f"p{n}" for n in range(1, 8)]
    archive.add(*names[:-1], shape=(12, 16, 3))
    report = archive.convert()  # p7 alone keeps the old shape, and keeps the field
    assert len(report.quarantined) == 6
    assert set(check(archive.out)) == {"p7"}
    archive.add("p7", shape=(12, 16, 3))
    assert len(archive.convert().converted) == 7
    assert check(archive.out) == archive.expected()
    assert open_tree(archive.out)["A/frames"]["frames"].shape == (7, FRAMES, 12, 16, 3)


def test_files_of_one_name_are_quarantined_together_until_one_is_left(
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """`lsim convert` goes on with all else, of this data set and others, and ends with 3."""
    from pipeline.cli import main

    def run(out: Path) -> tuple[int, list[dict[str, Any]], str]:
        arguments = [
            "lsim",
            "convert",
            str(tmp_path / "catalog.yaml"),
            "--out",
            str(out),
            "--cluster",
            "none",
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = "".join(capfd.readouterr())
        return int(ended.value.code or 0), open_tree(out)["D"].attrs["quarantined"], printed

    for folder in ("data", "more"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            stack = {"frames": rng.random((3, 4, 5)), "parameter": [1, 2, 4]}
            np.savez(tmp_path / folder / f"{name}.npz", **stack)
    entries = [
        f"- {{name: {name}, source: {{path: {path}}}, reader: stack}}\n" for name, path in PLACES.items()
    ]
    (tmp_path / "catalog.yaml").write_text(f"name: mine\ndatasets:\n{''.join(entries)}")
    out = tmp_path / "frames.zarr"
    code, noted, _ = run(out)
    assert (code, noted) == (0, [])
    good = check(out)

    # The second file comes to one that is in the store: neither is read any more.
    np.save(tmp_path / "data" / "b.npy", rng.random((3, 4, 5)))
    code, (noted,), printed = run(out)
    assert code == 3
    assert (noted["sequence"], noted["field"]) == ("b", "frames")
    assert noted["file"] == str(tmp_path / "data" / "b.npy")
    assert "2 sequences of one name: b.npy, b.npz" in noted["reason"]
    assert "b.npy, b.npz" in " ".join(printed.split())
    tree = open_tree(out)
    assert sorted(tree["D/frames"]["sequence"].values) == ["a", "c"]
    assert sorted(tree["E/frames"]["sequence"].values) == ["a", "b", "c"]
    fresh = tmp_path / "fresh.zarr"
    assert run(fresh)[0] == 3
    assert check(fresh) == check(out)

    # It stays so without a word being written, wherever the archive is moved to.
    before = contents(out)
    assert run(out)[:2] == (3, [noted])
    assert contents(out) == before

    (tmp_path / "data" / "b.npy").unlink()
    assert run(out)[:2] == (0, [])
    assert check(out) == good
    assert sorted(open_tree(out)["D/frames"]["sequence"].values) == ["a", "b", "c"]


PLACES = {"D": "data", "E": "more"}


class FailingSequence(LazySequence):
    """A sequence behind a disk that fails until the file ``repaired`` is there."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        if not (Path(self.files[0].path).parent / "repaired").exists():
            raise OSError(5, "Input/output error", self.files[0].path)
        return np.ones((2, 4, 4, 1)), np.array([0.0, 1.0])


def test_a_failing_disk_is_tried_again_at_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.sources.readers import SourceFile

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").touch()
    monkeypatch.setitem(
        READERS,
        "failing",
        lambda entry, folder: [FailingSequence(name="s", field="f", files=(SourceFile.of(folder / "file"),))],
    )
    (tmp_path / "c.yaml").write_text(
        "name: c\ndatasets:\n- {name: A, source: {path: data}, reader: failing}\n"
    )
    report = convert(open_catalog(tmp_path / "c.yaml"), tmp_path / "frames.zarr")
    assert "Input/output error" in quarantined(report)["s"]
    (tmp_path / "data" / "repaired").touch()
    assert convert(open_catalog(tmp_path / "c.yaml"), tmp_path / "frames.zarr").converted == ["A/f/s"]


# -- what is decoded again -----------------------------------------------------------------------------------


class _Unneeded:
    """A cluster that nobody may start."""

    @property
    def client(self) -> None:
        pytest.fail("no workers are needed")


def test_nothing_to_do_reads_no_sequence_and_writes_nothing(archive: Archive):
    archive.convert()
    archive.decoded()
    before = {p: p.stat().st_mtime_ns for p in archive.out.rglob("*")}
    report = archive.convert(cluster=_Unneeded())
    assert len(report.unchanged) == 7
    assert not report.changed
    assert archive.decoded() == []
    assert {p: p.stat().st_mtime_ns for p in archive.out.rglob("*")} == before


def test_only_changed_sequences_are_decoded(archive: Archive):
    archive.convert()
    archive.decoded()
    archive.add("p2", "p6", seed=1)
    left_over = archive.out / "A" / "frames" / "frames" / "c" / "0" / f"0.{'a' * 32}.partial"
    left_over.parent.mkdir(exist_ok=True)
    left_over.touch()
    report = archive.convert()
    assert not left_over.exists()
    assert sorted(report.converted) == ["A/frames/p2", "A/frames/p6"]
    assert len(report.unchanged) == 5
    assert archive.decoded() == ["p2", "p6"]
    assert check(archive.out) == archive.expected()
    rows = list(open_tree(archive.out)["A/frames"]["sequence"].values)
    assert rows == [f"p{n}" for n in range(1, 8)]


def test_touched_but_equal_files_are_not_decoded(archive: Archive):
    archive.convert()
    archive.decoded()
    before = contents(archive.out)
    os.utime(archive.data / "p4" / "f01.png", ns=(1, 1))
    report = archive.convert()
    assert archive.decoded() == []
    assert not report.converted
    assert len(report.unchanged) == 7
    changed = {name for name, data in contents(archive.out).items() if before[name] != data}
    assert changed == {"A/frames/source/c/1"}
    # The record was refreshed: now a look at size and time is enough.
    before_times = {p: p.stat().st_mtime_ns for p in archive.out.rglob("*")}
    archive.convert()
    assert {p: p.stat().st_mtime_ns for p in archive.out.rglob("*")} == before_times


def test_sequences_come_and_go(archive: Archive):
    archive.convert()
    archive.decoded()
    for name in ("p1", "p5"):
        shutil.rmtree(archive.data / name)
    archive.add("p8")
    report = archive.convert()
    assert sorted(report.removed) == ["A/frames/p1", "A/frames/p5"]
    assert report.converted == ["A/frames/p8"]
    assert archive.decoded() == ["p8"]
    assert check(archive.out) == archive.expected()
    archive.add("p1", "p5", "p9", "p10")
    assert len(archive.convert().converted) == 4
    assert check(archive.out) == archive.expected()


def test_an_archive_may_be_moved_as_a_whole(archive: Archive):
    archive.convert()
    archive.decoded()
    (archive.folder / "elsewhere").mkdir()
    archive.data.rename(archive.folder / "elsewhere" / "data")
    catalog = archive.folder / "catalog.yaml"
    catalog.write_text(catalog.read_text().replace("path: data", "path: elsewhere/data"))
    assert len(archive.convert().unchanged) == 7
    assert archive.decoded() == []


def test_other_options_are_decoded_again(archive: Archive):
    archive.convert()
    archive.decoded()
    for folder in archive.data.iterdir():
        (folder / "f02.png").unlink()
    assert len(archive.convert().converted) == 7
    assert archive.decoded()
    assert check(archive.out) == archive.expected()


def test_an_empty_folder_does_not_empty_the_store(archive: Archive):
    archive.convert()
    before = contents(archive.out)
    archive.data.rename(archive.folder / "unmounted")
    archive.data.mkdir()
    with pytest.raises(CatalogError, match="no sequences"):
        archive.convert()
    assert contents(archive.out) == before


def test_other_stores_are_left_alone(archive: Archive, tmp_path: Path):
    xr.Dataset({"a": ("x", [1, 2])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    before = contents(tmp_path / "other.zarr")
    with pytest.raises(ConversionError, match="found kind None"):
        archive.convert(tmp_path / "other.zarr")
    assert contents(tmp_path / "other.zarr") == before
    archive.convert()
    store.set_attributes(store.open_store(archive.out, "r+"), {"schema_version": 99})
    with pytest.raises(ConversionError, match="schema_version 99"):
        archive.convert()


# -- crashes -------------------------------------------------------------------------------------------------


class Crash(KeyboardInterrupt):
    """The process ends here, as far as the store can tell."""


@pytest.fixture
def before_each_change(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Have a function called before each change of a store, with the number of changes before it."""
    names = (
        "write_rows",
        "resize_rows",
        "set_attributes",
        "delete",
        "create_group",
        "create_array",
        "consolidate",
        "drop_consolidated",
    )
    originals = {name: getattr(store, name) for name in names}

    def arm(call: Callable[[int], None]) -> None:
        count = itertools.count()

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def changed(*args: Any, **kwargs: Any) -> Any:
                call(next(count))
                return function(*args, **kwargs)

            return changed

        for name, function in originals.items():
            monkeypatch.setattr(store, name, wrap(function))

    return arm


def committed(path: Path) -> dict[str, str]:
    """Committed rows by name, each held against its frames; of a store that may be in mid-run."""
    try:
        group = store.get_group(store.open_store(path), "A/frames")
        arrays = {n: store.get_array(group, n) for n in ("sequence", "content", "frames", "parameter")}
    except store.StoreError:
        return {}
    rows = {}
    names, content = store.read(arrays["sequence"]), store.read(arrays["content"])
    for row in np.flatnonzero(content != ""):
        # Index and chunks of a shard are two reads: one that is replaced between them shows neither state.
        hashes = (
            content_hash(store.read(arrays["frames"], row), store.read(arrays["parameter"], row))
            for _ in range(3)
        )
        assert content[row] in hashes, f"row {row} ({names[row]})"
        rows[str(names[row])] = str(content[row])
    return rows


def test_killed_at_any_change_the_next_run_ends_as_if_undisturbed(
    archive: Archive, before_each_change, tmp_path: Path
):
    """A first conversion with a broken sequence, then one with every kind of change; killed everywhere.

    What a kill leaves is what is on the disk: each change of one run is preceded by a copy of that.
    """
    shutil.rmtree(archive.data / "p7")
    truncate(archive.data / "p3")
    undisturbed, out = tmp_path / "undisturbed.zarr", tmp_path / "crashed.zarr"
    for stage in ("first", "second"):
        if stage == "second":
            archive.add("p2", seed=1)  # changed
            archive.add("p3", "p8")  # repaired, new
            truncate(archive.data / "p6")  # broken
            shutil.rmtree(archive.data / "p1")  # removed
            shutil.rmtree(archive.data / "p4")
        left: list[Path] = []

        def copy(_: int, stage: str = stage, left: list[Path] = left) -> None:
            left.append(tmp_path / f"{stage}-{len(left)}.zarr")
            if undisturbed.exists():
                shutil.copytree(undisturbed, left[-1])

        before_each_change(copy)
        archive.convert(undisturbed)
        before_each_change(lambda _: None)
        assert len(left) > 30
        expected, held, current = check(undisturbed), contents(undisturbed), committed(undisturbed)
        for last, state in enumerate(left):
            shutil.rmtree(out, ignore_errors=True)
            if state.exists():
                state.rename(out)
            done = committed(out)
            archive.decoded()
            report = archive.convert(out)
            again = archive.decoded()
            assert check(out) == expected, f"{stage}, killed at change {last}"
            assert contents(out) == held, f"{stage}, killed at change {last}"
            assert set(quarantined(report)) == ({"p3"} if stage == "first" else {"p6"})
            assert not [n for n in again if n in done and done[n] == current.get(n)], "decoded twice"


def test_a_run_that_is_interrupted_leaves_what_one_that_is_killed_does(
    archive: Archive, before_each_change, tmp_path: Path
):
    """It ends at once, changes nothing more, and lets the next run go on."""
    left = tmp_path / "left.zarr"

    def end(count: int) -> None:
        if count == 20:
            shutil.copytree(archive.out, left)
        if count >= 20:
            raise Crash

    before_each_change(end)
    with pytest.raises(Crash):
        archive.convert()
    before_each_change(lambda _: None)
    assert contents(archive.out) == contents(left)
    assert archive.convert().converted
    assert check(archive.out) == archive.expected()


SLOW_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_convert
from pipeline.storage import store
store.SHARD_BYTES = 2 * test_convert.SEQUENCE_BYTES
test_convert.Archive(Path({folder!r}), seconds=0.1).convert()
"""


def test_kill_9_and_again(archive: Archive):
    undisturbed = archive.folder / "undisturbed.zarr"
    archive.convert(undisturbed)
    archive.decoded()
    Archive(archive.folder, seconds=0.1)
    script = SLOW_RUN.format(tests=str(Path(__file__).parent), folder=str(archive.folder))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(committed(archive.out)) < 4:
        assert process.poll() is None, "the conversion ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = committed(archive.out)
    assert 4 <= len(done) < 7
    archive.decoded()
    Archive(archive.folder, seconds=0)
    archive.convert()
    assert sorted([*archive.decoded(), *done]) == [f"p{n}" for n in range(1, 8)]
    assert contents(archive.out) == contents(undisturbed)


# -- on a cluster --------------------------------------------------------------------------------------------


@pytest.fixture
def client(two_workers: Cluster) -> Iterator[Any]:
    """A client of workers that make shards as small as this process does."""
    before = two_workers.client.run(set_shard_bytes, store.SHARD_BYTES)
    yield two_workers.client
    two_workers.client.run(set_shard_bytes, next(iter(before.values())))


def set_shard_bytes(count: int) -> int:
    """Set the bytes of a shard; return what they were."""
    before, store.SHARD_BYTES = store.SHARD_BYTES, count
    return before


def test_workers_give_the_same_bytes_as_this_process(archive: Archive, client: Any):
    truncate(archive.data / "p3")
    local, remote = archive.folder / "local.zarr", archive.folder / "remote.zarr"
    for _ in range(2):
        archive.decoded()
        here = archive.convert(local)
        names = archive.decoded()
        there = archive.convert(remote, cluster=SimpleNamespace(client=client))
        assert archive.decoded() == names
        assert contents(local) == contents(remote)
        assert (sorted(here.converted), here.quarantined) == (sorted(there.converted), there.quarantined)
        archive.add("p3", "p8")
        archive.add("p6", seed=4)
        truncate(archive.data / "p1")


class HugeSequence(LazySequence):
    """4 MiB of frames that no scheduler should see."""

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(list(self.name.encode()))
        return rng.integers(0, 255, (4, 1024, 1024, 1), dtype=np.uint8), np.linspace(0, 1, 4)


def test_what_travels_is_small(archive: Archive):
    """Tasks and outcomes pickle to little, whatever the frames' size."""
    import pickle

    from pipeline.convert.decode import Decode
    from pipeline.convert.shards import Opening, ShardTask, convert_shard, open_field

    out = archive.folder / "huge.zarr"
    store.open_store(out, "a")
    rows = tuple(Decode(HugeSequence(name=f"h{n}", field="f", files=())) for n in range(3))
    opening = Opening(str(out), "A/f", str(archive.folder), rows)
    outcomes = open_field(pickle.loads(pickle.dumps(opening)))
    task = ShardTask(str(out), "A/f", str(archive.folder), 1, rows[1:2])
    outcomes += convert_shard(pickle.loads(pickle.dumps(task)))
    assert [o.sequence for o in outcomes] == ["h0", "h1"]
    assert all(len(pickle.dumps(item)) < 4096 for item in (opening, task, *outcomes))


MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_convert
from pipeline.storage import store
from pipeline.sources.catalog import open_catalog
from pipeline.convert import convert
from pipeline.sources.readers import READERS
store.SHARD_BYTES = 8 * 2**20
READERS["huge"] = lambda entry, folder: [
    test_convert.HugeSequence(name=f"h{{n}}", field="f", files=()) for n in range(count)
]
for count in (4, 20):
    convert(open_catalog(Path({folder!r}) / "c.yaml"), Path({folder!r}) / f"{{count}}.zarr")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_bounded_by_a_shard(tmp_path: Path):
    """Ten shards of 8 MiB take no more memory than two."""
    (tmp_path / "data").mkdir()
    (tmp_path / "c.yaml").write_text("name: c\ndatasets:\n- {name: A, source: {path: data}, reader: huge}\n")
    script = MEMORY.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    few, many = map(int, printed.split())
    assert many - few < 32 * 1024  # KiB; the frames are 80 MiB
