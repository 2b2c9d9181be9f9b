"""The only Zarr I/O: create, open, read, write one aligned block.

Metadata first, then region writes. A writer owns whole chunks, or whole shards where an array is
sharded: two writers in one shard lose data silently, and neither zarr nor xarray check it for NumPy
input, so :func:`write_rows` does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

COMPRESSION = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
SHARD_BYTES = 128 * 2**20
"""Target size of a shard of decoded frames; it holds a whole number of sequences, at least one."""


class StoreError(RuntimeError):
    """A store that cannot be opened or a write that would damage one."""


def open_store(path: str | os.PathLike[str], mode: Literal["r", "r+", "a"] = "r") -> zarr.Group:
    """Open a store's root group; ``"a"`` creates it when absent.

    Raises
    ------
    StoreError
        When there is no Zarr group at ``path`` and ``mode`` is not ``"a"``.
    """
    # Never fsspec for local paths: it shows half-written chunks. A string makes zarr use its LocalStore.
    try:
        return zarr.open_group(str(path), mode=mode, zarr_format=3, use_consolidated=False)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no Zarr store here") from error


def field_keys(root: zarr.Group, variable: str) -> list[str]:
    """The ``<dataset>/<field>`` paths of all groups, two levels down, that hold ``variable``."""
    return [
        f"{dataset}/{field}"
        for dataset, group in sorted(root.groups())
        for field, leaf in sorted(group.groups())
        if variable in leaf
    ]


def get_array(group: zarr.Group, name: str) -> zarr.Array:
    """The array ``name`` of ``group``; raises :class:`StoreError` where that is no array."""
    try:
        found = group[name]
    except KeyError as error:
        raise StoreError(f"{group.store_path}: no array {name!r}") from error
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{group.store_path}/{name}: expected an array, found a group")
    return found


def get_group(group: zarr.Group, path: str) -> zarr.Group:
    """The child group at ``path``; raises :class:`StoreError` where that is no group."""
    try:
        found = group[path]
    except KeyError as error:
        raise StoreError(f"{group.store_path}: no group {path!r}") from error
    if not isinstance(found, zarr.Group):
        raise StoreError(f"{group.store_path}/{path}: expected a group, found an array")
    return found


def create_array(
    group: zarr.Group,
    name: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dims: tuple[str, ...],
    dtype: Any,
    shards: tuple[int, ...] | None = None,
    fill_value: Any = None,
) -> zarr.Array:
    """Create an array's metadata; nothing of its values is written.

    Empty chunks are written too, so that a chunk of fill values counts as written. Floats are filled
    with NaN unless told otherwise: a missing distance must not read as a small one.
    """
    is_text = dtype is str
    if fill_value is None:
        fill_value = "" if is_text else np.nan if np.dtype(dtype).kind == "f" else 0
    return group.create_array(
        name,
        shape=shape,
        # Zarr wants chunks of at least 1, also along an axis that is still empty.
        chunks=tuple(max(1, c) for c in chunks),
        shards=shards,
        dtype=dtype,
        fill_value=fill_value,
        dimension_names=dims,
        compressors=None if is_text else COMPRESSION,
        config={"write_empty_chunks": True},
    )


def rows_per_shard(frames_per_sequence: int, frame_bytes: int) -> int:
    """How many sequences make a shard of about :data:`SHARD_BYTES`; at least one."""
    return max(1, SHARD_BYTES // max(1, frames_per_sequence * frame_bytes))


def write_rows(array: zarr.Array, start: int, values: np.ndarray, *, axis: int = 0) -> None:
    """Write whole rows along ``axis``, beginning at ``start``, as whole chunks or shards.

    Raises
    ------
    StoreError
        When the block does not begin and end at a chunk (or shard) boundary or at the array's end,
        does not fit the array, or would touch a chunk that another writer owns.
    """
    unit = (array.shards or array.chunks)[axis]
    stop = start + values.shape[axis]
    expected = list(array.shape)
    expected[axis] = values.shape[axis]
    if list(values.shape) != expected:
        raise StoreError(f"{array.store_path}: block of shape {values.shape}; expected {tuple(expected)}")
    if start % unit or (stop % unit and stop != array.shape[axis]) or stop > array.shape[axis]:
        raise StoreError(
            f"{array.store_path}: rows {start}:{stop} are not whole blocks of {unit} along axis {axis} "
            f"(length {array.shape[axis]}); a partial write would race with the block's other writer"
        )
    region: list[Any] = [slice(None)] * array.ndim
    region[axis] = slice(start, stop)
    array[tuple(region)] = values


def read(array: zarr.Array, region: Any = ...) -> np.ndarray:
    """Read a region of an array as NumPy; text comes as a ``str`` object array."""
    values = np.asarray(array[region])
    return values.astype(object) if values.dtype.kind == "T" else values


def resize_rows(array: zarr.Array, length: int, *, axis: int = 0) -> None:
    """Make an array longer or shorter along ``axis``; rows beyond the end are deleted."""
    shape = list(array.shape)
    if shape[axis] != length:
        shape[axis] = length
        array.resize(tuple(shape))


def set_attributes(group: zarr.Group, attributes: Mapping[str, Any]) -> None:
    """Update a group's attributes with JSON values, in one write."""
    group.update_attributes(json.loads(json.dumps(dict(attributes))))


def open_dataset(path: str | os.PathLike[str], key: str) -> xr.Dataset:
    """One group of a store as a lazy :class:`xarray.Dataset` (no Dask)."""
    return xr.open_zarr(str(path), group=key, consolidated=False, chunks=None)


def iterate_datasets(path: str | os.PathLike[str], variable: str) -> Iterator[tuple[str, xr.Dataset]]:
    """All ``(<dataset>/<field>, dataset)`` of a store whose group holds ``variable``."""
    for key in field_keys(open_store(path), variable):
        yield key, open_dataset(path, key)


def consolidate(path: str | os.PathLike[str]) -> None:
    """Write consolidated metadata, so that xarray opens the store in one read."""
    zarr.consolidate_metadata(str(path), zarr_format=3)


def drop_consolidated(path: str | os.PathLike[str]) -> None:
    """Remove consolidated metadata before the hierarchy changes: stale, it would hide what is new."""
    document = Path(path) / "zarr.json"
    if not document.exists():
        return
    metadata = json.loads(document.read_text())
    if metadata.pop("consolidated_metadata", None) is not None:
        partial = document.with_suffix(".json.tmp")
        partial.write_text(json.dumps(metadata, indent=2))
        partial.replace(document)


def store_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Decoded size of an array in bytes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
