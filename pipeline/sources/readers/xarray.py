"""Reader of files that xarray opens: NetCDF, HDF5, Zarr stores.

The source is one such file or store, or a folder of them. A variable with the dims frame, y and x is a
field; with the dim sequence it holds several sequences, named by that dim's coordinate or else numbered.
The parameter is scaled to [0, 1].

Times aren't decoded: they stay the stored numbers, in any calendar, and name the sequences where the dim
sequence is a time. Scales, offsets, fill values and valid ranges are applied by the CF conventions, see
:mod:`pipeline.sources.readers.missing`; missing values become NaN. A file, one of several, that cannot be
opened or has no field is one broken sequence, named by the file: its ``read`` raises the reason. It belongs
to the first field of the others that the catalog selects.

Options
-------
``dims`` : mapping, default ``{sequence: sequence, frame: frame, y: y, x: x, channel: channel}``
    Names of the dims in the source. ``sequence`` and ``channel`` may be absent from it.
``variables`` : list of names, or mapping of field to name; default: every variable with the three dims.
``parameter`` : name of a variable or coordinate with the dim frame, or sequence and frame; or a list of
    numbers that holds for all sequences; default "parameter".
``fill`` : number that replaces missing values, whatever ``missing`` says; default none: they are NaN. It
    counts as data, also in normalisation. A frame without any value is refused nevertheless.
``weights`` : name of a variable or coordinate over y and x, or one of them, that weights the pixels in means,
    such as areas of cells; or ``cos(NAME)``, the cosine of one that is a latitude. An angle is no weight by
    itself, and is refused. Default: no weights.
``group`` : group of the file or store.
``engine`` : xarray's name of the format, where xarray can't guess it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.sources.catalog import Dataset, reader_options
from pipeline.sources.readers.base import (
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
from pipeline.sources.readers.containers import check_container
from pipeline.sources.readers.formats import explain_failure, explain_scales, import_filters, stored_form
from pipeline.sources.readers.missing import RULES_VERSION, Coding, MissingCount, decode, list_frames
from pipeline.storage.limits import LISTED_SEQUENCES
from pipeline.storage.safe_names import group_fault, printable

if TYPE_CHECKING:
    import xarray as xr

VERSION = "1"
"""Increased when the same files are decoded to other frames or another parameter."""
_ENDINGS = (".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".zarr")
_RULES = "missing_rules"
"""Setting of a sequence: version of the rules by which its values were decoded."""
_COSINE = re.compile(r"cos\((.+)\)")
_DEGREES = frozenset({"deg", "degree", "degrees", "arc_degree", "degree_angle"})
_RADIANS = frozenset({"rad", "radian", "radians"})
_COMPASS = re.compile(r"degrees?_?(north|south|east|west|true|[nsew])", re.IGNORECASE)
_ANGLES = frozenset({"lat", "latitude", "lon", "longitude"})
"""Names by which a variable without units is an angle."""
_POLE = 90.001
"""Largest latitude in degrees: coordinates are often rounded."""
_ZARR_DOCUMENTS = ("zarr.json", ".zgroup", ".zmetadata")


class Dims(BaseModel):
    """Names of the dims in the source."""

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
    weights: str | None = Field(None, min_length=1)
    group: str | None = None
    engine: str | None = None


def read(entry: Dataset, folder: Path) -> list[LazySequence]:
    """List the sequences of every file or store at, or in, ``folder``; only metadata is read."""
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
    """One sequence of a variable.

    Attributes
    ----------
    variable : str
    index : int or None
        Index along the dim sequence; None where there is no such dim.
    """

    variable: str
    index: int | None

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode the variable at this index, and its parameter."""
        path, options = self.files[0].path, self._options()
        dims = options.dims
        with (
            decoding(path, f"{self.variable} "),
            _open(Path(path), options.group, options.engine) as dataset,
        ):
            order = [dims.frame, dims.y, dims.x]
            if dims.channel in dataset[self.variable].dims:
                order.append(dims.channel)
            frames, missing = self._values(dataset[self.variable], options, order)
            parameter = self._parameter(dataset, options)
        try:
            scaled = scale_parameter(parameter, self.name)
        except ReaderError as error:
            raise ReaderError(error.reason, path) from error
        if len(scaled) != len(frames):
            raise ReaderError(f"{len(frames)} frames, but {len(scaled)} values of the parameter", path)
        if missing:
            self._check_missing(missing, options)
            if options.fill is not None:
                frames[np.isnan(frames)] = options.fill
        return frames if frames.ndim == 4 else frames[..., None], scaled

    def read_weights(self) -> np.ndarray | None:
        """Decode the variable that weights the pixels, or take the cosine of the one that is a latitude."""
        path, options = self.files[0].path, self._options()
        if options.weights is None:
            return None
        dims = options.dims
        cosine = _COSINE.fullmatch(options.weights)
        name = cosine.group(1) if cosine else options.weights
        with (
            decoding(path, f"weights {name!r} "),
            _open(Path(path), options.group, options.engine) as dataset,
        ):
            if name not in dataset.variables:
                raise ReaderError(f"no variable {name!r} for weights; found {_names(dataset)}", path)
            data = dataset[name]
            if not data.dims or not set(data.dims) <= {dims.y, dims.x}:
                raise ReaderError(
                    f"weights {name!r} have dims {data.dims}; expected {dims.y} and {dims.x}, or one of "
                    "them: weights are those of the pixels of all frames",
                    path,
                )
            values, _ = self._values(data, options, None)
            labelled = {str(dim): length for dim, length in dataset[self.variable].sizes.items()}
            spatial_dims = [dims.y, dims.x]
            units = _units_of_angle(data)
        try:
            if cosine:
                values = _cosine(values, units)
            else:
                _refuse_angle(data, units)
        except ReaderError as error:
            raise ReaderError(f"weights {options.weights!r}: {error.reason}", path) from error
        if data.dims == (dims.y,):
            values = values[:, None]
        elif data.dims == (dims.x, dims.y):
            values = values.T
        return np.broadcast_to(values, tuple(labelled[dim] for dim in spatial_dims))

    def read_time(self) -> np.ndarray | None:
        """Decode the parameter as it is stored."""
        path, options = self.files[0].path, self._options()
        with decoding(path, "parameter "), _open(Path(path), options.group, options.engine) as dataset:
            return self._parameter(dataset, options)

    def _options(self) -> XarrayOptions:
        return XarrayOptions.model_validate({k: v for k, v in self.settings.items() if k != _RULES})

    def _parameter(self, dataset: xr.Dataset, options: XarrayOptions) -> np.ndarray:
        """Decode the parameter, of which no value may be missing."""
        if not isinstance(options.parameter, str):
            return np.asarray(options.parameter)
        name, path = options.parameter, self.files[0].path
        if name not in dataset.variables:
            raise ReaderError(f"no parameter {name!r}; found {_names(dataset)}", path)
        values, missing = self._values(dataset[name], options, None)
        if missing:
            raise ReaderError(f"sequence {self.name}: parameter {name!r}: {missing}", path)
        return values

    def _check_missing(self, missing: MissingCount, options: XarrayOptions) -> None:
        """Refuse missing values where the catalog doesn't take them, and frames that hold nothing else."""
        path = self.files[0].path
        message = f"sequence {self.name}: {self.variable}: {missing}"
        if self.missing != "frames" and (empty := missing.empty_frames()):
            verb = "has" if len(empty) == 1 else "have"
            raise ReaderError(f"{message}; {list_frames(empty)} {verb} no finite value", path)
        if options.fill is None and self.missing == "quarantine":
            raise ReaderError(
                f"{message}; expected none (missing: keep stores them as NaN, and --mask nan leaves their "
                "pixels out of distances; options.fill states a number for them, which then counts as data)",
                path,
            )

    def _values(
        self, data: xr.DataArray, options: XarrayOptions, order: list[str] | None
    ) -> tuple[np.ndarray, MissingCount]:
        """Decode a variable at this index, after a check of its size and the size of its chunks."""
        path, sequence_dim = self.files[0].path, options.dims.sequence
        as_float = self.missing != "quarantine" or options.fill is not None
        coding, lengths = _coding_of(data, Path(path), options, as_float=as_float)
        if self.index is not None and sequence_dim in data.dims:
            data = data.isel({sequence_dim: self.index})
            if self.index >= lengths.pop(sequence_dim, self.index + 1):
                lengths = {str(data.dims[0]): 0}
        for shape in (data.shape, data.encoding.get("chunksizes"), data.encoding.get("chunks")):
            if shape is not None:
                itemsize = max(data.dtype.itemsize, coding.decoded.itemsize)
                check_size(shape, itemsize, self.most_bytes, path, f"variable {data.name!r}")
        if order is not None:
            data = data.transpose(*order)
        try:
            return decode(data.values, coding, [lengths.get(str(dim)) for dim in data.dims])
        except ReaderError as error:
            raise ReaderError(f"variable {data.name!r}: {error.reason}", path) from error


def _units_of_angle(data: xr.DataArray) -> str:
    """Classify the units of a variable: "degrees", "radians", "others", or empty where none are stated."""
    text = str(data.attrs.get("units", "")).strip()
    if text.lower() in _RADIANS:
        return "radians"
    if text.lower() in _DEGREES or _COMPASS.fullmatch(text):
        return "degrees"
    return "others" if text else ""


def _refuse_angle(data: xr.DataArray, units: str) -> None:
    """Raise :class:`ReaderError` for weights that are angles."""
    names = {str(data.name).lower(), str(data.attrs.get("standard_name", "")).lower()}
    if units in ("degrees", "radians") or (not units and names & _ANGLES):
        raise ReaderError(
            f"an angle ({f'units {units}' if units else 'by its name'}) is no weight; expected "
            f"areas of cells or the like, or cos({data.name}), the cosine of a latitude"
        )


def _cosine(values: np.ndarray, units: str) -> np.ndarray:
    """Take the cosine of latitudes; without units they are degrees where one is above π/2.

    Raises
    ------
    ReaderError
        When they are no latitudes, or nothing tells degrees from radians.
    """
    if values.dtype.kind not in "iuf" or units == "others":
        raise ReaderError(f"{values.dtype} in other units than degrees or radians; expected latitudes")
    latitude = np.asarray(values, dtype=np.float64)
    largest = float(np.nanmax(np.abs(latitude), initial=0))
    if not units and largest <= np.pi / 2:
        raise ReaderError(
            f"values up to {largest:g} without units may be degrees or radians; expected the attribute "
            "units, such as degrees_north; or weights that are stored as a variable"
        )
    degrees = np.rad2deg(latitude) if units == "radians" else latitude
    if np.nanmax(np.abs(degrees), initial=0) > _POLE:
        raise ReaderError(f"values up to {largest:g}; expected latitudes, from -90 to 90 degrees")
    return np.maximum(np.cos(np.deg2rad(degrees)), 0)


def _coding_of(
    data: xr.DataArray, path: Path, options: XarrayOptions, *, as_float: bool
) -> tuple[Coding, dict[str, int]]:
    """Look up how a variable is coded, and the dims of which less is stored than declared."""
    sizes = {str(dim): length for dim, length in data.sizes.items()}
    try:
        form = stored_form(path, options.group, str(data.name), sizes)
        attributes = {
            str(name): value for name, value in {**data.attrs, **form.attributes}.items() if value is not None
        }
        coding = Coding.of(attributes, data.dtype, default_fill=form.default_fill, as_float=as_float)
    except ReaderError as error:
        raise ReaderError(f"variable {data.name!r}: {error.reason}", str(path)) from error
    return coding, dict(form.lengths)


@contextlib.contextmanager
def _open(path: Path, group: str | None, engine: str | None) -> Iterator[xr.Dataset]:
    """Open a file or store with its values as they are stored; explain why where that fails."""
    import xarray as xr

    # Undecoded times: the parameter is scaled anyway, and a calendar or unit that has no date can be read.
    # Undecoded values: xarray takes other values for missing than CF says, see
    # pipeline.sources.readers.missing.
    open_options: dict[str, Any] = {"decode_times": False, "mask_and_scale": False}
    source: Any = path
    if engine == "zarr" or (engine is None and path.is_dir()):
        # Zarr's fill value as the mask in either format, so that xarray doesn't decode _FillValue, which
        # fails where it is a number. open_dataset has an option for it, and ignores that.
        source = xr.backends.ZarrStore.open_group(
            path, group=group, mode="r", consolidated=False, use_zarr_fill_value_as_mask=True
        )
    else:
        import_filters(path, group)
        open_options |= {"engine": engine, "group": group}
    try:
        with xr.open_dataset(source, **open_options) as dataset:
            yield dataset
    except ReaderError:
        raise
    except Exception as error:  # each engine has its own for a file that it can't read
        from_disk = isinstance(error, OSError) and error.errno is not None
        if not from_disk and (reason := explain_failure(path, group)):
            raise ReaderError(reason, str(path)) from error
        raise


def _is_source(path: Path) -> bool:
    ending = path.suffix.lower()
    if os.path.isdir(path):
        return ending == ".zarr" or _is_zarr(path)
    return ending in _ENDINGS


def _first_field(sequences: list[LazySequence], entry: Dataset) -> str:
    """Find the first field that the catalog selects: in another, a broken file would go unnoticed."""
    choices = entry.fields if isinstance(entry.fields, dict) else {}
    used_names = {choice.source or name for name, choice in choices.items()} | set(entry.fields)
    return next((s.field for s in sequences if s.field in used_names), sequences[0].field)


def _is_zarr(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in _ZARR_DOCUMENTS)


def _names(dataset: xr.Dataset) -> str:
    return ", ".join(sorted(map(str, dataset.variables))) or "none"


def _variables(dataset: xr.Dataset, options: XarrayOptions, path: Path) -> Mapping[str, str]:
    """Map fields to variables; a named variable that isn't there, or has other dims, is an error."""
    dims = options.dims
    required_dims = {dims.frame, dims.y, dims.x}
    valid_dims = required_dims | {dims.sequence, dims.channel}
    candidates = [str(name) for name, v in dataset.data_vars.items() if required_dims <= set(v.dims)]
    variables = options.variables or candidates
    fields = variables if isinstance(variables, dict) else {name: name for name in variables}
    if not options.variables and (fault := next(filter(None, map(group_fault, fields)), "")):
        raise ReaderError(f"a variable that can't name a field, {fault}", str(path))
    for name in fields.values():
        if name not in dataset.data_vars:
            raise ReaderError(f"no variable {name!r}; found {_names(dataset)}", str(path))
        own_dims = dataset[name].dims
        if not required_dims <= set(own_dims) <= valid_dims:
            raise ReaderError(
                f"variable {name!r} has dims {own_dims}; expected {dims.frame}, {dims.y}, {dims.x} and "
                f"perhaps {dims.sequence}, {dims.channel} (options.dims maps them)",
                str(path),
            )
    if not fields:
        if reason := explain_scales(path):
            raise ReaderError(reason, str(path))
        all_dims = {str(name): variable.dims for name, variable in dataset.data_vars.items()}
        raise ReaderError(
            f"no variable has the dims {dims.frame}, {dims.y}, {dims.x} (options.dims maps them); "
            f"found {all_dims}",
            str(path),
        )
    return fields


def _sequences_of(
    dataset: xr.Dataset, field: str, variable: str, file: SourceFile, options: XarrayOptions, *, alone: bool
) -> list[LazySequence]:
    """List the sequences of a variable; ``alone`` tells that no other file is read."""
    sequence_dim = options.dims.sequence
    stem = Path(file.path).stem
    indices: list[int | None] = [None]
    names = [stem]
    if sequence_dim in dataset[variable].dims:
        count = dataset.sizes[sequence_dim]
        if count > LISTED_SEQUENCES:
            raise ReaderError(f"{count} sequences; expected {LISTED_SEQUENCES} at most", file.path)
        indices = list(range(count))
        labels: Iterable[str] = (f"{number:05d}" for number in range(count))
        if sequence_dim in dataset.coords:
            coding, _ = _coding_of(dataset[sequence_dim], Path(file.path), options, as_float=False)
            # One by one: NumPy can't cast its own variable-length strings to fixed ones.
            labels = map(str, decode(dataset[sequence_dim].values, coding)[0])
        names = [label if alone else f"{stem}/{label}" for label in labels]
    units = dataset[variable].attrs.get("units")
    settings = options.model_dump()
    if options.weights is None:
        del settings["weights"]  # earlier versions recorded none, and the settings must stay the same
    return [
        LabelledSequence(
            name=name,
            field=field,
            files=(file,),
            settings={**settings, _RULES: RULES_VERSION},
            attributes={"units": printable(str(units))[:100]} if units is not None else {},
            variable=variable,
            index=index,
        )
        for name, index in zip(names, indices, strict=True)
    ]
