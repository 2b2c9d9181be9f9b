"""What a second conversion sees: other content behind the same size and time, and other code of a reader."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from commands import run_lsim

from pipeline.convert import ConversionReport, convert, decode, plan
from pipeline.sources.catalog import open_catalog
from pipeline.sources.readers.base import LazySequence, SourceFile
from pipeline.storage import schema, store

TIME_NS = 1_700_000_000_000_000_000
"""Time of modification of every file here, as archives keep it."""
SHAPE = (3, 4, 5)


def frames_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(SHAPE, dtype=np.float32)


def write_stack(path: Path, seed: int) -> None:
    np.savez(path.with_suffix(".npz"), frames=frames_of(seed), parameter=np.arange(3.0))


def write_folder(path: Path, seed: int) -> None:
    path.mkdir()
    for number, frame in enumerate(frames_of(seed)):
        np.savez(path / f"a{number:02}.npz", frame)


def write_zarr(path: Path, seed: int) -> None:
    # Not compressed, so that other values take as many bytes.
    frames = (("frame", "y", "x"), frames_of(seed), {})
    dataset = xr.Dataset({"frames": frames}, {"parameter": ("frame", np.arange(3.0))})
    encoding = {"frames": {"compressors": None, "chunks": (1, 4, 5)}}
    dataset.to_zarr(path.with_suffix(".zarr"), zarr_format=3, consolidated=False, encoding=encoding)


def write_netcdf(path: Path, seed: int) -> None:
    """Two sequences in one file."""
    both = np.stack([frames_of(seed), frames_of(seed + 100)])
    dataset = xr.Dataset(
        {"frames": (("sequence", "frame", "y", "x"), both)}, {"parameter": ("frame", np.arange(3.0))}
    )
    dataset.to_netcdf(path.with_suffix(".nc"), engine="h5netcdf")


KINDS: dict[str, Callable[[Path, int], None]] = {
    "stack": write_stack,
    "lsim": write_folder,
    "zarr": write_zarr,
    "netcdf": write_netcdf,
}


class Runs:
    """Two runs, ``one`` and ``two``, in a folder of sources of some kind, and their store."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.data = folder, kind, folder / "data"
        self.data.mkdir()
        self.write(self.data / "one", 1)
        self.write(self.data / "two", 2)
        self.out = folder / "frames.zarr"
        reader = "xarray" if kind in ("zarr", "netcdf") else kind
        (folder / "catalog.yaml").write_text(
            f"name: mine\ndatasets:\n- {{name: A, source: {{path: data}}, reader: {reader}}}\n"
        )

    def write(self, path: Path, seed: int) -> None:
        KINDS[self.kind](path, seed)
        set_times(path.parent)

    def convert(self, **options: Any) -> ConversionReport:
        return convert(open_catalog(self.folder / "catalog.yaml"), self.out, **options)

    def path(self, name: str) -> Path:
        (path,) = (p for p in self.data.iterdir() if p.stem == name)
        return path

    def seed_of(self, name: str) -> int:
        """Which frames the store has for a run."""
        group = store.get_group(store.open_store(self.out), "A/frames")
        names = store.read(store.get_array(group, schema.SEQUENCE)).tolist()
        row = next(row for row, text in enumerate(names) if text.split("/")[0] == name)
        values = store.read(store.get_array(group, schema.FRAMES), row)[..., 0]
        return next(seed for seed in range(5) if np.array_equal(values, frames_of(seed)))


def set_times(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, ns=(TIME_NS, TIME_NS))


def sizes_and_times(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.fixture(params=KINDS)
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Runs:
    return Runs(tmp_path, request.param)


# ---------------------------------------------------------------- other content


def swap_by_mv(runs: Runs) -> None:
    one, two, aside = runs.path("one"), runs.path("two"), runs.data / ".aside"
    for source, target in ((one, aside), (two, one), (aside, two)):
        subprocess.run(["mv", source, target], check=True)


def copy_over(runs: Runs) -> None:
    """``cp -rp`` of one run over the other, as of a simulation that was done again."""
    subprocess.run(["cp", "-rpT", runs.path("two"), runs.path("one")], check=True)


def unpack(runs: Runs) -> None:
    other = Runs.__new__(Runs)
    other.kind, other.data = runs.kind, runs.folder / "other"
    other.data.mkdir()
    other.write(other.data / "one", 2)
    with tarfile.open(runs.folder / "other.tar", "w") as tar:
        tar.add(other.data, arcname="data")
    subprocess.run(["tar", "-xpf", "other.tar"], cwd=runs.folder, check=True)


def write_in_place(runs: Runs) -> None:
    source = runs.folder / "other"
    source.mkdir()
    KINDS[runs.kind](source / "one", 2)
    for path in (p for p in source.rglob("*") if p.is_file()):
        target = runs.data / path.relative_to(source)
        look = target.stat()
        target.write_bytes(path.read_bytes())
        os.utime(target, ns=(look.st_atime_ns, look.st_mtime_ns))


@pytest.mark.parametrize("change", [swap_by_mv, copy_over, unpack, write_in_place])
def test_other_content_of_the_same_size_and_time_is_converted(runs: Runs, change: Callable[[Runs], None]):
    assert runs.convert().converted
    assert (runs.seed_of("one"), runs.seed_of("two")) == (1, 2)
    before = sizes_and_times(runs.data)
    change(runs)
    after = sizes_and_times(runs.data)
    assert after == before, "the change is one that sizes and times don't show"
    report = runs.convert()
    assert runs.seed_of("one") == 2
    assert runs.seed_of("two") == (1 if change is swap_by_mv else 2)
    assert any("one" in name for name in report.converted)
    assert not runs.convert().changed


def change_mode(runs: Runs) -> None:
    for path in runs.data.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o600)


def restore_backup(runs: Runs) -> None:
    subprocess.run(["cp", "-rp", runs.data, runs.folder / "backup"], check=True)
    shutil.rmtree(runs.data)
    subprocess.run(["mv", runs.folder / "backup", runs.data], check=True)


def link(runs: Runs) -> None:
    """As backups by hard links do: it changes the ctime."""
    subprocess.run(["cp", "-al", runs.data, runs.folder / "backup"], check=True)


@pytest.mark.parametrize("change", [change_mode, restore_backup, link])
def test_the_same_content_is_read_once_more_and_stays(runs: Runs, change: Callable[[Runs], None]):
    runs.convert()
    group = store.get_group(store.open_store(runs.out), "A/frames")
    contents = store.read(store.get_array(group, schema.CONTENT)).tolist()
    kept = frames_files(runs.out)
    change(runs)
    report = runs.convert()
    assert not report.changed
    assert store.read(store.get_array(group, schema.CONTENT)).tolist() == contents
    assert frames_files(runs.out) == kept, "no frame is written again"
    before = all_files(runs.out)
    assert not runs.convert().changed
    assert all_files(runs.out) == before, "the record was refreshed: nothing is left to do"


def frames_files(out: Path) -> dict[str, int]:
    return {name: time for name, time in all_files(out).items() if "/frames/c/" in name}


def all_files(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_records_of_earlier_versions_are_compared_with_what_is_there(runs: Runs, monkeypatch):
    """They have no marks: sources with the same bytes stay, those with others are seen."""
    with monkeypatch.context() as patch:
        described = partial(describe_as_before, describe=decode.describe)
        patch.setattr(decode, "describe", described)
        patch.setattr(plan, "describe", described)
        runs.convert()
    swap_by_mv(runs)
    runs.convert()
    assert (runs.seed_of("one"), runs.seed_of("two")) == (2, 1)
    report = runs.convert()
    assert not report.changed


def describe_as_before(
    sequence: LazySequence, folder: str, describe: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    look = describe(sequence, folder)
    del look["code"]
    return look | {"files": [file[:3] for file in look["files"]]}


# ---------------------------------------------------------------- every source again


def freeze_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no look at a file show a change, as where a disk gives other bytes than were written."""
    monkeypatch.setattr("pipeline.sources.readers.base._mark", lambda look: "the same")


def test_verifying_sources_finds_what_no_look_shows(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    freeze_marks(monkeypatch)
    runs.convert()
    before = frames_files(runs.out)
    write_in_place(runs)
    assert not runs.convert().changed
    assert runs.seed_of("one") == 1, "no look shows it"
    report = runs.convert(verify_sources=True)
    assert runs.seed_of("one") == 2
    assert all("one" in name for name in report.converted)
    assert any("two" in name for name in report.unchanged)
    assert frames_files(runs.out).keys() == before.keys()
    assert not runs.convert(verify_sources=True).changed


def test_verifying_sources_that_did_not_change_writes_no_values(runs: Runs):
    runs.convert()
    before = {name: time for name, time in all_files(runs.out).items() if not name.endswith("zarr.json")}
    report = runs.convert(verify_sources=True)
    assert report.unchanged
    assert not report.changed
    after = {name: time for name, time in all_files(runs.out).items() if not name.endswith("zarr.json")}
    assert after == before


def test_verifying_sources_tries_quarantined_ones_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    freeze_marks(monkeypatch)
    runs = Runs(tmp_path, "stack")
    broken, whole = runs.path("one"), runs.path("one").read_bytes()
    broken.write_bytes(bytes(len(whole)))
    set_times(runs.data)
    assert [q.sequence for q in runs.convert().quarantined] == ["one"]
    broken.write_bytes(whole)
    set_times(runs.data)
    assert [q.sequence for q in runs.convert().quarantined] == ["one"]
    assert runs.convert(verify_sources=True).converted == ["A/frames/one"]


def test_the_command_verifies_sources(tmp_path: Path):
    runs = Runs(tmp_path, "stack")
    command = ("convert", tmp_path / "catalog.yaml", "--out", runs.out, "--cluster", "none")
    assert run_lsim(*command)[0] == 0
    code, text = run_lsim(*command, "--verify-sources")
    assert (code, text.splitlines()[-1]) == (
        0,
        "nothing to do: 2 sequences are up to date, compared with their decoded sources",
    )


# ---------------------------------------------------------------- readers of one's own

READER = """
from dataclasses import dataclass
import numpy as np
from pipeline.sources.readers import LazySequence, SourceFile

@dataclass(frozen=True, kw_only=True)
class RawSequence(LazySequence):
    def read(self):
        frames = np.fromfile(self.files[0].path, "<f4").reshape(3, 4, 5, 1)
        return frames * FACTOR, np.linspace(0, 1, len(frames))

def read(entry, folder):
    return [
        RawSequence(name=path.stem, field="frames", files=(SourceFile.of(path),))
        for path in folder.glob("*.raw")
    ]
"""


class OwnReader:
    """An installed package with a reader, an archive for it, and its store; each run imports it anew."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, folder / "frames.zarr"
        self.site = folder / "site"
        metadata = self.site / "own_reader-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Name: own_reader\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[lsim.readers]\nraw = own_reader:read\n")
        (folder / "data").mkdir()
        frames_of(1).tofile(folder / "data" / "one.raw")
        (folder / "catalog.yaml").write_text(
            "name: mine\ndatasets:\n- {name: A, source: {path: data}, reader: raw}\n"
        )
        monkeypatch.syspath_prepend(str(self.site))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(self, module: str, text: str) -> None:
        (self.site / f"{module}.py").write_text(text)

    def convert(self, **options: Any) -> ConversionReport:
        for module in ("own_reader", "own_helper"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return convert(open_catalog(self.folder / "catalog.yaml"), self.out, **options)

    def frames(self) -> np.ndarray:
        group = store.get_group(store.open_store(self.out), "A/frames")
        return store.read(store.get_array(group, schema.FRAMES), 0)[..., 0]


def test_frames_of_a_reader_whose_code_changed_are_decoded_again(tmp_path: Path, monkeypatch):
    own = OwnReader(tmp_path, monkeypatch)
    own.write("own_reader", "FACTOR = 1\n" + READER)
    assert own.convert().converted
    np.testing.assert_array_equal(own.frames(), frames_of(1))
    before = all_files(own.out)
    assert not own.convert().changed
    assert all_files(own.out) == before
    own.write("own_reader", "FACTOR = 2\n" + READER)
    assert own.convert().converted == ["A/frames/one"]
    np.testing.assert_array_equal(own.frames(), 2 * frames_of(1))
    # Other code that gives the same frames costs a decoding, and makes no distances stale.
    own.write("own_reader", "FACTOR = 2  # as before\n" + READER)
    assert not own.convert().changed


def test_what_a_reader_imports_is_compared_by_verifying_sources(tmp_path: Path, monkeypatch):
    own = OwnReader(tmp_path, monkeypatch)
    own.write("own_reader", "from own_helper import FACTOR\n" + READER)
    own.write("own_helper", "FACTOR = 1\n")
    own.convert()
    own.write("own_helper", "FACTOR = 2\n")
    assert not own.convert().changed, "the limit that docs/catalogs.md states"
    assert own.convert(verify_sources=True).converted == ["A/frames/one"]
    np.testing.assert_array_equal(own.frames(), 2 * frames_of(1))


def test_a_new_version_of_a_shipped_reader_decodes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pipeline.sources import readers

    runs = Runs(tmp_path, "stack")
    runs.convert()
    monkeypatch.setitem(readers.VERSIONS, "pipeline.sources.readers.stack", "next")
    decoded = []
    original = readers.stack.StackSequence.read
    monkeypatch.setattr(
        readers.stack.StackSequence, "read", lambda self: decoded.append(self.name) or original(self)
    )
    assert not runs.convert().changed
    assert sorted(decoded) == ["one", "two"]


def test_code_without_a_file_is_never_taken_for_the_same():
    from pipeline.sources.readers.code_hash import hash_code

    scope: dict[str, Any] = {"__name__": "notebook_cell"}
    exec("def read(entry, folder): return []", scope)
    with pytest.warns(UserWarning, match="module 'notebook_cell' has no file"):
        first = hash_code("reader 'raw'", [scope["read"]])
    with pytest.warns(UserWarning, match="has no file"):
        assert hash_code("reader 'raw'", [scope["read"]]) != first


def test_a_link_within_a_store_that_leads_elsewhere_is_seen(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "s.zarr" / name).mkdir(parents=True)
        (tmp_path / "s.zarr" / name / "zarr.json").write_text("{}")
    set_times(tmp_path)
    link = tmp_path / "s.zarr" / "latest"
    link.symlink_to("a")
    before = SourceFile.of(tmp_path / "s.zarr")
    assert SourceFile.of(tmp_path / "s.zarr") == before
    link.unlink()
    link.symlink_to("b")
    assert SourceFile.of(tmp_path / "s.zarr") != before
