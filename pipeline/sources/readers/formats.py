"""Look up properties of stored variables that xarray doesn't pass on, and explain why it can't open a file.

HDF5 and NetCDF files are opened through h5py, Zarr stores through xarray's own store, whatever engine reads
the values.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.sources.readers.base import ReaderError
from pipeline.sources.readers.missing import FILL_VALUES

FILTER_NAMES: Mapping[int, str] = {
    307: "BZip2",
    32001: "Blosc",
    32004: "LZ4",
    32008: "Bitshuffle",
    32013: "ZFP",
    32015: "Zstd",
    32017: "SZ",
    32018: "FCIDECOMP",
    32024: "SZ3",
    32026: "Blosc2",
    32028: "SPERR",
}
"""Compression filters of HDF5 that hdf5plugin brings, by their registered number."""

_CDF5 = b"CDF\x05"
_TEXT_NUMBERS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


class StoredForm(NamedTuple):
    """Properties of one stored variable that xarray doesn't pass on.

    Attributes
    ----------
    default_fill : bool
        Whether values that were never written read as NetCDF's default fill value.
    lengths : dict of str to int
        Dims of which less is stored than the file declares: values beyond were never written.
    attributes : dict
        Attributes to take instead of xarray's; None removes one.
    """

    default_fill: bool = False
    lengths: Mapping[str, int] = {}
    attributes: Mapping[str, Any] = {}


def stored_form(path: Path, group: str | None, name: str, sizes: Mapping[str, int]) -> StoredForm:
    """Look up how a variable is stored.

    Parameters
    ----------
    path : Path
        A file or a Zarr store.
    group : str or None
    name : str
        The variable.
    sizes : mapping of str to int
        Its dims and their lengths, in stored order.
    """
    import h5py

    if path.is_dir():
        return _zarr_form(path, group, name)
    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            dataset = _dataset(file, group, name)
            return StoredForm() if dataset is None else _hdf5_form(dataset, sizes)
    return StoredForm(default_fill=_starts_with(path, b"CDF"))


def import_filters(path: Path, group: str | None) -> None:
    """Import hdf5plugin where a variable of the group needs one of its filters and it is installed."""
    if missing_filters(path, group):
        try:
            import hdf5plugin  # noqa: F401
        except ImportError:
            return


def missing_filters(path: Path, group: str | None) -> dict[str, str]:
    """List the variables of a group whose compression h5py can't read, with the filter's name."""
    import h5py

    if path.is_dir() or not h5py.is_hdf5(path):
        return {}
    filters: dict[str, str] = {}
    with h5py.File(path, "r") as file:
        top = _member(file, group or "/")
        for name in top if isinstance(top, h5py.Group) else ():
            dataset = _member(top, name)
            missing = _missing_filter(dataset) if isinstance(dataset, h5py.Dataset) else ""
            if missing:
                filters[name] = missing
    return filters


def _missing_filter(dataset: Any) -> str:
    """Name the last compression filter of an HDF5 data set that h5py can't undo; empty where it can."""
    import h5py

    plist = dataset.id.get_create_plist()
    numbers = [plist.get_filter(position)[0] for position in range(plist.get_nfilters())]
    missing = [number for number in numbers if not h5py.h5z.filter_avail(number)]
    return FILTER_NAMES.get(missing[-1], f"filter {missing[-1]}") if missing else ""


def explain_failure(path: Path, group: str | None) -> str | None:
    """Explain why xarray can't open or read a file; None for unknown reasons."""
    import h5py

    if path.is_dir() or not path.is_file():
        return None
    if _starts_with(path, _CDF5):
        return (
            "NetCDF-3 with 64-bit data (CDF-5), which SciPy can't read: install netCDF4 (pip install "
            "netCDF4), or convert the file with `nccopy -k nc4 OLD NEW`"
        )
    if not h5py.is_hdf5(path):
        return None
    if filters := missing_filters(path, group):
        name, kind = next(iter(filters.items()))
        if kind in FILTER_NAMES.values():
            return (
                f"variable {name!r} is compressed with {kind}, which h5py alone can't read: install "
                "hdf5plugin (pip install 'lsim[hdf5]')"
            )
        return (
            f"variable {name!r} is compressed with {kind} of HDF5, which isn't installed; rewrite the file "
            "with gzip (h5repack -f GZIP=4 OLD NEW)"
        )
    return explain_scales(path)


def explain_scales(path: Path) -> str | None:
    """Name a variable whose dimension scales lie in a group that isn't above it, as Dedalus writes them."""
    import h5py

    if path.is_dir() or not h5py.is_hdf5(path):
        return None

    def look(name: str, member: Any) -> str | None:
        if not isinstance(member, h5py.Dataset) or "DIMENSION_LIST" not in member.attrs:
            return None
        parent = f"/{name}".rpartition("/")[0] + "/"
        for references in member.attrs["DIMENSION_LIST"]:
            for reference in references:
                scale = member.file[reference].name or ""
                if not parent.startswith(scale.rpartition("/")[0] + "/"):
                    return (
                        f"variable {name!r} has its dimension scales in another group ({scale!r}), as files "
                        "of Dedalus do; NetCDF and xarray look in its own group and those above only. Read "
                        "both with h5py and store them as NPZ (frames, parameter) for the reader stack, or "
                        "as NetCDF"
                    )
        return None

    with h5py.File(path, "r") as file:
        reason: str | None = file.visititems(look)
        return reason


def _hdf5_form(dataset: Any, sizes: Mapping[str, int]) -> StoredForm:
    """Look up the fill value that the file itself states, as the NetCDF library does.

    That library states its default in each variable it creates. HDF5's own default, 0, isn't stated, and
    counts as data.
    """
    import h5py

    plist = dataset.id.get_create_plist()
    fill = FILL_VALUES.get(dataset.dtype.str[1:])
    stated = plist.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED
    default = bool(stated and fill is not None and dataset.fillvalue == np.array(fill, dataset.dtype))
    lengths = {}
    if len(sizes) == dataset.ndim:
        lengths = {
            dim: stored
            for (dim, length), stored in zip(sizes.items(), dataset.shape, strict=True)
            if stored < length
        }
    return StoredForm(default_fill=default, lengths=lengths)


def _zarr_form(path: Path, group: str | None, name: str) -> StoredForm:
    """Read ``_FillValue`` from a Zarr array's own attributes.

    Zarr's ``fill_value`` is the value of chunks that aren't stored. Format 2 has no other place for
    ``_FillValue`` when xarray writes it, so there it marks missing values; but 0 is what zarr states by
    itself, and chunks of zeros aren't stored either, so 0 is data.
    """
    import xarray as xr

    store = xr.backends.ZarrStore.open_group(
        path, group=group, mode="r", consolidated=False, use_zarr_fill_value_as_mask=True
    )
    array: Any = store.zarr_group[name]
    fill = array.attrs.get("_FillValue")
    if fill is not None:
        return StoredForm(attributes={"_FillValue": _zarr_number(fill, array.dtype)})
    if array.metadata.zarr_format == 2 and array.dtype.kind in "iuf" and array.fill_value:
        return StoredForm(attributes={"_FillValue": array.fill_value})
    return StoredForm(attributes={"_FillValue": None})


def _zarr_number(value: Any, dtype: np.dtype) -> Any:
    """Decode a ``_FillValue`` of a Zarr array: a number, its name, or (by xarray) base64 of its bytes."""
    if not isinstance(value, str) or dtype.kind != "f":
        return value
    if value in _TEXT_NUMBERS:
        return np.float64(_TEXT_NUMBERS[value])
    try:
        return np.float64(struct.unpack("<d", base64.standard_b64decode(value))[0])
    except (binascii.Error, struct.error, ValueError):
        raise ReaderError(f"attribute _FillValue is {value!r}; expected a number") from None


def _dataset(file: Any, group: str | None, name: str) -> Any:
    """Find a NetCDF variable's data set; one that shares a dimension's name has another."""
    import h5py

    top = _member(file, group or "/")
    if isinstance(top, h5py.Group):
        for key in (f"_nc4_non_coord_{name}", name):
            member = _member(top, key)
            if isinstance(member, h5py.Dataset):
                return member
    return None


def _member(group: Any, name: str) -> Any:
    """Look up a member of an HDF5 group; None where there is none, or a link leads nowhere."""
    try:
        return group[name]
    except KeyError:
        return None


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(magic)) == magic
