"""Catalogs: what they accept, what they refuse and how they say it, and how data comes to this machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import resources
from pipeline.sources.catalog import Catalog, CatalogError, MissingDataError, list_catalogs, open_catalog
from pipeline.sources.fetch import fetch, locate, verify, where
from pipeline.sources.readers import list_sequences

ENTRY = "{name: A, source: {path: data}, reader: lsim}"


def write_catalog(folder: Path, datasets: str, more: str = "") -> Path:
    file = folder / "mine.yaml"
    file.write_text(f"name: mine\ndatasets:\n{datasets}\n{more}")
    return file


@pytest.mark.parametrize(
    ("datasets", "more", "expected"),
    [
        (
            "- {name: A, source: {path: d}, reader: lsim, filtr: [x]}",
            "",
            ["datasets[0] (A).filtr", "'filter'"],
        ),
        ("- {name: A, source: {path: d, fodler: x}, reader: lsim}", "", ["(A).source.fodler", "'folder'"]),
        (
            "- {name: A, source: {simulate: {recipe: burgers, families: 2, sise: 8}}, reader: lsim}",
            "",
            ["source.simulate.sise", "'size'"],
        ),
        (
            "- {name: A, source: {path: d}, reader: lsim, fields: {u: {chanel: 0}}}",
            "",
            ["fields.u.chanel", "'channel'"],
        ),
        (
            "- {name: A, source: {url: 'x/a'}, reader: lsim, checksum: {url: x, entry: y, algoritm: z}}",
            "",
            ["checksum.algoritm", "'algorithm'"],
        ),
        (f"- {ENTRY}", "titel: x", ["titel", "'title'"]),
        (f"- {ENTRY}", "pools: {All: [A, B]}", ["pools.All", "no dataset B"]),
        (f"- {ENTRY}\n- {ENTRY}", "", ["named twice: A"]),
        ("- {name: A, source: {path: d, url: u}, reader: lsim}", "", ["exactly one of url"]),
        ("- {name: A, source: {folder: d}, reader: lsim}", "", ["exactly one of url"]),
        ("- {name: A, source: {url: 'http://x/a.zip'}, reader: lsim}", "", ["needs a checksum"]),
        (
            "- {name: A, source: {url: 'http://x/a.zip'}, reader: lsim, checksum: 'md5:12'}",
            "",
            ["expected sha256:<64"],
        ),
        ("- {name: A/B, source: {path: d}, reader: lsim}", "", ["A/B"]),
        ("- {name: A, source: {path: d, folder: ../x}, reader: lsim}", "", ["leads out"]),
        ("- {name: A, source: {path: d}}", "", ["(A).reader: this key is missing"]),
        ("- {name: A, source: {path: d}, reader: lsim, role: tset}", "", ["(A).role"]),
    ],
)
def test_a_wrong_catalog_names_file_and_key(tmp_path: Path, datasets: str, more: str, expected: list[str]):
    file = write_catalog(tmp_path, datasets, more)
    with pytest.raises(CatalogError) as caught:
        open_catalog(file)
    assert len(str(caught.value).splitlines()) == 1
    for text in [str(file), *expected]:
        assert text in str(caught.value)


def test_names_and_paths(tmp_path: Path):
    assert {"demo", "lsim2d"} <= set(list_catalogs())
    assert open_catalog("demo").name == "demo"
    with pytest.raises(CatalogError, match=r"'demmo'; did you mean 'demo'\? known: .*lsim2d"):
        open_catalog("demmo")
    with pytest.raises(CatalogError, match="no such file"):
        open_catalog(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(CatalogError, match="expected a mapping"):
        open_catalog(tmp_path / "list.yaml")


def test_shipped_files_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "site-packages" / "pipeline"
    (package / "_shipped" / "catalogs").mkdir(parents=True)
    (package / "_shipped" / "catalogs" / "other.yaml").write_text("")
    (tmp_path / "site-packages" / "catalogs").mkdir()
    monkeypatch.setattr(resources, "__file__", str(package / "resources.py"))
    assert resources.shipped_names("catalogs") == ["other"]


def test_selecting_datasets_and_pools():
    catalog = open_catalog("lsim2d")
    assert [e.name for e in catalog.select(["All"])] == ["AdvD", "LiqN", "Sha", "Vid"]
    assert [e.name for e in catalog.select(["TID", "Smo"])] == ["Smo", "TID"]
    with pytest.raises(CatalogError, match=r"no dataset 'Smoe'.*did you mean 'Smo'"):
        catalog.select(["Smoe"])


PUBLISHED = {
    "Smo": (
        "Smoke",
        ["plume1", "plume2", "plume11", "plume12"],
        ["plume3", "plume10", "plume21", "plume111"],
    ),
    "Liq": ("Liquid", ["drop1", "drop3", "drop21", "drop23"], ["drop4", "drop11", "drop24", "drop210"]),
    "Adv": ("AdvDiff", ["advDiff1", "advDiff10"], ["advDiff11", "advDiff100"]),
    "Bur": ("BurgersEq", ["burgersEq1", "burgersEq12"], ["burgersEq13", "burgersEq21"]),
    "AdvD": ("AdvDiffDensity", ["advDiff2", "advDiff9"], ["advDiff12", "advDiff20"]),
    "LiqN": ("LiquidNoise", ["drop1", "anything"], []),
    "Sha": ("Shapes", ["circles", "anything"], []),
    "Vid": ("Video", ["scene1", "scene10"], ["scene2", "scene21"]),
    "TID": ("TID2013", ["tid01", "tid08"], ["tid1", "tid24"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_filters_select_the_published_folders(tmp_path: Path, name: str):
    catalog = open_catalog("lsim2d")
    folder, chosen, others = PUBLISHED[name]
    (entry,) = catalog.select([name])
    for sequence in chosen + others:
        (tmp_path / "Data" / folder / f"{sequence}.vel").mkdir(parents=True)
    found = list_sequences(entry, where(catalog, entry, tmp_path))
    assert {s.name for s in found} == {f"{sequence}.vel" for sequence in chosen}
    assert entry.role == ("validation" if name in ("Smo", "Liq", "Adv", "Bur") else "test")


def test_absent_data_says_what_to_download(tmp_path: Path):
    catalog = open_catalog("lsim2d")
    with pytest.raises(MissingDataError) as caught:
        where(catalog, catalog.datasets[0], tmp_path)
    for text in (
        "10.14459/2020mp1552055",
        "https://dataserv.ub.tum.de/",
        "3.9 GB",
        "lsim catalog fetch lsim2d",
        str(tmp_path),
        "LSIM_DATA",
    ):
        assert text in str(caught.value)
    results = verify(catalog, data_dir=tmp_path)
    assert len(results) == 9
    assert not any(result.present or result.ok for result in results)


def test_data_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LSIM_DATA", str(tmp_path))
    (tmp_path / "Data" / "Smoke").mkdir(parents=True)
    catalog = open_catalog("lsim2d")
    assert where(catalog, catalog.datasets[0]) == tmp_path / "Data" / "Smoke"


def test_path_sources_start_at_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    catalog = open_catalog(write_catalog(tmp_path, f"- {ENTRY}"))
    monkeypatch.chdir("/")
    with pytest.raises(MissingDataError, match="nothing at"):
        where(catalog, catalog.datasets[0])
    (tmp_path / "data").mkdir()
    assert where(catalog, catalog.datasets[0]) == tmp_path / "data"
    assert [f.action for f in fetch(catalog)] == ["present"]


# -- downloads, from a real server on loopback -------------------------------------------------------------


class Server:
    """Serves a folder and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        folder.mkdir()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(handler, *_: object) -> None:  # noqa: N805
                self.requests.append(handler.path)

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "served")
    yield running
    running.close()


def serve_archive(server: Server, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(server.folder / "sets.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    digest = hashlib.sha512((server.folder / "sets.zip").read_bytes()).hexdigest()
    (server.folder / "checksums.sha512").write_text(f"{'0' * 128}  other.zip\n{digest}  ./sets.zip\n")


def two_sets(tmp_path: Path, server: Server, checksum: str | None = None) -> Catalog:
    checksum = checksum or f"{{url: '{server.url}/checksums.sha512', entry: sets.zip}}"
    return open_catalog(
        write_catalog(
            tmp_path,
            "".join(
                f"- name: {name}\n  source: {{url: '{server.url}/sets.zip', folder: Data/{name}}}\n"
                f"  checksum: {checksum}\n  reader: lsim\n"
                for name in ("A", "B")
            ),
        )
    )


@pytest.mark.smoke
@pytest.mark.parametrize("top", ["", "sets-v1/"])
def test_two_sets_share_one_checked_download(tmp_path: Path, server: Server, top: str):
    serve_archive(server, {f"{top}Data/A/s/f00.png": b"a", f"{top}Data/B/s/f00.png": b"b"})
    catalog, data = two_sets(tmp_path, server), tmp_path / "data"
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["downloaded", "present"]
    assert [r.split("?")[0] for r in server.requests].count("/sets.zip") == 1
    assert (where(catalog, catalog.datasets[1], data) / "s" / "f00.png").read_bytes() == b"b"
    assert [v.checksum for v in verify(catalog, data_dir=data)] == ["ok", "ok"]
    before = len(server.requests)
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["present", "present"]
    assert len(server.requests) == before

    archive = data / "downloads" / "sets.zip"
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    result = verify(catalog, ["A"], data)[0]
    assert result.checksum == "differs"
    assert not result.ok
    assert "expected" in result.detail
    assert "found" in result.detail


def sha256(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def one_set(tmp_path: Path, server: Server, name: str, folder: str = "") -> Catalog:
    return open_catalog(
        write_catalog(
            tmp_path,
            f"- name: A\n  source: {{url: '{server.url}/get?{name}', file: {name}, folder: '{folder}'}}\n"
            f"  checksum: {sha256(server.folder / 'get')}\n  reader: lsim\n",
        )
    )


def test_tar_archives_and_single_files(tmp_path: Path, server: Server):
    (tmp_path / "f00.png").write_bytes(b"a")
    with tarfile.open(server.folder / "get", "w:gz") as archive:
        archive.add(tmp_path / "f00.png", "Data/A/s/f00.png")
    catalog = one_set(tmp_path, server, "sets.tar.gz", "Data/A")
    fetch(catalog, data_dir=tmp_path / "tar")
    assert (where(catalog, catalog.datasets[0], tmp_path / "tar") / "s" / "f00.png").read_bytes() == b"a"
    assert (tmp_path / "tar" / "sets").is_dir()

    (server.folder / "get").write_bytes(b"a file")
    catalog = one_set(tmp_path, server, "run.nc")
    fetch(catalog, data_dir=tmp_path / "file")
    assert (where(catalog, catalog.datasets[0], tmp_path / "file") / "run.nc").read_bytes() == b"a file"


def test_a_tar_archive_cannot_write_outside_its_folder(tmp_path: Path, server: Server):
    with tarfile.open(server.folder / "get", "w") as archive:
        link = tarfile.TarInfo("Data")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
    with pytest.raises(CatalogError, match="Data"):
        fetch(one_set(tmp_path, server, "sets.tar", "Data"), data_dir=tmp_path / "data")


def test_a_download_with_another_checksum_is_refused(tmp_path: Path, server: Server):
    serve_archive(server, {"Data/A/s/f00.png": b"a"})
    catalog = two_sets(tmp_path, server, f"'sha256:{'1' * 64}'")
    with pytest.raises(CatalogError, match=r"dataset A: http.*hash"):
        fetch(catalog, ["A"], data_dir=tmp_path / "data")
    assert locate(catalog, catalog.datasets[0], tmp_path / "data") is None


def test_a_checksum_file_without_the_entry_is_refused(tmp_path: Path, server: Server):
    serve_archive(server, {"Data/A/s/f00.png": b"a"})
    (server.folder / "checksums.sha512").write_text(f"{'0' * 128}  other.zip\n")
    with pytest.raises(CatalogError, match=r"no line for 'sets.zip'"):
        fetch(two_sets(tmp_path, server), ["A"], data_dir=tmp_path / "data")


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, server: Server):
    serve_archive(server, {"Data/A/s/f00.png": b"a", "../../escaped": b"x"})
    with pytest.raises(CatalogError, match="outside"):
        fetch(two_sets(tmp_path, server), ["A"], data_dir=tmp_path / "data")
    assert not list(tmp_path.rglob("escaped"))
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["downloads"]


def test_an_archive_without_the_folder_is_an_error(tmp_path: Path, server: Server):
    serve_archive(server, {"Data/A/s/f00.png": b"a"})
    with pytest.raises(CatalogError, match=r"no folder 'Data/B' in sets.zip"):
        fetch(two_sets(tmp_path, server), data_dir=tmp_path / "data")


# -- simulations -------------------------------------------------------------------------------------------


def simulated(tmp_path: Path, families: int, seed: int = 3) -> Catalog:
    return open_catalog(
        write_catalog(
            tmp_path,
            "- name: S\n  source: {simulate: {recipe: shapes, "
            f"families: {families}, size: 32, seed: {seed}}}}}\n  reader: lsim",
        )
    )


def test_simulated_sets_are_made_once_and_again_when_the_entry_changes(tmp_path: Path):
    catalog, data = simulated(tmp_path, 2), tmp_path / "data"
    with pytest.raises(MissingDataError, match="lsim catalog fetch"):
        where(catalog, catalog.datasets[0], data)
    lines: list[str] = []
    assert [f.action for f in fetch(catalog, data_dir=data, report=lines.append)] == ["simulated"]
    assert "2 families" in lines[0]
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["present"]
    sequences = list_sequences(catalog.datasets[0], where(catalog, catalog.datasets[0], data))
    assert len(sequences) == 2
    frames, parameter = sequences[0].read()
    assert frames.shape[:3] == (11, 32, 32)
    np.testing.assert_allclose(parameter, np.linspace(0, 1, 11), rtol=1e-15)

    fewer = simulated(tmp_path, 1)
    assert [f.action for f in fetch(fewer, data_dir=data)] == ["simulated"]
    assert len(list_sequences(fewer.datasets[0], where(fewer, fewer.datasets[0], data))) == 1


def test_an_interrupted_simulation_does_not_count_as_there(tmp_path: Path):
    catalog, data = simulated(tmp_path, 1), tmp_path / "data"
    fetch(catalog, data_dir=data)
    (note,) = where(catalog, catalog.datasets[0], data).glob(".*.json")
    assert json.loads(note.read_text())["families"] == 1
    note.unlink()
    assert locate(catalog, catalog.datasets[0], data) is None
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["simulated"]


def test_a_simulation_that_goes_on_with_other_settings_keeps_no_family_of_before(tmp_path: Path):
    data = tmp_path / "data"
    folder = data / "mine" / "S"

    def interrupted(families: int, seed: int) -> None:
        """Made up to a family that cannot be written, as batches of four come."""
        stranger = folder / f"shapes{families}.density"
        stranger.mkdir(parents=True)
        with pytest.raises(FileExistsError, match=stranger.name):
            fetch(simulated(tmp_path, families, seed), data_dir=data)
        stranger.rmdir()

    def made() -> dict[str, int]:
        records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/family.json")}
        return {name: record["settings"]["seed"] for name, record in records.items()}

    def note() -> dict[str, Any]:
        return json.loads((folder / ".made-from.json").read_text())

    interrupted(5, seed=3)
    assert made() == {f"shapes{number}.density": 3 for number in range(1, 5)}
    assert (note()["seed"], note()["complete"]) == (3, False)
    before = (folder / "shapes1.density" / "family.json").stat()

    catalog = simulated(tmp_path, 2)
    assert locate(catalog, catalog.datasets[0], data) is None
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["simulated"]
    assert made() == {"shapes1.density": 3, "shapes2.density": 3}
    assert (folder / "shapes1.density" / "family.json").stat().st_mtime_ns == before.st_mtime_ns
    assert "complete" not in note()

    # Of a whole set, too, nothing is left once another one is begun, and it is no longer there.
    interrupted(3, seed=4)
    assert locate(catalog, catalog.datasets[0], data) is None
    assert made() == {"shapes1.density": 4, "shapes2.density": 4}
    catalog = simulated(tmp_path, 1, seed=4)
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["simulated"]
    assert made() == {"shapes1.density": 4}
    assert [f.action for f in fetch(catalog, data_dir=data)] == ["present"]


def test_the_demo_is_32_sequences_at_256():
    catalog = open_catalog("demo")
    simulations = [entry.source.simulate for entry in catalog.datasets]
    assert sum(s.families for s in simulations if s) == 32
    assert {s.size for s in simulations if s} == {256}
