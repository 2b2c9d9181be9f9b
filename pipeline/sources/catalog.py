"""Catalogs: YAML files that list data sets, and say where each comes from.

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
    where the address doesn't end in its name, ``folder`` the part of the archive to use. ``size``
    (``3.9 GB``) is shown before the download, and bounds it. ``unpacked`` (a size) and ``members`` (a
    number) bound the content of the archive; by default a multiple of its own size, and a million files, see
    :mod:`pipeline.storage.limits`. Data sets with the same ``url`` share one download.
``path``
    A folder or file on this machine; relative paths start at the catalog's own folder. Or the address of a
    folder or file in an object store (``s3://``, ``gs://``): ``lsim catalog fetch`` copies it to this
    machine, and later updates the copy.
``simulate``
    Simulated families: ``{recipe, families, size, seed, format}``, see :mod:`lsim.simulate`.

Downloads and simulations are stored under the *data root*: ``data_dir``, else ``$LSIM_DATA``, else the
user's cache. ``filter`` lists substrings of a sequence's name, dots included; a sequence is selected when any
of them occurs in its name, and an empty filter selects all. ``fields`` selects fields of a source by name,
or makes new ones of some channels: ``{velocity-x: {source: velocity, channel: 0}}``; metrics take frames of
one, three or four channels. ``missing: keep`` converts frames with NaN or infinity as they are, for metrics
that leave out missing pixels; by default (``quarantine``) their sequences are left out. ``missing: frames``
also converts frames that hold nothing else, as models leave behind that have blown up.
``largest_sequence: 40 GB`` bounds the size of a decoded sequence, 16 GiB by default.
Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args
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
from pipeline.storage import limits
from pipeline.storage.safe_names import group_fault, printable, short_name

Missing: TypeAlias = Literal["quarantine", "keep", "frames"]
"""Treatment of sequences that hold NaN or infinity; ``frames``: also whole frames of nothing else."""

CONTAINERS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
"""Endings of downloads that are unpacked."""
DOWNLOADS = "downloads"
"""Folder of downloads below the data root."""


class CatalogError(ValueError):
    """A catalog with a fault; the message names the file and the key."""


class MissingDataError(CatalogError):
    """Data that a catalog describes but that is not on this machine; the message says how to get it."""


def _checked_size(text: str) -> str:
    limits.parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_checked_size)]
"""Bytes with a unit: ``3.9 GB``."""


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
    """Source of a data set; exactly one of ``url``, ``path`` and ``simulate`` is set."""

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
        keys = [key for key in ("url", "path", "simulate") if getattr(self, key) is not None]
        if len(keys) != 1:
            raise ValueError(f"expected exactly one of url, path, simulate; found {keys or 'none'}")
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
    """A field made of some channels of a source's field."""

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
        """Bound on the bytes of a decoded sequence."""
        stated = self.largest_sequence
        return limits.SEQUENCE_BYTES if stated is None else limits.parse_size(stated)

    def selects(self, name: str) -> bool:
        """Tell whether the filter selects a sequence of this name."""
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
        if _group_name(self.name) == DOWNLOADS:
            raise ValueError(f"name {DOWNLOADS!r} is that of the folder of downloads")
        names = [entry.name for entry in self.datasets]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"datasets named twice: {', '.join(duplicates)}")
        spelling: dict[str, str] = {}
        for name in names:
            first = spelling.setdefault(name.casefold(), name)
            if first != name:
                raise ValueError(
                    f"datasets {first!r} and {name!r} differ only in case; on a file system that ignores "
                    "case they would be one group"
                )
        for pool, members in self.pools.items():
            unknown_members = [member for member in members if member not in names]
            if unknown_members:
                raise ValueError(
                    f"pools.{pool}: no dataset {', '.join(unknown_members)}; known: {', '.join(names)}"
                )
            if pool in names:
                raise ValueError(f"pools.{pool}: a dataset has this name too")
        return self

    @property
    def file(self) -> Path:
        """The YAML file that this catalog was read from."""
        return self._file

    def select(self, names: Iterable[str] | None = None) -> list[Dataset]:
        """Select data sets by name, in the catalog's order; a pool stands for its members.

        Raises
        ------
        CatalogError
            For a name that is neither a data set nor a pool.
        """
        if names is None:
            return list(self.datasets)
        datasets = [entry.name for entry in self.datasets]
        selection: set[str] = set()
        for name in names:
            if name not in datasets and name not in self.pools:
                raise CatalogError(
                    f"{self.file}: no dataset {name!r}{_did_you_mean(name, datasets)}; "
                    f"known: {', '.join(datasets)}"
                )
            selection.update(self.pools.get(name, [name]))
        return [entry for entry in self.datasets if entry.name in selection]


def list_catalogs() -> list[str]:
    """List the names of the shipped catalogs."""
    return shipped_names("catalogs")


def open_catalog(name_or_path: str | os.PathLike[str]) -> Catalog:
    """Read a catalog by name, among the shipped ones, or by path.

    Raises
    ------
    CatalogError
        When there is no such catalog, or it is invalid; the message names the file and the key.
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
    """Validate an entry's ``options`` as ``model``; :class:`CatalogError` names the data set and the key."""
    try:
        return model.model_validate(entry.options)
    except ValidationError as error:
        context = f"dataset {entry.name}, options of reader {entry.reader!r}"
        raise CatalogError(_explain(context, error, entry.options, model)) from error


def stem_of_download(name: str) -> str:
    """Remove the ending of a download's name."""
    ending = next((suffix for suffix in CONTAINERS if name.endswith(suffix)), "")
    return name.removesuffix(ending) if ending else PurePosixPath(name).stem


def _check_download_name(name: str) -> None:
    """Raise unless a download of this name, and the folder that it is unpacked to, are in the data root."""
    plain = name == PurePosixPath(name.replace("\\", "/")).name and printable(name, keep="") == name
    if (
        not plain
        or stem_of_download(name).startswith(".")
        or stem_of_download(name) in ("", DOWNLOADS)
        or len(name.encode()) > 200
    ):
        raise ValueError(
            f"download {short_name(name)!r}: expected the plain name of a file (file states another)"
        )


def _group_name(name: str) -> str:
    if fault := group_fault(name):
        raise ValueError(fault)
    return name


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _explain(context: str, error: ValidationError, document: Any, model: type[BaseModel] = Catalog) -> str:
    """Write one line for each problem: the file, the key as the user wrote it, and the fault."""
    lines = []
    problems = error.errors()
    for problem in problems:
        stem = problem["loc"][:-1]
        if problem["type"].endswith("_type") and any(
            len(rival["loc"]) > len(stem) + 1 and rival["loc"][: len(stem)] == stem for rival in problems
        ):
            continue  # another member of a union fits better and has its own problem
        location = _written_location(problem["loc"], document)
        if problem["type"] == "extra_forbidden":
            keys = sorted(_known_keys(model, problem["loc"]))
            text = f"unknown key{_did_you_mean(str(problem['loc'][-1]), keys)}; known: {', '.join(keys)}"
        elif problem["type"] == "missing":
            text = "this key is missing"
        else:
            text = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{context}: {location}: {text}" if location else f"{context}: {text}")
    return "\n".join(lines)


def _written_location(location: tuple[int | str, ...], document: Any) -> str:
    """Write pydantic's location with the data set's name, as in ``datasets[2] (Liq).source.url``."""
    text = ""
    value = document
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
            value = value[part] if isinstance(value, list) and part < len(value) else None
            if isinstance(value, dict) and isinstance(value.get("name"), str):
                text += f" ({value['name']})"
            continue
        if not isinstance(value, dict) or (part not in value and part is not location[-1]):
            continue  # the member of a union that pydantic tried, not a key
        text += f".{part}" if text else part
        value = value.get(part) if isinstance(value, dict) else None
    return text


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """List the keys that are allowed at a location, by following it through the models."""
    section: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        models = _models_in(section.model_fields[part].annotation) if part in section.model_fields else []
        section = models[0] if models else section
    return set(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
