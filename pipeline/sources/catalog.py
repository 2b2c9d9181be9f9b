"""What data exists and where it comes from: YAML catalogs, and the download with its checksum.

A catalog is a YAML file::

    name: lsim2d
    title: …
    citation: …
    doi: 10.14459/2020mp1552055
    licence: …
    datasets:
      - name: Smo
        title: Smoke plumes
        source: {url: "https://…", file: LSIM_2D_Data.zip, folder: Data/Smoke, size: 3.9 GB}
        checksum: {url: "https://…/checksums.sha512", entry: LSIM_2D_Data.zip}
        reader: lsim
        options: {field: rgb}
        filter: ["plume1.", "plume2."]
        fields: [density, pressure]
        role: validation
    pools:
      All: [AdvD, LiqN]

A ``source`` is exactly one of

``url``
    A download with a checksum, unpacked where it is a zip or tar archive. ``file`` names the download
    where the address doesn't end in its name, ``folder`` the part of the archive that is meant. ``size``
    (``3.9 GB``) is said before anything is downloaded, and no more is. ``unpacked`` (a size) and ``members``
    (a number) are the most that the archive may hold; by default a multiple of its own size, and a million
    files, see :mod:`pipeline.storage.limits`. Data sets with the same ``url`` share one download.
``path``
    A folder or file on this machine; relative paths start at the catalog's own folder. Or the address of a
    folder or file in an object store (``s3://``, ``gs://``), which ``lsim catalog fetch`` copies to this
    machine, and later what has changed there.
``simulate``
    Families made on the spot: ``{recipe, families, size, seed, format}``, see :mod:`lsim.simulate`.

Downloads and simulations lie under the *data root*: ``data_dir`` where it is given, else ``$LSIM_DATA``,
else the user's cache. ``filter`` lists substrings of a sequence's name, dots included; a sequence is taken
when any of them occurs in it, and an empty filter takes all. ``fields`` selects fields of a source by name,
or makes new ones of some channels: ``{velocity-x: {source: velocity, channel: 0}}``; metrics take frames of
one, three or four channels. ``missing: keep`` converts frames with NaN or infinity as they are, for metrics
that leave out missing pixels; by default (``quarantine``) their sequences are left out.
``largest_sequence: 40 GB`` is the most that one decoded sequence may take, 16 GiB where nothing is stated.
Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal, TypeAlias, TypeVar, get_args
from urllib.parse import urlparse

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.resources import ResourceError, find_resource, shipped_names
from pipeline.sources.remote_copy import bring, brought
from pipeline.sources.unpack import UnpackError, unpack
from pipeline.storage import limits
from pipeline.storage.address import absolute, is_address, join
from pipeline.storage.safe_names import group_fault, printable, shown

Missing: TypeAlias = Literal["quarantine", "keep"]
"""What becomes of sequences that hold NaN or infinity."""

_MADE_FROM = ".made-from.json"
_UNPACKED_FROM = ".unpacked-from.json"
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_DOWNLOADS = "downloads"
_CHECKSUMS_BYTES = 2**24


class CatalogError(ValueError):
    """A catalog that cannot be used as it is; the message names the file and the key."""


class MissingDataError(CatalogError):
    """Data that a catalog describes but that is not on this machine; the message says how to get it."""


def _checked_size(text: str) -> str:
    limits.parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]
"""Bytes as people write them: ``3.9 GB``."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChecksumFile(_Strict):
    """A checksum published as a line of a file: the address of that file, and the name in the line."""

    url: str
    entry: str
    algorithm: Literal["sha512", "sha256"] = "sha512"


class Simulation(_Strict):
    """Arguments of :func:`lsim.simulate.write_families`."""

    recipe: str
    families: int = Field(gt=0)
    size: int = Field(256, gt=0)
    seed: int = 0
    format: Literal["png", "npz"] = "png"


class Source(_Strict):
    """Where a data set comes from; exactly one of ``url``, ``path`` and ``simulate`` is set."""

    url: str | None = None
    path: str | None = None
    simulate: Simulation | None = None
    folder: str = ""
    file: str | None = None
    size: Size | None = None
    unpacked: Size | None = None
    members: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [key for key in ("url", "path", "simulate") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of url, path, simulate; found {given or 'none'}")
        if self.url is None and (self.file or self.size or self.unpacked or self.members):
            raise ValueError("file, size, unpacked and members belong to a url")
        if self.url is not None:
            _check_download_name(self.download_name)
        inside = PurePosixPath(self.folder)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"folder {self.folder!r} leads out of the source")
        return self

    @property
    def download_name(self) -> str:
        """File name of the download."""
        return self.file or PurePosixPath(urlparse(self.url or "").path).name


class FieldChoice(_Strict):
    """Some channels of a source's field, as a field of their own."""

    source: str | None = None
    channel: int | list[int] | None = None


class Dataset(_Strict):
    """One data set of a catalog."""

    name: str
    title: str = ""
    source: Source
    reader: str
    options: dict[str, Any] = {}
    filter: list[str] = []
    fields: list[str] | dict[str, FieldChoice] = []
    missing: Missing = "quarantine"
    largest_sequence: Size | None = None
    role: Literal["train", "validation", "test"] = "test"
    licence: str | None = None
    citation: str | None = None
    checksum: str | ChecksumFile | None = None

    @field_validator("name")
    @classmethod
    def _name_is_a_group(cls, name: str) -> str:
        return _group_name(name)

    @field_validator("fields")
    @classmethod
    def _fields_are_groups(cls, fields: list[str] | dict[str, FieldChoice]) -> Any:
        for name in fields:
            _group_name(name)
        return fields

    @field_validator("checksum")
    @classmethod
    def _checksum_is_known(cls, checksum: str | ChecksumFile | None) -> str | ChecksumFile | None:
        if isinstance(checksum, str) and not re.fullmatch(
            r"sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128}", checksum
        ):
            raise ValueError(
                f"{checksum!r}: expected sha256:<64 hex digits>, sha512:<128 hex digits>, or {{url, entry}} "
                "of a checksum file"
            )
        return checksum

    @model_validator(mode="after")
    def _downloads_are_checked(self) -> Dataset:
        if self.source.url is not None and self.checksum is None:
            raise ValueError("a source with a url needs a checksum")
        return self

    @property
    def sequence_bytes(self) -> int:
        """The most that one decoded sequence may take."""
        stated = self.largest_sequence
        return limits.SEQUENCE_BYTES if stated is None else limits.parse_size(stated)

    def selects(self, name: str) -> bool:
        """Whether the filter takes a sequence of this name."""
        return not self.filter or any(part in name for part in self.filter)


class Catalog(_Strict):
    """A catalog file, checked. Open one with :func:`open_catalog`."""

    name: str
    title: str = ""
    citation: str | None = None
    doi: str | None = None
    licence: str | None = None
    datasets: list[Dataset]
    pools: dict[str, list[str]] = {}
    _file: Path = PrivateAttr(default=Path("catalog.yaml"))

    @model_validator(mode="after")
    def _names_agree(self) -> Catalog:
        if _group_name(self.name) == _DOWNLOADS:
            raise ValueError(f"name {_DOWNLOADS!r}: the folder of downloads is called so")
        names = [entry.name for entry in self.datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"datasets named twice: {', '.join(twice)}")
        spelling: dict[str, str] = {}
        for name in names:
            other = spelling.setdefault(name.casefold(), name)
            if other != name:
                raise ValueError(
                    f"datasets {other!r} and {name!r} differ in case alone; where names of files don't count "
                    "case they would be one group"
                )
        for pool, members in self.pools.items():
            unknown = [member for member in members if member not in names]
            if unknown:
                raise ValueError(f"pools.{pool}: no dataset {', '.join(unknown)}; known: {', '.join(names)}")
            if pool in names:
                raise ValueError(f"pools.{pool}: a dataset has this name too")
        return self

    @property
    def file(self) -> Path:
        """The YAML file that this catalog was read from."""
        return self._file

    def select(self, names: Iterable[str] | None = None) -> list[Dataset]:
        """The data sets of these names, in the catalog's order; a pool stands for its members.

        Raises
        ------
        CatalogError
            For a name that is neither a data set nor a pool.
        """
        if names is None:
            return list(self.datasets)
        known = [entry.name for entry in self.datasets]
        wanted: set[str] = set()
        for name in names:
            if name not in known and name not in self.pools:
                raise CatalogError(
                    f"{self.file}: no dataset {name!r}{_did_you_mean(name, known)}; known: {', '.join(known)}"
                )
            wanted.update(self.pools.get(name, [name]))
        return [entry for entry in self.datasets if entry.name in wanted]


def list_catalogs() -> list[str]:
    """Names of the shipped catalogs."""
    return shipped_names("catalogs")


def open_catalog(name_or_path: str | os.PathLike[str]) -> Catalog:
    """Read a catalog by name, among the shipped ones, or by path.

    Raises
    ------
    CatalogError
        When there is none, or it isn't valid; the message names the file and the key.
    """
    try:
        file = find_resource("catalogs", name_or_path)
    except ResourceError as error:
        raise CatalogError(str(error)) from error
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise CatalogError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise CatalogError(
            f"{file}: expected a mapping with name and datasets, found {type(document).__name__}"
        )
    try:
        catalog = Catalog.model_validate(document)
    except ValidationError as error:
        raise CatalogError(_explain(str(file), error, document)) from error
    catalog._file = file
    return catalog


Options = TypeVar("Options", bound=BaseModel)


def reader_options(model: type[Options], entry: Dataset) -> Options:
    """The entry's ``options`` as ``model``; :class:`CatalogError` names the data set and the key."""
    try:
        return model.model_validate(entry.options)
    except ValidationError as error:
        where = f"dataset {entry.name}, options of reader {entry.reader!r}"
        raise CatalogError(_explain(where, error, entry.options, model)) from error


def data_root(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of downloads and simulations: ``data_dir``, ``$LSIM_DATA`` or the user's cache."""
    chosen = data_dir or os.environ.get("LSIM_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("lsim")) / "data"


def locate(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The local folder (or file) of a data set, or None where it isn't on this machine.

    A download is looked for as unpacked by :func:`fetch`, with or without one folder at the archive's
    top, and directly under the data root, where one unpacked by hand may lie.
    """
    source = entry.source
    root = data_root(data_dir)
    if (address := _address(source)) is not None:
        return brought(address, root / catalog.name / entry.name)
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
        # With no folder named, the root itself would pass for any data set.
        found = top / source.folder if source.folder else top
        if found.exists() and (source.folder or top == unpacked):
            return found
    # The data root may be the folder that the archive's folders lie in.
    beside = root / PurePosixPath(source.folder).name
    return beside if source.folder and beside.exists() else None


def where(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local folder (or file) of a data set.

    Raises
    ------
    MissingDataError
        When it isn't on this machine; the message says what to download, how large it is, and the command.
    """
    found = locate(catalog, entry, data_dir)
    if found is None:
        raise MissingDataError(how_to_get(catalog, entry, data_dir))
    return found


def how_to_get(catalog: Catalog, entry: Dataset, data_dir: str | os.PathLike[str] | None = None) -> str:
    """What to do for data that isn't there, in plain words."""
    source = entry.source
    label = f"dataset {entry.name} of catalog {catalog.name}"
    command = f"lsim catalog fetch {_handle(catalog)}"
    root = data_root(data_dir)
    if (address := _address(source)) is not None:
        return f"{label} lies at {address}, and there is no whole copy under {root}; make it with: {command}"
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
    """The address of a source in an object store; None for any other."""
    location = absolute(source.path) if source.path is not None and "://" in source.path else ""
    return join(location, *filter(None, [source.folder])) if is_address(location) else None


def _path(catalog: Catalog, source: Source) -> Path:
    """Where a source on this machine is; ``file://`` is a way to write a path."""
    text = source.path or ""
    path = Path(absolute(text)) if "://" in text else Path(text).expanduser()
    return catalog.file.parent / path / source.folder


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch` did for one data set."""

    dataset: str
    folder: Path
    action: Literal["present", "downloaded", "simulated"]


def fetch(
    catalog: Catalog,
    dataset_names: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Fetched]:
    """Bring data sets to this machine: download and unpack, or simulate; what is there stays.

    Parameters
    ----------
    catalog : Catalog
    dataset_names : iterable of str, optional
        Data sets or pools; all by default.
    data_dir : path, optional
        The data root, see :func:`data_root`.
    report : callable, optional
        Told in a line what is about to be done, before it takes its time.

    Raises
    ------
    CatalogError
        When a checksum differs (the download is removed), an archive would write outside its folder or
        doesn't hold the folder that the catalog names, or a ``path`` isn't there.
    """
    say = report or (lambda line: None)
    done = []
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
        done.append(Fetched(entry.name, where(catalog, entry, data_dir), action))
    return done


@dataclass(frozen=True)
class Verified:
    """What :func:`verify` found of one data set.

    ``checksum`` is "ok", "differs", or "unchecked" where there is nothing to compare: data that isn't a
    download, or a download unpacked by hand.
    """

    dataset: str
    present: bool
    checksum: Literal["ok", "differs", "unchecked"]
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the data is there and no checksum differs."""
        return self.present and self.checksum != "differs"


def verify(
    catalog: Catalog,
    dataset_names: Iterable[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Verified]:
    """What is there and what is missing; kept downloads are compared with their checksums again.

    A checksum that the catalog names by its file was recorded when it was downloaded; nothing is
    downloaded here.
    """
    root = data_root(data_dir)
    digests: dict[tuple[Path, str], str] = {}
    results = []
    for entry in catalog.select(dataset_names):
        folder = locate(catalog, entry, data_dir)
        checksum: Literal["ok", "differs", "unchecked"] = "unchecked"
        detail = str(folder) if folder is not None else how_to_get(catalog, entry, data_dir)
        archive = root / _DOWNLOADS / entry.source.download_name
        if entry.source.url is not None and archive.is_file():
            expected = _expected_checksum(entry, root, download=False)
            if expected is not None:
                algorithm, digest = expected.split(":")
                key = (archive, algorithm)
                if key not in digests:
                    with archive.open("rb") as stream:
                        digests[key] = hashlib.file_digest(stream, algorithm).hexdigest()
                checksum = "ok" if digests[key] == digest.lower() else "differs"
                if checksum == "differs":
                    detail = f"{archive}: {algorithm} expected {digest}, found {digests[key]}"
        results.append(Verified(entry.name, folder is not None, checksum, detail))
    return results


# -- fetching ------------------------------------------------------------------------------------------


def _download(entry: Dataset, root: Path) -> None:
    source = entry.source
    expected = _expected_checksum(entry, root, download=True)
    size = limits.DOWNLOAD_BYTES if source.size is None else limits.parse_size(source.size)
    archive = _retrieve(
        f"dataset {entry.name}",
        source.url or "",
        root / _DOWNLOADS / source.download_name,
        expected,
        int(size * limits.DOWNLOAD_SLACK),
    )
    target = _unpacked_folder(root, source)
    if target.exists() and not (target / _UNPACKED_FROM).is_file():
        raise CatalogError(
            f"dataset {entry.name}: {target} is there, and was not unpacked from a download; move it away"
        )
    # Unpacked beside its place and renamed: a folder under the final name is complete.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        if source.download_name.endswith(_ARCHIVES):
            most = None if source.unpacked is None else limits.parse_size(source.unpacked)
            unpack(archive, partial, most_bytes=most, most_members=source.members)
        else:
            shutil.copy2(archive, partial / source.download_name)
        (partial / _UNPACKED_FROM).write_text(json.dumps({"url": source.url, "checksum": expected}))
        if target.exists():
            shutil.rmtree(target)
        partial.chmod(0o755)
        partial.rename(target)
    except UnpackError as error:
        raise CatalogError(f"dataset {entry.name}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _retrieve(label: str, url: str, path: Path, checksum: str | None, most: int) -> Path:
    """Download to ``path``, unless it lies there with that checksum; no more than ``most`` bytes."""
    import pooch

    def download(url: str, output_file: str, _: Any) -> None:
        with open(output_file, "wb") as file:
            pooch.downloaders.choose_downloader(url)(url, _Counted(file, most), None)

    try:
        return Path(
            pooch.retrieve(
                url=url, known_hash=checksum, fname=path.name, path=path.parent, downloader=download
            )
        )
    except ValueError as error:  # pooch's report of a checksum that differs, or of too much: the file is gone
        raise CatalogError(f"{label}: {url}: {error}") from error


class _Counted:
    """A file that refuses to grow beyond ``most`` bytes, whatever a server says of their number."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most, self._written = file, most, 0

    def write(self, data: bytes) -> int:
        self._written += len(data)
        if self._written > self._most:
            raise CatalogError(
                f"more than {limits.readable(self._most)} were sent; a catalog that expects more states "
                "it as size"
            )
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _unpacked_folder(root: Path, source: Source) -> Path:
    return root / _stem(source.download_name)


def _stem(name: str) -> str:
    ending = next((suffix for suffix in _ARCHIVES if name.endswith(suffix)), "")
    return name.removesuffix(ending) if ending else PurePosixPath(name).stem


def _check_download_name(name: str) -> None:
    """Raise unless a download of this name, and the folder of what is in it, lie within the data root."""
    plain = name == PurePosixPath(name.replace("\\", "/")).name and printable(name, keep="") == name
    if (
        not plain
        or _stem(name).startswith(".")
        or _stem(name) in ("", _DOWNLOADS)
        or len(name.encode()) > 200
    ):
        raise ValueError(f"download {shown(name)!r}: expected the plain name of a file (file states another)")


def _expected_checksum(entry: Dataset, root: Path, *, download: bool) -> str | None:
    """``<algorithm>:<hex>`` of the entry's download; None where it can't be known without downloading."""
    checksum = entry.checksum
    if not isinstance(checksum, ChecksumFile):
        return checksum
    file = root / _DOWNLOADS / f"{entry.source.download_name}.{checksum.algorithm}"
    if download:
        # The list lies beside the data on the publisher's server: it guards against damage on the way,
        # not against a publisher who changes both.
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
    """Version of a simulated data set's recipe: it is raised when the same seed gives other frames."""
    from lsim.simulate import UnknownRecipeError, find_recipe

    assert entry.source.simulate is not None
    try:
        return find_recipe(entry.source.simulate.recipe).version
    except UnknownRecipeError as error:
        raise CatalogError(f"{catalog.file}: dataset {entry.name}: {error}") from error


def _simulate(simulation: Simulation, folder: Path, version: int) -> None:
    """Make the families that are not there yet, in place of those that were made with other settings."""
    from lsim.simulate import family_folders, missing_families, write_families
    from lsim.simulate.layout import read_record

    recipe, families, size = simulation.recipe, simulation.families, simulation.size
    made_from = simulation.model_dump() | {"version": version}
    folder.mkdir(parents=True, exist_ok=True)
    # First: from now on the folder is not what an earlier note says, whenever this is interrupted.
    _write_note(folder / _MADE_FROM, made_from | {"complete": False})
    missing = missing_families(folder, recipe, families, size, simulation.seed, simulation.format)
    there = set(range(1, families + 1)) - set(missing)
    kept = {path for number in there for path in family_folders(folder, recipe, number)}
    for path in folder.iterdir():
        if path not in kept and read_record(path) is not None:  # it would lie among the new ones
            shutil.rmtree(path)
    write_families(folder, recipe, families, size, simulation.seed, simulation.format)
    _write_note(folder / _MADE_FROM, made_from)


def _read_note(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_note(path: Path, note: dict[str, Any]) -> None:
    """In one step: a note is never half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(note))
    partial.replace(path)


def _handle(catalog: Catalog) -> str:
    """How a user names this catalog: by name where it is shipped, else by path."""
    return catalog.name if catalog.name in list_catalogs() else str(catalog.file)


# -- errors --------------------------------------------------------------------------------------------


def _group_name(name: str) -> str:
    if fault := group_fault(name):
        raise ValueError(fault)
    return name


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _explain(where: str, error: ValidationError, document: Any, model: type[BaseModel] = Catalog) -> str:
    """One line a problem: the file, the key as the user wrote it, and what is wrong."""
    lines = []
    problems = error.errors()
    for problem in problems:
        stem = problem["loc"][:-1]
        if problem["type"].endswith("_type") and any(
            len(other["loc"]) > len(stem) + 1 and other["loc"][: len(stem)] == stem for other in problems
        ):
            continue  # another member of a union fits better and has its own problem
        location = _written_location(problem["loc"], document)
        if problem["type"] == "extra_forbidden":
            known = sorted(_known_keys(model, problem["loc"]))
            text = f"unknown key{_did_you_mean(str(problem['loc'][-1]), known)}; known: {', '.join(known)}"
        elif problem["type"] == "missing":
            text = "this key is missing"
        else:
            text = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {location}: {text}" if location else f"{where}: {text}")
    return "\n".join(lines)


def _written_location(location: tuple[int | str, ...], document: Any) -> str:
    """``datasets[2] (Liq).source.url``: pydantic's location with the data set's name."""
    text = ""
    here = document
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
            if isinstance(here, dict) and isinstance(here.get("name"), str):
                text += f" ({here['name']})"
            continue
        if not isinstance(here, dict) or (part not in here and part is not location[-1]):
            continue  # the member of a union that pydantic tried, not a key
        text += f".{part}" if text else part
        here = here.get(part) if isinstance(here, dict) else None
    return text


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Keys that are allowed where ``location`` stands: follow it through the models."""
    here: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        models = _models_in(here.model_fields[part].annotation) if part in here.model_fields else []
        here = models[0] if models else here
    return set(here.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
