"""Reader of what xarray opens: NetCDF and HDF5 files, Zarr stores.

The source is one such file or store, or a folder of them. A variable with the dims frame, y and x is a
field; with the dim sequence it holds several sequences, named by that dim's coordinate or else numbered.
The parameter is scaled to [0, 1].

Times are not decoded: they stay the numbers that are stored, in whatever calendar, and so they name the
sequences where the dim sequence is a time. Scales, offsets and fill values are applied; masked values are
NaN. A file of several that cannot be opened, or has no field, is one broken sequence, named by the file:
its ``read`` raises the reason. It counts to the first field of the others that the catalog takes.

Options
-------
``dims`` : mapping, default ``{sequence: sequence, frame: frame, y: y, x: x, channel: channel}``
    What the source calls them. ``sequence`` and ``channel`` may be absent from the source.
``variables`` : list of names, or mapping of field to name; default: every variable with the three dims.
``parameter`` : name of a variable or coordinate with the dim frame, or sequence and frame; or a list of
    numbers that holds for all sequences; default "parameter".
``fill`` : number that replaces masked values and NaN, whatever ``missing`` says; default none: they are NaN.
``group`` : group of the file or store.
``engine`` : xarray's name of the format, where it can't tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.catalog import Dataset, reader_options
from pipeline.limits import LISTED_SEQUENCES
from pipeline.names import group_fault, printable
from pipeline.readers.base import (
    BrokenSequence,
    LazySequence,
    ReaderError,
    SourceFile,
    check_size,
    decoding,
    list_folder,
    opening_error,
    scale_parameter,
)
from pipeline.readers.containers import check_container

if TYPE_CHECKING:
    import xarray as xr

VERSION = "1"
"""Raised when other frames, or another parameter, are made of the same files."""
_ENDINGS = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".zarr")
_ZARR_DOCUMENTS = ("zarr.json", ".zgroup", ".zmetadata")


class Dims(BaseModel):
    """What the source calls the dims."""

    model_config = ConfigDict(extra="forbid")

    sequence: str = "sequence"
    frame: str = "frame"
    y: str = "y"
    x: str = "x"
    channel: str = "channel"


class XarrayOptions(BaseModel):
    """Options of this reader; see the module."""

    model_config = ConfigDict(extra="forbid")

    dims: Dims = Field(default_factory=Dims)
    variables: list[str] | dict[str, str] = []
    parameter: str | list[float] = "parameter"
    fill: float | None = Field(None, allow_inf_nan=False)
    group: str | None = None
    engine: str | None = None


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """The sequences of every file or store at, or in, ``folder``; only metadata is read."""
    options = reader_options(XarrayOptions, entry)
    if folder.is_file() or _is_zarr(folder):
        sources = [folder]
    else:
        sources = [path for child in list_folder(folder) if _is_source(path := Path(child.path))]
    sequences: list[LazySequence] = []
    broken: list[tuple[Path, Exception]] = []
    for path in sources:
        try:
            file = SourceFile.of(path)
            check_container(path, folder)
            with _open(path, options.group, options.engine) as dataset:
                for field, variable in _variables(dataset, options, path).items():
                    sequences += _sequences_of(
                        dataset, field, variable, file, options, alone=len(sources) == 1
                    )
        except Exception as error:  # each engine has its own for a damaged file; none is lost, see below
            broken.append((path, error))
    if not broken:
        return sequences
    if not sequences:
        path, cause = broken[0]
        raise opening_error(path, cause) from cause
    field = _first_field(sequences, entry)
    return sequences + [BrokenSequence.of(path.stem, field, path, cause) for path, cause in broken]


@dataclass(frozen=True, kw_only=True)
class LabelledSequence(LazySequence):
    """One sequence of a variable; ``index`` along the dim sequence, None where there is no such dim."""

    variable: str
    index: int | None

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode the variable at this index, and its parameter."""
        path, options = self.files[0].path, XarrayOptions.model_validate(self.settings)
        dims = options.dims
        with (
            decoding(path, f"{self.variable} "),
            _open(Path(path), options.group, options.engine) as dataset,
        ):
            here = dataset if self.index is None else dataset.isel({dims.sequence: self.index})
            order = [dims.frame, dims.y, dims.x]
            data = here[self.variable]
            if dims.channel in data.dims:
                order.append(dims.channel)
            frames = self._values(data.transpose(*order))
            if isinstance(options.parameter, str):
                if options.parameter not in here.variables:
                    raise ReaderError(f"no parameter {options.parameter!r}; found {_names(dataset)}", path)
                parameter = self._values(here[options.parameter])
            else:
                parameter = np.asarray(options.parameter)
        try:
            scaled = scale_parameter(parameter, self.name)
        except ReaderError as error:
            raise ReaderError(error.reason, path) from error
        if len(scaled) != len(frames):
            raise ReaderError(f"{len(frames)} frames, but {len(scaled)} values of the parameter", path)
        if frames.dtype.kind == "f":
            missing = np.isnan(frames)
            if options.fill is not None:
                frames = np.where(missing, frames.dtype.type(options.fill), frames)
            elif missing.any() and self.missing == "quarantine":
                number = int(np.argmax(missing.reshape(len(frames), -1).any(axis=1)))
                raise ReaderError(
                    f"sequence {self.name}: frame {number} of {self.variable} holds NaN, or masked values; "
                    "expected finite values (options.fill states a number that replaces them; missing: keep "
                    "takes them as they are)",
                    path,
                )
        return frames if frames.ndim == 4 else frames[..., None], scaled

    def _values(self, data: xr.DataArray) -> np.ndarray:
        """Decode, once it is known how large it, and each chunk of it, is."""
        path, what = self.files[0].path, f"variable {data.name!r}"
        for shape in (data.shape, data.encoding.get("chunksizes"), data.encoding.get("chunks")):
            if shape is not None:
                check_size(shape, data.dtype.itemsize, self.most_bytes, path, what)
        return data.values


def _open(path: Path, group: str | None, engine: str | None) -> xr.Dataset:
    import xarray as xr

    # Undecoded times: the parameter is scaled anyway, and a calendar or unit that has no date can be read.
    if engine == "zarr" or (engine is None and path.is_dir()):
        return xr.open_dataset(
            path, engine="zarr", group=group, chunks=None, consolidated=False, decode_times=False
        )
    return xr.open_dataset(path, engine=engine, group=group, decode_times=False)


def _is_source(path: Path) -> bool:
    ending = path.suffix.lower()
    if os.path.isdir(path):
        return ending == ".zarr" or _is_zarr(path)
    return ending in _ENDINGS


def _first_field(sequences: list[LazySequence], entry: Dataset) -> str:
    """The first field that the catalog takes: in another, a broken file would go unseen."""
    choices = entry.fields if isinstance(entry.fields, dict) else {}
    taken = {choice.source or name for name, choice in choices.items()} | set(entry.fields)
    return next((s.field for s in sequences if s.field in taken), sequences[0].field)


def _is_zarr(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in _ZARR_DOCUMENTS)


def _names(dataset: xr.Dataset) -> str:
    return ", ".join(sorted(map(str, dataset.variables))) or "none"


def _variables(dataset: xr.Dataset, options: XarrayOptions, path: Path) -> Mapping[str, str]:
    """Field to variable; a variable that is named but isn't there, or has other dims, is an error."""
    dims = options.dims
    needed = {dims.frame, dims.y, dims.x}
    allowed = needed | {dims.sequence, dims.channel}
    chosen = options.variables or [str(n) for n, v in dataset.data_vars.items() if needed <= set(v.dims)]
    fields = chosen if isinstance(chosen, dict) else {name: name for name in chosen}
    if not options.variables and (fault := next(filter(None, map(group_fault, fields)), "")):
        raise ReaderError(f"a variable that can't name a field, {fault}", str(path))
    for name in fields.values():
        if name not in dataset.data_vars:
            raise ReaderError(f"no variable {name!r}; found {_names(dataset)}", str(path))
        found = dataset[name].dims
        if not needed <= set(found) <= allowed:
            raise ReaderError(
                f"variable {name!r} has dims {found}; expected {dims.frame}, {dims.y}, {dims.x} and perhaps "
                f"{dims.sequence}, {dims.channel} (options.dims maps them)",
                str(path),
            )
    if not fields:
        found_dims = {str(name): variable.dims for name, variable in dataset.data_vars.items()}
        raise ReaderError(
            f"no variable has the dims {dims.frame}, {dims.y}, {dims.x} (options.dims maps them); "
            f"found {found_dims}",
            str(path),
        )
    return fields


def _sequences_of(
    dataset: xr.Dataset, field: str, variable: str, file: SourceFile, options: XarrayOptions, *, alone: bool
) -> list[LazySequence]:
    along = options.dims.sequence
    stem = Path(file.path).stem
    indices: list[int | None] = [None]
    names = [stem]
    if along in dataset[variable].dims:
        count = dataset.sizes[along]
        if count > LISTED_SEQUENCES:
            raise ReaderError(f"{count} sequences; expected {LISTED_SEQUENCES} at most", file.path)
        indices = list(range(count))
        # One by one: NumPy can't cast its own variable-length strings to fixed ones.
        labels = (
            map(str, dataset[along].values) if along in dataset.coords else (f"{i:05d}" for i in range(count))
        )
        names = [label if alone else f"{stem}/{label}" for label in labels]
    units = dataset[variable].attrs.get("units")
    return [
        LabelledSequence(
            name=name,
            field=field,
            files=(file,),
            settings=options.model_dump(),
            attributes={"units": printable(str(units))[:100]} if units is not None else {},
            variable=variable,
            index=index,
        )
        for name, index in zip(names, indices, strict=True)
    ]
