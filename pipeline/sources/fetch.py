"""Find the data of a catalog on this machine; download, copy or simulate what is missing, and check it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from pipeline.sources.catalog import (
    CONTAINERS,
    DOWNLOADS,
    Catalog,
    CatalogError,
    ChecksumFile,
    Dataset,
    MissingDataError,
    Simulation,
    Source,
    list_catalogs,
    stem_of_download,
)
from pipeline.sources.remote_copy import bring, find_copy
from pipeline.sources.unpack import UnpackError, unpack
from pipeline.storage import limits
from pipeline.storage.address import absolute, is_address, join

_MADE_FROM = ".made-from.json"
_UNPACKED_FROM = ".unpacked-from.json"
_CHECKSUMS_BYTES = 2**24


def data_root(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloads and simulations: ``data_dir``, ``$LSIM_DATA`` or the user's cache."""
    folder = data_dir or os.environ.get("LSIM_DATA")
    if folder:
        return Path(folder).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("lsim")) / "data"


def locate(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Find the local folder (or file) of a data set; None where it isn't on this machine.

    A download is looked for where :func:`fetch` unpacks it, with or without one folder at the archive's
    top, and directly under the data root, where a user may have unpacked it by hand.
    """
    source = entry.source
    root = data_root(data_dir)
    if (address := _address(source)) is not None:
        return find_copy(address, root / catalog.name / entry.name)
    if source.path is not None:
        path = _path(catalog, source)
        return path.resolve() if path.exists() else None
    if source.simulate is not None:
        folder = root / catalog.name / entry.name
        note = _read_note(folder / _MADE_FROM) or {}
        settings = {key: value for key, value in note.items() if key != "version"}
        return folder if settings == source.simulate.model_dump() else None
    unpacked = _unpacked_folder(root, source)
    tops = sorted(unpacked.iterdir()) if unpacked.is_dir() else []
    for top in [unpacked, *tops, root]:
        # Without a named folder, the data root itself would pass for any data set.
        folder = top / source.folder if source.folder else top
        if folder.exists() and (source.folder or top == unpacked):
            return folder
    # The data root may be the folder of the archive's folders itself.
    beside = root / PurePosixPath(source.folder).name
    return beside if source.folder and beside.exists() else None


def where(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Find the local folder (or file) of a data set, or raise an error that says how to get it.

    Raises
    ------
    MissingDataError
        When it isn't on this machine; the message says what to download, how large it is, and the command.
    """
    folder = locate(catalog, entry, data_dir)
    if folder is None:
        raise MissingDataError(how_to_get(catalog, entry, data_dir))
    return folder


def how_to_get(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> str:
    """Explain how to get the data of a missing data set."""
    source = entry.source
    label = f"dataset {entry.name} of catalog {catalog.name}"
    command = f"lsim catalog fetch {_handle(catalog)}"
    root = data_root(data_dir)
    if (address := _address(source)) is not None:
        return (
            f"{label} lies at {address}, and there is no complete copy under {root}; make it with: {command}"
        )
    if source.path is not None:
        return f"{label}: nothing at {_path(catalog, source)} ({catalog.file})"
    if source.simulate is not None:
        return f"{label} has not been simulated under {root}; make it with: {command}"
    size = f" ({source.size})" if source.size else ""
    doi = f"DOI {catalog.doi}, " if catalog.doi else ""
    return (
        f"{label} is not under {root}. It is part of {source.download_name}{size}, {doi}{source.url}. "
        f"Download it with: {command} – or unpack it by hand so that {root / source.folder} exists; "
        "LSIM_DATA names another data folder."
    )


def _address(source: Source) -> str | None:
    """Return the address of a source in an object store; None for any other source."""
    location = absolute(source.path) if source.path is not None and "://" in source.path else ""
    return join(location, *filter(None, [source.folder])) if is_address(location) else None


def _path(catalog: Catalog, source: Source) -> Path:
    """Return the path of a source on this machine, which may be written as ``file://``."""
    text = source.path or ""
    path = Path(absolute(text)) if "://" in text else Path(text).expanduser()
    return catalog.file.parent / path / source.folder


@dataclass(frozen=True)
class Fetched:
    """Action of :func:`fetch` for one data set, and the data set's folder."""

    dataset: str
    folder: Path
    action: Literal["present", "downloaded", "simulated"]


def fetch(
    catalog: Catalog,
    dataset_names: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Fetched]:
    """Bring data sets to this machine: download and unpack, copy or simulate those that are missing.

    Parameters
    ----------
    catalog : Catalog
    dataset_names : iterable of str, optional
        Data sets or pools; all by default.
    data_dir : path, optional
        The data root, see :func:`data_root`.
    report : callable, optional
        Called with a line on each slow step before it begins.

    Raises
    ------
    CatalogError
        When a checksum differs (the download is removed), an archive would write outside its folder or
        doesn't hold the folder that the catalog names, or a ``path`` isn't there.
    """
    say = report or (lambda line: None)
    results = []
    for entry in catalog.select(dataset_names):
        source = entry.source
        action: Literal["present", "downloaded", "simulated"] = "present"
        if source.simulate is not None:
            folder = data_root(data_dir) / catalog.name / entry.name
            version = _recipe_version(catalog, entry)
            if (
                locate(catalog, entry, data_dir) is None
                or _read_note(folder / _MADE_FROM)["version"] != version
            ):
                say(
                    f"{entry.name}: simulating {source.simulate.families} families ({source.simulate.recipe})"
                )
                _simulate(source.simulate, folder, version)
                action = "simulated"
        elif (address := _address(source)) is not None:
            if locate(catalog, entry, data_dir) is None:
                say(f"{entry.name}: copying {address}")
            if bring(address, data_root(data_dir) / catalog.name / entry.name):
                action = "downloaded"
        elif locate(catalog, entry, data_dir) is None and source.url is not None:
            size = f" ({source.size})" if source.size else ""
            say(f"{entry.name}: downloading {source.download_name}{size}")
            _download(entry, data_root(data_dir))
            action = "downloaded"
            if locate(catalog, entry, data_dir) is None:
                raise CatalogError(
                    f"{catalog.file}: dataset {entry.name}: no folder {source.folder!r} "
                    f"in {source.download_name}"
                )
        results.append(Fetched(entry.name, where(catalog, entry, data_dir), action))
    return results


@dataclass(frozen=True)
class Verified:
    """Result of :func:`verify` for one data set.

    Attributes
    ----------
    dataset : str
    present : bool
    checksum : str
        "ok", "differs", or "unchecked" where there is nothing to compare: data that isn't a download, or a
        download unpacked by hand.
    detail : str
    """

    dataset: str
    present: bool
    checksum: Literal["ok", "differs", "unchecked"]
    detail: str

    @property
    def ok(self) -> bool:
        """True where the data is present and no checksum differs."""
        return self.present and self.checksum != "differs"


def verify(
    catalog: Catalog,
    dataset_names: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Verified]:
    """Check which data sets are present, and compare downloads with their checksums again.

    Nothing is downloaded: a checksum that the catalog names by its file was recorded with the download.
    """
    root = data_root(data_dir)
    hash_download = functools.cache(_hash_file)  # data sets may share a download
    results = []
    for entry in catalog.select(dataset_names):
        folder = locate(catalog, entry, data_dir)
        checksum: Literal["ok", "differs", "unchecked"] = "unchecked"
        detail = str(folder) if folder is not None else how_to_get(catalog, entry, data_dir)
        archive = root / DOWNLOADS / entry.source.download_name
        recorded_checksum = None
        if entry.source.url is not None and archive.is_file():
            recorded_checksum = _expected_checksum(entry, root, download=False)
        if recorded_checksum is not None:
            algorithm, digest = recorded_checksum.split(":")
            own_digest = hash_download(archive, algorithm)
            checksum = "ok" if own_digest == digest.lower() else "differs"
            if checksum == "differs":
                detail = f"{archive}: {algorithm} expected {digest}, found {own_digest}"
        results.append(Verified(entry.name, folder is not None, checksum, detail))
    return results


def _hash_file(file: Path, algorithm: str) -> str:
    """Hash a file by an algorithm of hashlib."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


# -- fetching ------------------------------------------------------------------------------------------


def _download(entry: Dataset, root: Path) -> None:
    """Download and unpack the source of a data set."""
    source = entry.source
    checksum = _expected_checksum(entry, root, download=True)
    size = limits.DOWNLOAD_BYTES if source.size is None else limits.parse_size(source.size)
    archive = _retrieve(
        f"dataset {entry.name}",
        source.url or "",
        root / DOWNLOADS / source.download_name,
        checksum,
        int(size * limits.DOWNLOAD_SLACK),
    )
    target = _unpacked_folder(root, source)
    if target.exists() and not (target / _UNPACKED_FROM).is_file():
        raise CatalogError(
            f"dataset {entry.name}: {target} exists, and was not unpacked from a download; move it away"
        )
    # Unpack beside the target and rename, so that a folder under the final name is complete.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        if source.download_name.endswith(CONTAINERS):
            limit = None if source.unpacked is None else limits.parse_size(source.unpacked)
            unpack(archive, partial, most_bytes=limit, most_members=source.members)
        else:
            shutil.copy2(archive, partial / source.download_name)
        (partial / _UNPACKED_FROM).write_text(json.dumps({"url": source.url, "checksum": checksum}))
        if target.exists():
            shutil.rmtree(target)
        partial.chmod(0o755)
        partial.rename(target)
    except UnpackError as error:
        raise CatalogError(f"dataset {entry.name}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _retrieve(label: str, url: str, path: Path, checksum: str | None, limit: int) -> Path:
    """Download at most ``limit`` bytes to ``path``, unless it has that checksum already."""
    import pooch

    def download(url: str, output_file: str, _: Any) -> None:
        with open(output_file, "wb") as file:
            pooch.downloaders.choose_downloader(url)(url, _Counted(file, limit), None)

    try:
        return Path(
            pooch.retrieve(
                url=url, known_hash=checksum, fname=path.name, path=path.parent, downloader=download
            )
        )
    except ValueError as error:  # a differing checksum, or too many bytes: pooch has removed the file
        raise CatalogError(f"{label}: {url}: {error}") from error


class _Counted:
    """A file that refuses to grow beyond ``most`` bytes, whatever size a server states."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit, self._nbytes = file, limit, 0

    def write(self, data: bytes) -> int:
        self._nbytes += len(data)
        if self._nbytes > self._limit:
            raise CatalogError(
                f"more than {limits.readable(self._limit)} were sent; if this is right, state the size in "
                "the catalog"
            )
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _unpacked_folder(root: Path, source: Source) -> Path:
    return root / stem_of_download(source.download_name)


def _expected_checksum(entry: Dataset, root: Path, *, download: bool) -> str | None:
    """Return ``<algorithm>:<hex>`` of the entry's download; None where that takes a download."""
    checksum = entry.checksum
    if not isinstance(checksum, ChecksumFile):
        return checksum
    file = root / DOWNLOADS / f"{entry.source.download_name}.{checksum.algorithm}"
    if download:
        # The list is on the publisher's server, beside the data: it guards against damage in transit, not
        # against a publisher who changes both.
        file.unlink(missing_ok=True)
        _retrieve(f"dataset {entry.name}", checksum.url, file, None, _CHECKSUMS_BYTES)
    elif not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.strip().partition(" ")
        if PurePosixPath(name.strip().lstrip("*")).name == checksum.entry:
            return f"{checksum.algorithm}:{digest.lower()}"
    raise CatalogError(f"dataset {entry.name}: {checksum.url} has no line for {checksum.entry!r}")


def _recipe_version(catalog: Catalog, entry: Dataset) -> int:
    """Look up the version of a data set's recipe, which is raised when a seed gives other frames."""
    from lsim.simulate import UnknownRecipeError, find_recipe

    assert entry.source.simulate is not None
    try:
        return find_recipe(entry.source.simulate.recipe).version
    except UnknownRecipeError as error:
        raise CatalogError(f"{catalog.file}: dataset {entry.name}: {error}") from error


def _simulate(simulation: Simulation, folder: Path, version: int) -> None:
    """Simulate the missing families, and remove those that were made with other settings."""
    from lsim.simulate import family_folders, missing_families, write_families
    from lsim.simulate.layout import read_record

    recipe, families, size = simulation.recipe, simulation.families, simulation.size
    made_from = simulation.model_dump() | {"version": version}
    folder.mkdir(parents=True, exist_ok=True)
    # First of all: after an interruption, an earlier note must not describe this folder.
    _write_note(folder / _MADE_FROM, made_from | {"complete": False})
    missing = missing_families(folder, recipe, families, size, simulation.seed, simulation.format)
    present = set(range(1, families + 1)) - set(missing)
    valid = {path for number in present for path in family_folders(folder, recipe, number)}
    for path in folder.iterdir():
        if path not in valid and read_record(path) is not None:  # it would be among the new ones
            shutil.rmtree(path)
    write_families(folder, recipe, families, size, simulation.seed, simulation.format)
    _write_note(folder / _MADE_FROM, made_from)


def _read_note(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a note in one step, so that it is never half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(note))
    partial.replace(path)


def _handle(catalog: Catalog) -> str:
    """Return what a user types for this catalog: its name if it is shipped, else its path."""
    return catalog.name if catalog.name in list_catalogs() else str(catalog.file)
