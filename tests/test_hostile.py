"""Archives are hostile input: each attack is made here, and refused with a reason that says what it was."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matrices import smooth_sequence, write_archive
from synthetic import make_distances, parameters, random_distances, write_field
from test_catalog import Server, write_catalog

from pipeline.cli import main
from pipeline.convert import convert
from pipeline.correlate import correlate
from pipeline.distances import Settings, compute_distances
from pipeline.report import DamagedReportError, write_report
from pipeline.sources import unpack as unpack_module
from pipeline.sources.catalog import Catalog, CatalogError, Dataset, open_catalog
from pipeline.sources.fetch import fetch
from pipeline.sources.readers import list_sequences
from pipeline.sources.readers.base import natural_key
from pipeline.sources.readers.containers import _value as value_size
from pipeline.sources.unpack import UnpackError, unpack
from pipeline.storage import limits, schema, store
from pipeline.storage.csv_tables import read_csv, write_csv
from pipeline.storage.safe_names import printable
from pipeline.workers.cluster import Cluster
from pipeline.workers.profiles import load_profile

ROOT = Path(__file__).parents[1]

# -- zip and tar archives ----------------------------------------------------------------------------------


def zip_of(path: Path, *members: tuple[str, bytes], mode: int = 0, compressed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = archive.compression
            archive.writestr(info, data)
    return path


def tar_of(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> Path:
    mode: Any = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("make", [zip_of, lambda path, member: tar_of(path.with_suffix(".tar"), member[0])])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../escaped", "outside"),
        ("a/../../escaped", "outside"),
        ("/escaped", "outside"),
        ("..\\escaped", "outside"),
        ("C:/escaped", "outside"),
        ("a\x1b[2Jb", "control characters"),
        ("a\u202eb", "control characters"),
        ("a" * 300, "255 bytes"),
        ("a/" * 100 + "b", "within one another"),
    ],
)
def test_members_that_lead_elsewhere_are_refused(tmp_path: Path, make: Any, name: str, reason: str):
    archive = make(tmp_path / "sets.zip", (name, b"x"))
    archive = archive if isinstance(archive, Path) else tmp_path / "sets.tar"
    folder = tmp_path / "out" / "deep"
    folder.mkdir(parents=True)
    with pytest.raises(UnpackError, match=reason) as caught:
        unpack(archive, folder)
    assert str(archive) in str(caught.value)
    assert printable(str(caught.value)) == str(caught.value)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.SYMTYPE, "inside"),
        (tarfile.LNKTYPE, "../../secret"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_and_devices_in_tar_archives_are_refused(tmp_path: Path, kind: bytes, link: str):
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match=r"'Data' is a link or a device"):
        unpack(tar_of(tmp_path / "sets.tar", "Data", kind, link), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_zip_archives_are_refused(tmp_path: Path, mode: int):
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match=r"'Data' is a link or a device"):
        unpack(zip_of(tmp_path / "sets.zip", ("Data", b"/etc"), mode=mode | 0o777), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("members", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_members_in_each_other_s_place_are_refused(tmp_path: Path, members: tuple[str, ...]):
    (tmp_path / "out").mkdir()
    archive = zip_of(tmp_path / "sets.zip", *((name, b"x") for name in members))
    with pytest.raises(UnpackError, match="one lies in the other"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_decompression_bombs_are_bounded_by_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
):
    monkeypatch.setattr(unpack_module, "UNPACKED_BYTES", 10**6)
    bomb, zeros = tmp_path / f"bomb.{ending}", bytes(30 * 10**6)
    if ending == "zip":
        zip_of(bomb, ("a", zeros), ("b", zeros), compressed=True)
    else:
        tar_of(bomb, "a", data=zeros)
    assert bomb.stat().st_size < 10**5
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match=r"holds more than .* MB, which may be a decompression bomb"):
        unpack(bomb, tmp_path / "out")
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) <= 2 * 10**6
    (tmp_path / "stated").mkdir()
    unpack(bomb, tmp_path / "stated", most_bytes=60 * 10**6)


def test_sizes_that_an_archive_states_of_itself_are_not_believed(tmp_path: Path):
    archive = zip_of(tmp_path / "sets.zip", ("a", bytes(10**6)), compressed=True)
    content = archive.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 10))
    archive.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "out")

    # tarfile reads a long name whole, as long as its header says.
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**33
    with gzip.open(tmp_path / "long.tar.gz", "wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UnpackError, match="a header claims 8589934592 bytes"):
        unpack(tmp_path / "long.tar.gz", tmp_path / "out")


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The most bytes that Python's objects took at once in this test."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def tar_with_headers(path: Path, *headers: tuple[bytes, dict[str, str]]) -> Path:
    """Folders, each behind an extended (x) or global (g) header of these records."""
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number, (kind, records) in enumerate(headers):
            folder = tarfile.TarInfo(f"d{number}")
            folder.type = tarfile.DIRTYPE
            extended = tarfile.TarInfo._create_pax_generic_header(records, kind, "utf-8")  # type: ignore[attr-defined]
            stream.write(extended + folder.tobuf(tarfile.USTAR_FORMAT))
        stream.write(bytes(1024))
    return path


def test_headers_of_tar_members_are_not_kept(tmp_path: Path, peak: Callable[[], int]):
    long = {"comment": "x" * 500_000}
    archive = tar_with_headers(tmp_path / "sets.tar.gz", *[(tarfile.XHDTYPE, long)] * 40)
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 40
    assert peak() < 10 * 10**6
    # Members are allowed headers when they are seen, not as many as there might be.
    (tmp_path / "again").mkdir()
    with pytest.raises(UnpackError, match="may be a decompression bomb"):
        unpack(archive, tmp_path / "again", most_bytes=10**6)


def test_headers_of_tar_members_are_bounded(tmp_path: Path, peak: Callable[[], int]):
    records = {"comment": "x" * 2 * 10**6}
    more = {"comment": "x" * 10_000}
    for name, kind, held, reason in (
        ("long", tarfile.XHDTYPE, records, r"a header claims \d+ bytes; expected 1048576 at most"),
        ("global", tarfile.XGLTYPE, more, "global headers of more than 4096 characters"),
    ):
        archive = tar_with_headers(tmp_path / f"{name}.tar.gz", (kind, held))
        with pytest.raises(UnpackError, match=reason):
            unpack(archive, tmp_path / "out")
    header = tarfile.TarInfo._create_pax_generic_header(  # type: ignore[attr-defined]
        {"comment": "x" * 500_000}, tarfile.XHDTYPE, "utf-8"
    )
    with gzip.open(tmp_path / "chain.tar.gz", "wb", compresslevel=1) as stream:
        stream.write(header * 40)
    with pytest.raises(UnpackError, match="headers of one member take more than 1048576 bytes"):
        unpack(tmp_path / "chain.tar.gz", tmp_path / "out")
    assert peak() < 30 * 10**6


def zip_of_entries(path: Path, count: int, entry: int = 46) -> Path:
    """A directory of nameless entries, each of this many bytes, and nothing else."""
    comment = bytes(entry - 46)
    one = b"PK\x01\x02" + bytes(28) + struct.pack("<H", len(comment)) + bytes(12) + comment
    size = len(one) * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0)  # it states one
    path.write_bytes(one * count + end)
    return path


def test_the_directory_of_a_zip_archive_is_bounded_before_it_is_listed(
    tmp_path: Path, peak: Callable[[], int]
):
    with pytest.raises(UnpackError, match=r"more than 1000 members; a catalog"):
        unpack(zip_of_entries(tmp_path / "many.zip", 30_000), tmp_path / "out", most_members=1000)
    assert peak() < 10 * 10**6
    with pytest.raises(UnpackError, match=r"a directory of 6000000 bytes; expected 1560576 at most"):
        unpack(zip_of_entries(tmp_path / "long.zip", 100, 60_000), tmp_path / "out", most_members=1000)


def test_a_stored_archive_in_an_archive_has_members_of_its_own(tmp_path: Path):
    inner = zip_of(tmp_path / "inner.zip", *((f"f{k}", b"") for k in range(5))).read_bytes()
    archive = zip_of(tmp_path / "sets.zip", ("inner.zip", inner))
    (tmp_path / "out").mkdir()
    unpack(archive, tmp_path / "out", most_members=1)
    assert (tmp_path / "out" / "inner.zip").read_bytes() == inner


def test_the_number_of_members_is_bounded(tmp_path: Path):
    archive = zip_of(tmp_path / "sets.zip", *((f"f{k}", b"") for k in range(5)))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match="more than 4 members"):
        unpack(archive, tmp_path / "out", most_members=4)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(50), b"\x1f\x8b" + bytes(50)])
@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_what_is_no_archive_is_an_error_and_no_crash(tmp_path: Path, ending: str, content: bytes):
    (tmp_path / f"sets.{ending}").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match="cannot be unpacked"):
        unpack(tmp_path / f"sets.{ending}", tmp_path / "out")


def test_an_encrypted_archive_is_an_error(tmp_path: Path):
    archive = zip_of(tmp_path / "sets.zip", ("a", b"x"))
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    archive.write_bytes(bytes(content))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnpackError, match="encrypted"):
        unpack(archive, tmp_path / "out")


# -- catalogs and downloads --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "served")
    yield running
    running.close()


def catalog_of(tmp_path: Path, server: Server, name: str, more: str = "", checksum: str = "") -> Catalog:
    digest = checksum or hashlib.sha256((server.folder / name).read_bytes()).hexdigest()
    return open_catalog(
        write_catalog(
            tmp_path,
            f"- name: A\n  source: {{url: '{server.url}/{name}', folder: Data{more}}}\n"
            f"  checksum: sha256:{digest}\n  reader: lsim",
        )
    )


def test_a_catalog_bounds_what_its_archive_unpacks_to(tmp_path: Path, server: Server):
    zip_of(server.folder / "sets.zip", ("Data/a", bytes(10**6)), ("Data/b", b"x"), compressed=True)
    for more, reason in ((", unpacked: 900 kB", "more than 900 kB"), (", members: 1", "more than 1 members")):
        with pytest.raises(CatalogError, match=rf"dataset A: .*sets.zip.*{reason}"):
            fetch(catalog_of(tmp_path, server, "sets.zip", more), data_dir=tmp_path / "data")
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["downloads"]
    fetch(catalog_of(tmp_path, server, "sets.zip", ", unpacked: 2 MB"), data_dir=tmp_path / "data")


def test_a_download_ends_at_the_stated_size(tmp_path: Path, server: Server):
    zip_of(server.folder / "sets.zip", ("Data/a", bytes(10**6)))
    with pytest.raises(CatalogError, match=r"more than 110 kB were sent; if this is right, state the size"):
        fetch(catalog_of(tmp_path, server, "sets.zip", ", size: 100 kB"), data_dir=tmp_path / "data")
    assert not list((tmp_path / "data" / "downloads").iterdir())
    with pytest.raises(CatalogError, match=r"sets.zip: .*hash"):
        fetch(catalog_of(tmp_path, server, "sets.zip", checksum="1" * 64), data_dir=tmp_path / "data")
    assert not list((tmp_path / "data" / "downloads").iterdir())


PATHS = ["../../escaped.zip", "/escaped", "a/b.zip", "a\\\\b.zip", "..", "a\\0.zip", "a\\e.zip", "a" * 300]


@pytest.mark.parametrize("file", [*PATHS, ".zip", "..zip", "...zip", "downloads.zip"])
def test_downloads_have_plain_names(tmp_path: Path, file: str):
    """One called ``.zip`` would be unpacked in place of the data root, and one of ``../x`` beside it."""
    source = f'{{url: "http://localhost/x", file: "{file}"}}'
    entry = f"- {{name: A, source: {source}, reader: lsim, checksum: 'sha256:{'0' * 64}'}}"
    with pytest.raises(CatalogError, match=r"\(A\).source: download .* expected the plain name of a file"):
        open_catalog(write_catalog(tmp_path, entry))


def test_a_folder_that_was_not_unpacked_is_not_replaced(tmp_path: Path, server: Server):
    zip_of(server.folder / "mine.zip", ("Data/a", b"x"))
    (tmp_path / "data" / "mine" / "A").mkdir(parents=True)
    with pytest.raises(CatalogError, match=r"data/mine exists, and was not unpacked from a download"):
        fetch(catalog_of(tmp_path, server, "mine.zip"), data_dir=tmp_path / "data")
    assert (tmp_path / "data" / "mine" / "A").is_dir()


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "zarr.json", "A.partial", "x" * 200, "a\\0b", "\\e[2J", ".."]
)
def test_names_of_data_sets_and_fields_are_names_of_groups(tmp_path: Path, name: str):
    for entry in (f'name: "{name}"', f'name: A, fields: {{"{name}": {{channel: 0}}}}'):
        with pytest.raises(CatalogError) as caught:
            open_catalog(write_catalog(tmp_path, f"- {{{entry}, source: {{path: d}}, reader: lsim}}"))
        assert "expected letters" in str(caught.value) or "characters" in str(caught.value) or "a store keeps"


def test_a_catalog_of_countless_brackets_is_an_error(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("[" * 10_000)
    with pytest.raises(CatalogError, match="not valid YAML"):
        open_catalog(tmp_path / "mine.yaml")


def test_a_catalog_is_data_and_no_program(tmp_path: Path):
    trap = tmp_path / "trap"
    (tmp_path / "mine.yaml").write_text(
        f"name: !!python/object/apply:os.system ['touch {trap}']\ndatasets: []"
    )
    with pytest.raises(CatalogError, match="not valid YAML"):
        open_catalog(tmp_path / "mine.yaml")
    assert not trap.exists()


# -- source files ------------------------------------------------------------------------------------------


def entry(reader: str, **more: Any) -> Dataset:
    return Dataset.model_validate({"name": "D", "source": {"path": "."}, "reader": reader, **more})


GOOD = np.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8)


def save_stack(path: Path, frames: np.ndarray = GOOD) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, frames=frames, parameter=np.arange(len(frames)))


def save_pngs(folder: Path, content: bytes | None = None, size: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        data = content if number == 1 and content is not None else png(size, size, bytes(size * (size + 1)))
        (folder / f"f{number:02d}.png").write_bytes(data)


def png(width: int, height: int, rows: bytes) -> bytes:
    """A gray PNG whose header claims ``width`` and ``height``, whatever ``rows`` are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def npy(shape: tuple[int, ...], dtype: str = "<f8", body: bytes = b"") -> bytes:
    """An ``.npy`` file whose header claims ``shape``."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def npz(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def converted(tmp_path: Path, reader: str, more: str = "") -> dict[str, str]:
    """Convert the folder ``data``: why each sequence is quarantined; "good" has to be converted."""
    catalog = open_catalog(
        write_catalog(tmp_path, f"- {{name: D, source: {{path: data}}, reader: {reader}{more}}}")
    )
    report = convert(catalog, tmp_path / "frames.zarr")
    assert any("good" in name for name in report.converted + report.unchanged), report.quarantined
    for quarantined in report.quarantined:
        assert quarantined.file
        assert printable(quarantined.sequence) == quarantined.sequence
    return {entry.sequence: entry.reason for entry in report.quarantined}


class Program:
    """Pickled, this leaves a file where it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return Path.touch, (self.trap,)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(30_000, 30_000, bytes(1000)), "decompression bomb"),
        (png(10_000, 10_000, bytes(1000)), "10000 × 10000 pixels, which may be a decompression bomb"),
        (png(2**31 - 1, 2**31 - 1, b""), "decompression bomb"),
        (png(9, 9, bytes(72)), "cannot be decoded"),
        (png(4, 4, bytes(72)), r"frame of shape \(4, 4, 1\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_png_bombs_are_quarantined(tmp_path: Path, content: bytes, reason: str):
    save_pngs(tmp_path / "data" / "good")
    save_pngs(tmp_path / "data" / "bad", content)
    (found,) = converted(tmp_path, "lsim").items()
    assert found[0] == "bad"
    assert re.search(reason, found[1])


def test_other_formats_are_no_png(tmp_path: Path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    save_pngs(tmp_path / "data" / "good")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n"
    save_pngs(tmp_path / "data" / "bad", script)
    assert "cannot identify image file" in converted(tmp_path, "lsim")["bad"]


@pytest.mark.parametrize("reader", ["lsim", "stack", "xarray"])
def test_pipes_are_not_waited_for(tmp_path: Path, reader: str):
    folder = tmp_path / "data"
    if reader == "lsim":
        save_pngs(folder / "good")
        save_pngs(folder / "bad")
        pipe = folder / "bad" / "f01.png"
        pipe.unlink()
    elif reader == "stack":
        save_stack(folder / "good.npz")
        pipe = folder / "bad.npz"
    else:
        hdf5(folder / "good.nc", lambda file: file.create_dataset("u", data=GOOD))
        pipe = folder / "bad.nc"
    os.mkfifo(pipe)
    assert "a pipe or a device" in converted(tmp_path, reader)["bad"]


def test_numpy_files_are_looked_at_before_they_are_loaded(tmp_path: Path):
    folder, trap = tmp_path / "data", tmp_path / "trap"
    save_stack(folder / "good.npz")
    programs = np.array([Program(trap)], dtype=object)
    np.save(folder / "objects.npy", programs, allow_pickle=True)
    np.savez(folder / "packed.npz", frames=programs, parameter=np.arange(1), allow_pickle=True)
    (folder / "pickled.npy").write_bytes(pickle.dumps(Program(trap)))
    (folder / "pickled2.npz").write_bytes(pickle.dumps(Program(trap)))
    (folder / "many.npy").write_bytes(npy((10**12, 1, 1)))
    (folder / "more.npy").write_bytes(npy((10**30, 1, 1)))
    (folder / "negative.npy").write_bytes(npy((-3, 4, 4)))
    (folder / "short.npy").write_bytes(npy((3, 100, 100), body=bytes(80)))
    (folder / "code.npy").write_bytes(
        b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('true')".ljust(64)
    )
    for name in ("objects", "pickled", "many", "more", "negative", "short", "code"):
        np.save(folder / f"{name}.parameter.npy", np.arange(3.0))
    npz(folder / "claims.npz", frames=npy((10**12, 1, 1)), parameter=npy((3,), body=bytes(24)))
    npz(folder / "bomb.npz", frames=npy((3, 10**9, 10)), parameter=npy((3,), body=bytes(24)))
    found = converted(tmp_path, "stack")
    expected = {
        "objects": "holds Python objects, which are pickled programs and not loaded",
        "packed": "'frames' holds Python objects",
        "pickled": "not a NumPy file; a pickle is a program",
        "pickled2": "not a zip file",
        "many": r"shape \(1000000000000, 1, 1\) would take 8 TB; a sequence may take 17.2 GB",
        "more": "would take",
        "negative": "claims the shape",
        "short": "the header claims 240000 bytes; the file has 80",
        "code": "cannot be decoded",
        "claims": "'frames' of shape .* would take 8 TB",
        "bomb": "'frames' of shape .* would take 240 GB",
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.search(reason, found[name]), found[name]
    assert not trap.exists()
    np.load(folder / "objects.npy", allow_pickle=True)
    assert trap.exists(), "the pickle is harmless: this test shows nothing"


def test_numpy_headers_are_not_read_before_their_length(tmp_path: Path, peak: Callable[[], int]):
    folder = tmp_path / "data"
    save_stack(folder / "good.npz")
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 50 * 10**6) + b" " * 50 * 10**6
    npz(folder / "long.npz", frames=header, parameter=npy((3,), body=bytes(24)))
    (folder / "plain.npy").write_bytes(header)
    np.save(folder / "plain.parameter.npy", np.arange(3.0))
    zip_of_entries(folder / "many.npz", 50_000)
    del header
    tracemalloc.reset_peak()
    found = converted(tmp_path, "stack")
    assert peak() < 30 * 10**6
    assert found.keys() == {"long", "plain", "many"}
    for name in ("long", "plain"):
        assert "a header that claims 50000000 bytes; expected 10000 at most" in found[name]
    assert "more than 10000 members" in found["many"]


@pytest.mark.parametrize("reader", ["lsim", "stack", "xarray"])
def test_a_catalog_bounds_its_sequences(tmp_path: Path, reader: str):
    folder = tmp_path / "data"
    if reader == "lsim":
        save_pngs(folder / "good")
        save_pngs(folder / "large", size=100)
    for name, size in (("good", 8), ("large", 100)):
        frames = np.random.default_rng(0).random((3, size, size))
        if reader == "stack":
            save_stack(folder / f"{name}.npz", frames)
        elif reader == "xarray":
            folder.mkdir(exist_ok=True)
            variables = {"u": (("frame", "y", "x"), frames), "parameter": ("frame", np.arange(3.0))}
            xr.Dataset(variables).to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
    (reason,) = converted(tmp_path, reader, ", largest_sequence: 20 kB").values()
    assert "a sequence may take 20 kB (largest_sequence in the catalog states another size)" in reason
    # With a larger bound it is read again, though no file has changed; it has another shape, and is named.
    (reason,) = converted(tmp_path, reader, ", largest_sequence: 1 MB").values()
    assert "(3, 100, 100, 1)" in reason


def hdf5(path: Path, fill: Callable[[h5py.File], None], frames: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, length in (("frame", 3), ("y", 8), ("x", 8)):
            file[name] = np.arange(float(length))
            file[name].make_scale(name)
        fill(file)
        file["parameter"] = np.arange(3.0)
        file["parameter"].dims[0].attach_scale(file["frame"])
        if frames:
            for axis, name in enumerate(("frame", "y", "x")):
                file["u"].dims[axis].attach_scale(file[name])


def test_hdf5_files_read_from_no_other_file(tmp_path: Path):
    folder, secret, raw = tmp_path / "data", tmp_path / "secret.h5", tmp_path / "secret.txt"
    hdf5(secret, lambda file: file.create_dataset("u", data=GOOD + 42))
    raw.write_bytes(b"password" * 24)
    hdf5(folder / "good.nc", lambda file: file.create_dataset("u", data=GOOD))

    def external(file: h5py.File) -> None:
        file["u"] = h5py.ExternalLink(str(secret), "u")

    def soft(file: h5py.File) -> None:
        file["way"] = h5py.ExternalLink(str(secret), "/")
        file["u"] = h5py.SoftLink("/way/u")

    def nested(file: h5py.File) -> None:
        file["u"] = GOOD
        file.create_group("a/b")["c"] = h5py.ExternalLink("../secret.h5", "u")

    def storage(file: h5py.File) -> None:
        file.create_dataset("u", GOOD.shape, "u1", external=[(str(raw), 0, GOOD.size)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(GOOD.shape, "f8")
        layout[:] = h5py.VirtualSource(str(secret), "u", GOOD.shape)
        file.create_virtual_dataset("u", layout)

    hdf5(folder / "external.nc", external, frames=False)
    hdf5(folder / "soft.nc", soft, frames=False)
    hdf5(folder / "nested.nc", nested)
    hdf5(folder / "storage.nc", storage)
    hdf5(folder / "virtual.nc", virtual)
    found = converted(tmp_path, "xarray")
    expected = {
        "external": "'u' is a link to another file, '.*secret.h5', and not followed",
        "soft": "'way' is a link to another file",
        "nested": "'a/b/c' is a link to another file",
        "storage": "'u' has its values in other files .*secret.txt",
        "virtual": "'u' is made of other files .*secret.h5",
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.search(reason, found[name]), found[name]


def test_links_within_an_hdf5_file_are_followed(tmp_path: Path):
    def within(file: h5py.File) -> None:
        file["other"] = GOOD
        layout = h5py.VirtualLayout(GOOD.shape, "f8")
        layout[:] = h5py.VirtualSource(".", "other", GOOD.shape)
        file.create_virtual_dataset("u", layout)
        file["same"] = h5py.SoftLink("/u")

    hdf5(tmp_path / "data" / "good.nc", within)
    assert not converted(tmp_path, "xarray", ", options: {variables: [u]}")


def test_shapes_that_hdf5_files_claim_are_bounded(tmp_path: Path):
    folder = tmp_path / "data"
    hdf5(folder / "good.nc", lambda file: file.create_dataset("u", data=GOOD))
    with h5py.File(folder / "huge.nc", "w") as file:
        file.create_dataset("u", (3, 10**7, 10**7), "f8", chunks=(1, 64, 64))
        file["parameter"] = np.arange(3.0)
        for axis, name in enumerate(("frame", "y", "x")):
            file.create_dataset(name, file["u"].shape[axis : axis + 1], "i1", chunks=True).make_scale(name)
            file["u"].dims[axis].attach_scale(file[name])
        file["parameter"].dims[0].attach_scale(file["frame"])
    with h5py.File(folder / "line.nc", "w") as file:
        file.create_dataset("y", (10**12,), "f8", chunks=(64,)).make_scale("y")
    with h5py.File(folder / "chunk.nc", "w") as file:
        pass
    found = converted(tmp_path, "xarray")
    assert re.search(r"'u' of shape \(3, 10000000, 10000000\) would take 2.4 PB", found["huge"])
    assert re.search(r"'y' of shape .* would take 8 TB; a variable of one dimension may take", found["line"])
    assert "no variable has the dims" in found["chunk"]
    assert len(found) == 3


def zarr2(path: Path, name: str, **metadata: Any) -> None:
    """An array of a Zarr store of format 2, written as text: no library has to agree."""
    (path / name).mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    about = {"zarr_format": 2, "dtype": "<f8", "fill_value": -1.0, "order": "C", "filters": None} | metadata
    (path / name / ".zarray").write_text(json.dumps({"compressor": None, "chunks": about["shape"]} | about))
    dims = {"u": ["frame", "y", "x"]}.get(name, ["frame"])
    (path / name / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": dims}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zarr_stores_that_unpickle_or_claim_a_petabyte_are_quarantined(tmp_path: Path):
    folder, trap = tmp_path / "data", tmp_path / "trap"
    pickles = {"id": "pickle", "protocol": 5}
    for name, more in {
        "good": {},
        "filter": {"filters": [pickles]},
        "second": {"dtype": "|O", "fill_value": None, "filters": [{"id": "vlen-utf8"}, pickles]},
        "compressor": {"compressor": pickles},
        "petabyte": {"shape": [3, 10**7, 10**7], "chunks": [1, 64, 64]},
        "chunk": {"chunks": [3, 10**7, 10**7]},
    }.items():
        path = folder / f"{name}.zarr"
        zarr2(path, "u", **({"shape": [3, 8, 8]} | more))
        (path / "u" / "0.0.0").write_bytes(
            pickle.dumps(Program(trap)) if "id" in str(more) else GOOD.tobytes()
        )
        zarr2(path, "parameter", shape=[3])
        (path / "parameter" / "0").write_bytes(np.arange(3.0).tobytes())
    zarr2(folder / "line.zarr", "frame", shape=[10**12], chunks=[64])
    (folder / "linked.zarr").symlink_to(tmp_path)
    (folder / "inside.zarr").mkdir()
    (folder / "inside.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / "inside.zarr" / "u").symlink_to(tmp_path)
    found = converted(tmp_path, "xarray")
    expected = {
        "filter": "codec 'pickle'",
        "second": "codec 'pickle'",
        "compressor": "codec 'pickle'",
        "petabyte": r"'u' of shape \(3, 10000000, 10000000\) would take 2.4 PB; a sequence may take",
        "chunk": r"'u' of shape \(3, 10000000, 10000000\) would take 2.4 PB",
        "line": "would take 8 TB; a variable of one dimension may take",
        "linked": "a link that leads out of the data set's folder",
        "inside": "a link that leads out of the store",
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.search(reason, found[name]), (name, found[name])
    assert not trap.exists()


def test_coordinates_are_bounded_together(tmp_path: Path):
    folder = tmp_path / "data"
    hdf5(folder / "good.nc", lambda file: file.create_dataset("u", data=GOOD))

    def many(file: h5py.File) -> None:
        file["u"] = GOOD
        for number in range(20):
            file.create_dataset(f"a{number}", (20_000_000,), "f8", chunks=(64,))

    def texts(file: h5py.File) -> None:
        file["u"] = GOOD
        file.create_dataset("names", (2,), "S400000000", chunks=(1,))

    def characters(file: h5py.File) -> None:
        file["u"] = GOOD
        file.create_dataset("names", (2, 400_000_000), "S1", chunks=(1, 64))

    for fill in (many, texts, characters):
        hdf5(folder / f"{fill.__name__}.nc", fill)
    zarrs: dict[str, dict[str, Any]] = {
        "goodz": {"n": {"shape": [3], "dtype": "<U100", "fill_value": ""}},
        "manyz": {f"a{k}": {"shape": [20_000_000], "chunks": [64]} for k in range(20)},
        "textz": {"n": {"shape": [2], "dtype": "|S400000000", "fill_value": ""}},
        "charactersz": {
            "n": {"shape": [2, 400_000_000], "dtype": "|S1", "chunks": [1, 64], "fill_value": ""}
        },
        "recordz": {"n": {"shape": [2], "dtype": [["a", "<f8", [10**7]]]}},
    }
    for name, arrays in zarrs.items():
        for array, about in arrays.items():
            zarr2(folder / f"{name}.zarr", array, **about)
        zarr2(folder / f"{name}.zarr", "u", shape=[3, 8, 8])
        zarr2(folder / f"{name}.zarr", "parameter", shape=[3])
        (folder / f"{name}.zarr" / "u" / "0.0.0").write_bytes(GOOD.tobytes())
        (folder / f"{name}.zarr" / "parameter" / "0").write_bytes(np.arange(3.0).tobytes())
    third = folder / "third.zarr" / "n"
    third.mkdir(parents=True)
    (folder / "third.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    text = {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4 * 10**8}}
    (third / "zarr.json").write_text(json.dumps({"zarr_format": 3, "shape": [2], "data_type": text}))
    found = converted(tmp_path, "xarray")
    together = "variables of one dimension would take .* together, with .*; they may take"
    each = "values of 400 MB each; expected 65536 bytes at most"
    expected = {"many": together, "manyz": together, "recordz": "values of 80 MB each"} | dict.fromkeys(
        ("texts", "characters", "textz", "charactersz", "third"), each
    )
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.search(reason, found[name]), (name, found[name])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("<f8", (8, "f")),
        ("|S12", (12, "S")),
        ("<U3", (12, "U")),
        ("<M8[ns]", (8, "M")),
        ("float32", (4, "f")),
        ("bool", (1, "b")),
        ("string", (16, "V")),
        ("unknown16", (16, "V")),
        ("r800000", (800000, "V")),
        ("|S99999999999999", (99999999999999, "V")),
        ([["a", "<i4"], ["b", "<f8", [2, 3]]], (52, "V")),
        ({"name": "null_terminated_bytes", "configuration": {"length_bytes": 1}}, (1, "S")),
        ({"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}, (8, "M")),
        (
            {"name": "structured", "configuration": {"fields": [{"name": "a", "data_type": "int16"}]}},
            (2, "V"),
        ),
        ({"name": "structured", "configuration": {"fields": [["a", "int16"]]}}, (2, "V")),
    ],
)
def test_the_size_of_a_value_is_read_from_zarr_metadata(dtype: Any, expected: tuple[int, str]):
    assert value_size(dtype) == expected


def test_a_variable_of_countless_sequences_is_refused(tmp_path: Path):
    path = tmp_path / "data.zarr"
    root = store.open_store(path, "a")
    shape, dims = (10**9, 3, 8, 8), ("sequence", "frame", "y", "x")
    store.create_array(root, "u", shape=shape, chunks=(1, 3, 8, 8), dims=dims, dtype="f8")
    with pytest.raises(CatalogError, match="1000000000 sequences; expected 1000000 at most"):
        list_sequences(entry("xarray"), path)


# -- links and names ---------------------------------------------------------------------------------------


def test_links_that_leave_the_data_set_are_not_followed(tmp_path: Path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    save_pngs(folder / "good")
    save_pngs(elsewhere / "secret")
    (folder / "folder").symlink_to(elsewhere / "secret")
    save_pngs(folder / "frame")
    (folder / "frame" / "f01.png").unlink()
    (folder / "frame" / "f01.png").symlink_to(elsewhere / "secret" / "f01.png")
    (folder / "within").symlink_to(folder / "good")
    found = converted(tmp_path, "lsim")
    assert found.keys() == {"folder", "frame"}
    assert all("a link that leads out of the data set's folder" in reason for reason in found.values())


@pytest.mark.parametrize("source", ["data", "data/good.npz"])
def test_the_data_set_itself_may_be_a_link(tmp_path: Path, source: str):
    save_stack(tmp_path / "elsewhere" / "good.npz")
    if source == "data":
        (tmp_path / source).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / source).symlink_to(tmp_path / "elsewhere" / "good.npz")
    (sequence,) = list_sequences(entry("stack"), tmp_path / source)
    assert sequence.read()[0].shape == (3, 8, 8, 1)


UNSAFE = {
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "line": "a\nb\rc",
    "direction": "a\u202egnp.exe",
    "digits": "9" * 5000,
    "long": "x" * 10_000,
}
ODD = [
    "<script>alert(1)</script>",
    "../../../escaped",
    "/etc/passwd",
    "a/b",
    "=1+1",
    "$\\frac{$",
    ":warning:",
]


def names_archive(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(0).random((len(names), 3, 8, 8))
    xr.Dataset(
        {"u": (("sequence", "frame", "y", "x"), frames), "parameter": ("frame", np.arange(3.0))},
        {"sequence": np.array(names, object)},
    ).to_netcdf(folder / "runs.nc", engine="h5netcdf")


def test_names_of_sequences_are_text_and_lead_nowhere(tmp_path: Path):
    names_archive(tmp_path / "data", ["good", *ODD, *UNSAFE.values()])
    found = converted(tmp_path, "xarray")
    assert len(found) == len(UNSAFE)
    reasons = " ".join(found.values())
    assert reasons.count("control characters in the name") == 3
    assert "a name of 5000 characters; expected 1000 at most" in reasons
    assert all(len(name) < 200 for name in found)
    group = store.open_dataset(tmp_path / "frames.zarr", "D/u")
    assert {str(name) for name in group["sequence"].values} == {"good", *ODD}
    assert not list(tmp_path.parent.rglob("escaped*"))
    # The same again is up to date: what is quarantined is known by its safe name.
    assert converted_nothing(tmp_path)


def converted_nothing(tmp_path: Path) -> bool:
    return not convert(open_catalog(tmp_path / "mine.yaml"), tmp_path / "frames.zarr").changed


def test_names_load_files_that_are_no_text_are_quarantined(tmp_path: Path):
    save_stack(tmp_path / "data" / "good.npz")
    content = (tmp_path / "data" / "good.npz").read_bytes()
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/bad\xff.npz")).write_bytes(content)
    (tmp_path / "data" / "new\nline.npz").write_bytes(content)
    found = converted(tmp_path, "stack")
    assert found.keys() == {"bad\\udcff", "new\\nline"}


def test_a_variable_that_cannot_name_a_group_breaks_its_file_alone(tmp_path: Path):
    folder = tmp_path / "data"
    hdf5(folder / "good.nc", lambda file: file.create_dataset("u", data=GOOD))
    hdf5(folder / "bad.nc", lambda file: file.create_dataset("u", data=GOOD))
    with xr.open_dataset(folder / "bad.nc", engine="h5netcdf") as dataset:
        renamed = dataset.load().rename({"u": "zarr.json"})
    renamed.to_netcdf(folder / "bad.nc", engine="h5netcdf")
    assert "can't name a field, 'zarr.json'" in converted(tmp_path, "xarray")["bad"]


@pytest.fixture
def lsim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """The command: exit code, and all it printed."""

    def run(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["lsim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capsys.readouterr())

    return run


def test_the_terminal_sees_no_control_characters(tmp_path: Path, lsim: Callable[..., tuple[Any, str]]):
    names_archive(tmp_path / "data", ["good", ":warning:", "[red]x", *UNSAFE.values()])
    (tmp_path / "data" / "e\x1b[2J.nc").write_bytes(b"not a file")
    title = 'title: "\\e]0;owned\\a"'
    file = write_catalog(
        tmp_path, '- {name: D, source: {path: data}, reader: xarray, title: "\\e[2J :warning:"}', title
    )
    convert_it = ("convert", file, "--out", tmp_path / "frames.zarr", "--cluster", "none")
    for arguments, expected in (
        (convert_it, 3),
        (("catalog", "show", file), 0),
        ((*convert_it, "--dataset", "\x1b[2J"), 1),
    ):
        code, text = lsim(*arguments)
        assert code == expected
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e⚠]", text), text
        assert "\\x1b" in text


# -- stores that are given ---------------------------------------------------------------------------------


def frames_store(path: Path, frames: dict[str, tuple[int, ...]], **more: Any) -> Path:
    """A ``frames.zarr`` whose fields claim these shapes; one of few values is really there."""
    root = store.open_output(path, schema.FRAMES_STORE)
    for key, shape in frames.items():
        count, n = shape[:2]
        group = root.require_group(key)
        chunks = more.get("chunks", (1, 1, *(min(length, 64) for length in shape[2:4]), shape[4]))
        store.create_array(
            *(group, schema.FRAMES), shape=shape, chunks=chunks, dims=schema.FRAMES_DIMS, dtype="f4"
        )
        parameter = store.create_array(
            *(group, schema.PARAMETER), shape=(count, n), chunks=(1, min(n, 64)), dims=schema.PARAMETER_DIMS,
            dtype="f8",
        )  # fmt: skip
        if n < 100:
            store.write_block(parameter, (0, 0), parameters(count, n)[:1])
            for row in range(1, count):
                store.write_block(parameter, (row, 0), parameters(1, n))
        for name, values in (
            (schema.SEQUENCE, more.get("names", [f"s{k}" for k in range(count)])),
            (schema.CONTENT, [f"{key}{k}" for k in range(count)]),
        ):
            array = store.create_array(
                group, name, shape=(count,), chunks=(count,), dims=(schema.SEQUENCE,), dtype=str
            )
            store.write_rows(array, 0, np.array(values, dtype=object))
    return path


def compute(frames: Path, out: Path, **options: Any) -> Any:
    with Cluster(load_profile("none")) as cluster:
        return compute_distances(frames, out, Settings(metrics=("l2",), **options), cluster=cluster)


def test_a_store_that_claims_a_petabyte_is_refused_with_the_numbers(tmp_path: Path):
    shape = (2, 3, 10**7, 10**7, 1)
    frames = frames_store(tmp_path / "frames.zarr", {"A/u": shape})
    report = compute(frames, tmp_path / "d.zarr")
    assert [f.sequence for f in report.failures] == ["s0", "s1"]
    for failure in report.failures:
        assert re.search(
            r"values of shape .* would take 1.2 PB; this machine has .* of memory", failure.reason
        )


@pytest.mark.parametrize(
    "options",
    [
        ("verify",),
        ("embed", "--metric", "l2", "--out", "e.zarr"),
        ("matrix", "--metrics", "l2", "--out", "a.zarr"),
    ],
    ids=lambda options: options[0],
)
def test_other_commands_refuse_a_petabyte_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lsim: Callable[..., tuple[Any, str]],
    options: tuple[str, ...],
):
    monkeypatch.chdir(tmp_path)
    frames_store(Path("frames.zarr"), {"A/u": (2, 3, 10**7, 10**7, 1)})
    code, text = lsim(
        options[0], "frames.zarr", *options[1:], *(["--cluster", "none"] if len(options) > 1 else [])
    )
    assert code == 1
    assert re.search(
        r"error: .*frames: values of shape .* would take [\d.]+ [PT]B; this machine has", text
    ), text


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((2, 10**13, 8, 8, 1), None), ((2, 3, 8, 8, 1), (1, 1, 10**7, 10**7, 1))],
    ids=["parameter", "chunk"],
)
def test_stores_that_claim_too_much_elsewhere_are_refused_too(tmp_path: Path, shape: Any, chunks: Any):
    more = {"chunks": chunks} if chunks else {}
    frames = frames_store(tmp_path / "frames.zarr", {"A/u": shape}, **more)
    try:
        reasons = [failure.reason for failure in compute(frames, tmp_path / "d.zarr").failures]
    except store.StoreError as error:
        reasons = [str(error)]
    assert reasons
    assert all(re.search("would take .* this machine has", reason) for reason in reasons), reasons


def test_distances_that_overflow_are_named(tmp_path: Path):
    frames = write_archive(tmp_path / "frames.zarr", {"A/u": {"s": smooth_sequence(0) * np.float32(1e30)}})
    (failure,) = compute(frames, tmp_path / "d.zarr", scope=(0.0, 1.0)).failures
    assert re.search(
        r"up to .*e\+30 times the range of the scope away from it; expected 1e\+15", failure.reason
    )
    assert not compute(frames, tmp_path / "sound.zarr").failures


@pytest.mark.parametrize("name", list(UNSAFE.values()))
def test_a_store_with_names_that_cannot_be_shown_is_refused(tmp_path: Path, name: str):
    frames = frames_store(tmp_path / "frames.zarr", {"A/u": (2, 3, 8, 8, 1)}, names=["good", name])
    with pytest.raises(schema.SchemaError, match="name") as caught:
        compute(frames, tmp_path / "d.zarr")
    assert printable(str(caught.value)) == str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_store_with_groups_that_are_no_names_is_refused(tmp_path: Path):
    frames = frames_store(tmp_path / "frames.zarr", {"A/<img src=x>": (2, 3, 8, 8, 1)})
    with pytest.raises(store.StoreError, match=r"a group, found one called '<img src=x>'"):
        compute(frames, tmp_path / "d.zarr")


# -- results -----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, in order, with the names of their attributes; and all its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><svg onload=alert(1)>",
    "<!--",
    "]]>&lt;b&gt;",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$ ${7*7}",
    '=HYPERLINK("http://x","y")',
    "+1",
    "-1+1",
    "@SUM(A1)",
    "'quoted",
    "a | b",
    "[link](javascript:alert(1))",
    "`code` **bold**",
    "../../escaped",
]


def report_of(folder: Path, names: list[str], text: str, file: str) -> Path:
    """Convert, compare, correlate and report an archive with these names; ``text`` describes it."""
    data = folder / "data"
    names_archive(data, sorted(names, key=natural_key))
    (data / "runs.nc").rename(data / f"{file}.nc")
    (data / f"z{file}.nc").write_bytes(b"broken")
    about = dict.fromkeys(("title", "licence", "citation"), text)
    # netCDF4, which xarray prefers where it is installed, takes such a name for an address.
    options = {"engine": "h5netcdf"}
    dataset = {"name": "D", "source": {"path": "data"}, "reader": "xarray", "options": options, **about}
    pools = {f"={text}": ["D"]}
    catalog = {"name": "mine", "doi": text, **about, "datasets": [dataset], "pools": pools}
    (folder / "mine.yaml").write_text(json.dumps(catalog))
    convert(open_catalog(folder / "mine.yaml"), folder / "frames.zarr")
    compute(folder / "frames.zarr", folder / "distances.zarr")
    root = store.open_store(folder / "distances.zarr", "r+")
    store.set_attributes(root, {"unavailable": {text: text}})
    # One failure with a reason of others' words, as a metric's error may hold.
    group = store.get_group(root, "D/u/provenance")
    failure = store.get_array(group, schema.FAILURE)
    reasons = store.read(failure)
    reasons[0, 0] = text
    store.write_block(failure, (0, 0), reasons)
    correlate(folder / "distances.zarr", folder / "results", replicates=50)
    with pytest.raises(
        DamagedReportError
    ):  # of the reason, which no run wrote; the page is there all the same
        write_report(folder / "results", title=text)
    return folder / "results"


def unescaped_cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results of the same numbers under hostile names and under harmless ones."""
    hostile = report_of(
        tmp_path_factory.mktemp("hostile"), EVIL, "".join(EVIL), "=1\"><img src=x onerror=alert(1)>'$\\frac{$"
    )
    harmless = report_of(
        tmp_path_factory.mktemp("harmless"), [f"s{k:02d}" for k in range(len(EVIL))], "text", "runs"
    )
    return hostile, harmless


def test_a_page_has_no_element_or_attribute_that_is_not_ours(results: tuple[Path, Path]):
    hostile, harmless = (Elements((folder / "report/index.html").read_text()) for folder in results)
    assert hostile.found == harmless.found
    assert not [tag for tag, _ in hostile.found if tag in ("script", "iframe", "object", "embed", "link")]
    assert not [name for _, names in hostile.found for name in names if name.startswith("on")]
    for name in EVIL:
        assert name.replace("../", "") in hostile.text
    assert "{{ 7 * 7 }}" in hostile.text
    assert (results[0] / "report/overview.png").stat().st_size > 1000


def test_cells_of_tables_are_no_formulas(results: tuple[Path, Path]):
    tables = [*results[0].glob("*.csv"), *results[0].glob("report/*.csv")]
    assert len(tables) > 5
    cells = 0
    for table in tables:
        with table.open(newline="") as file:
            for row in csv.reader(file):
                for cell in row:
                    assert cell[:1] not in ("=", "+", "@", "\t", "\r"), (table, cell)
                    assert not cell.startswith("-") or float(cell) < 0, (table, cell)
                    cells += cell.startswith("'")
    assert cells
    written = read_csv(results[0] / "report/sequences.csv").sequence
    assert {name.rpartition("/")[2] for name in written} >= {"+1", "-1+1", "@SUM(A1)", "'quoted"}


def test_text_in_tables_comes_back(tmp_path: Path):
    table = pd.DataFrame({"name": ["=1", "'=1", "''", "-x", "plain", ""], "value": [-1.5, 2, 3, 4, 5, 6]})
    write_csv(table, tmp_path / "t.csv")
    back = read_csv(tmp_path / "t.csv")
    assert back.name.tolist() == table.name.tolist()
    assert back.value.astype(float).tolist() == table.value.tolist()


def test_markdown_keeps_its_cells(results: tuple[Path, Path]):
    hostile, harmless = ((folder / "report/correlations.md").read_text().splitlines() for folder in results)
    assert len(hostile) == len(harmless)
    assert [*map(unescaped_cells, hostile)] == [*map(unescaped_cells, harmless)]
    assert not re.search(r"(?<!\\)[<\[]", "\n".join(hostile))


def test_names_of_metrics_and_groups_are_text_too(tmp_path: Path):
    """A ``distances.zarr`` of others: nothing but its schema is known of it."""
    text = 'x"><script>$x{$'
    path = make_distances(tmp_path / "distances.zarr", {f"{text}/{text}": 4}, metrics={"good": 0.1})
    root = store.open_store(path, "r+")
    metrics = ("<script>$x{$", "=1+1")
    distances = {name: random_distances(parameters(4), 0.2, seed=k) for k, name in enumerate(metrics)}
    write_field(root, f"{text}/{text}", list(EVIL[:4]), parameters(4), distances)
    store.set_attributes(root, {"datasets": [text], "pools": {text + "2": [text]}})
    correlate(path, tmp_path / "results", replicates=20)
    page = Elements(write_report(tmp_path / "results").read_text())
    assert not [tag for tag, _ in page.found if tag == "script"]
    assert text in page.text


# -- bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"), [("3.9 GB", 3_900_000_000), ("16GiB", 2**34), ("1 B", 1), (" 10 kB ", 10_000)]
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int):
    assert limits.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "1", "-1 GB", "1e9 GB", "1 gb", "1 GB each", "nan GB", "١ GB"])
def test_what_is_no_size_is_an_error(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match="expected a number and one of B, kB"):
        limits.parse_size(text)
    entry = f"- {{name: A, source: {{path: d}}, reader: lsim, largest_sequence: '{text}'}}"
    with pytest.raises(CatalogError, match=r"\(A\).largest_sequence: size"):
        open_catalog(write_catalog(tmp_path, entry))


def test_the_memory_of_a_process_is_some_and_no_more_than_machines_have():
    assert 2**28 < limits.memory_bytes() < 2**50


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/job_1/step_0", {"a/job_1/memory.max": "4000", "a/memory.max": "9000"}, 4000),
        ("0::/a/job_1", {"a/job_1/memory.max": "max", "a/memory.max": "9000", "memory.max": "max"}, 9000),
        ("0::/", {"memory.max": "5000"}, 5000),
        ("0::/../../other", {"memory.max": "5000"}, 5000),
        ("0::/of/the/host", {"memory.max": "5000"}, 5000),
        ("0::/a", {"a/memory.max": "max"}, None),
        ("0::/a", {"unified/a/memory.max": "3000"}, 3000),
        (
            "5:cpu,memory:/slurm/job_1\n0::/",
            {
                "memory/slurm/job_1/memory.limit_in_bytes": "7000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            7000,
        ),
        ("5:cpu:/a\n1:name=systemd:/a:b", {"memory/a/memory.limit_in_bytes": "7000"}, None),
        (None, {"memory.max": "5000"}, None),
    ],
)
def test_the_memory_of_a_job_is_that_of_its_control_groups(
    tmp_path: Path, own: str | None, files: dict[str, str], expected: int | None
):
    if own is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert limits.control_group_bytes(tmp_path) == expected


# -- what nobody may do ------------------------------------------------------------------------------------


UNPICKLES = {"pickled_task.py": "tasks of this project's own, which came through its own scheduler"}


def test_nothing_here_unpickles_or_loads_yaml_unsafely():
    """Whoever adds a loader sees this fail first, and reads this file."""
    wrong = []
    for package in ("lsim", "pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name in UNPICKLES:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    wrong += [
                        f"{path}: {name}" for name in names if name in ("pickle", "cloudpickle", "dill")
                    ]
                if not isinstance(node, ast.Call):
                    continue
                call = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if (
                    (call == "torch.load" and given.get("weights_only") != "True")
                    or given.get("allow_pickle") == "True"
                    or call in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
                    or call.endswith((".extractall", ".unpack_archive"))
                ):
                    wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


def test_limits_of_the_process_count_as_its_memory():
    code = """
        import resource
        from pipeline.storage import limits
        from pipeline.matrix.machines import find_workers
        from pipeline.workers.cluster import Cluster
        from pipeline.workers.profiles import Profile
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            resource.setrlimit(limit, (2**33, resource.RLIM_INFINITY))
            before = limits.headroom_bytes()
            kept = bytearray(2**28)
            print(2**28 < limits.memory_bytes() <= 2**33)
            print(round((before - limits.headroom_bytes()) / 2**28))
            room = 2**33 - limits.headroom_bytes() + 2**28
            resource.setrlimit(limit, (room, resource.RLIM_INFINITY))
            with Cluster(Profile(kind="none")) as cluster:
                print(find_workers(cluster, None).memory < 2**28 * 0.6 + 2**30)
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            del kept
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert ran.stdout.split() == 2 * ["True", "1", "True"], ran.stderr
