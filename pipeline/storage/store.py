"""Create, open, read and write stores: the only Zarr I/O, with the other files of this folder.

Metadata first, then region writes. A writer owns whole chunks, or whole shards where an array is sharded. Two
writers in one shard lose data silently, and neither zarr nor xarray checks this for NumPy input, so
:func:`write_block` does. :mod:`pipeline.storage.metadata` has the metadata documents,
:mod:`pipeline.storage.chunks` the chunks of an array one by one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import WrapperStore

from pipeline.storage import digests, locks, metadata, objects, schema
from pipeline.storage.address import absolute, is_address
from pipeline.storage.address_store import zarr_store
from pipeline.storage.chunks import check_fits, damage_named, write_nan_chunks
from pipeline.storage.errors import NO_METADATA, StoreError
from pipeline.storage.errors import DamagedError as DamagedError  # raised by read and others
from pipeline.storage.errors import OversizedError as OversizedError  # raised by read and others
from pipeline.storage.zarrs_reading import read_shards

Group = zarr.Group
Array = zarr.Array

COMPRESSION = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
CHECKSUM = Crc32cCodec()
"""Last codec of every chunk: a damaged chunk raises an error, and never reads as other values."""
SHARD_BYTES = 128 * 2**20
"""Target size of a shard of decoded frames; it holds a whole number of sequences, at least one."""
SHARD_CHUNKS = 4096
"""Most chunks in a shard: a shard's index, 16 bytes a chunk, is read before any frame of it."""


def open_store(path: str | os.PathLike[str], mode: Literal["r", "r+", "a"] = "r") -> Group:
    """Open a store's root group; ``"a"`` creates it when absent.

    Raises
    ------
    StoreError
        When there is no Zarr group at ``path`` and ``mode`` is not ``"a"``.
    """
    try:
        return zarr.open_group(zarr_store(path), mode=mode, zarr_format=3, use_consolidated=False)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no Zarr store here") from error
    except NO_METADATA as error:
        if not exists(path):
            raise
        raise metadata.unreadable_root(path, error) from error


def open_node(path: str | os.PathLike[str]) -> Any:
    """Open an array or a group of others, in either format of Zarr, to read it."""
    return zarr.open(str(path), mode="r")


def exists(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is a store at a path or address."""
    return metadata.read_document(path) is not None


def open_output(path: str | os.PathLike[str], kind: str) -> Group:
    """Open a store to bring it up to date; create it when absent.

    Parameters
    ----------
    path : path or address
    kind : str
        Attribute ``kind`` of the store, see :mod:`pipeline.storage.schema`.

    Raises
    ------
    StoreError
        When there is a store of another kind or version, which writing would damage, or anything else.
    """
    _refuse_foreign(absolute(path))
    root = open_store(path, "a")
    identity = (root.attrs.get("kind"), root.attrs.get("schema_version"))
    if identity == (None, None) and next(iter(root.members()), None) is None:
        set_attributes(root, {"kind": kind, "schema_version": schema.SCHEMA_VERSION})
    elif identity != (kind, schema.SCHEMA_VERSION):
        raise StoreError(
            f"{path}: expected a store of kind {kind!r}, schema_version {schema.SCHEMA_VERSION}; found kind "
            f"{identity[0]!r}, schema_version {identity[1]!r}: choose another path"
        )
    return root


def _refuse_foreign(location: str) -> None:
    """Refuse to write into a folder that isn't empty and holds no store."""
    if is_address(location):
        name = None if exists(location) else next(objects.names(location), None)
        if name is not None:
            raise StoreError(f"{location}: no Zarr store, and not empty ({name}); choose another address")
        return
    path = Path(location)
    if path.is_file():
        raise StoreError(f"{path}: expected a folder for the store, found a file")
    if path.is_dir() and not (path / metadata.DOCUMENT).exists() and any(path.iterdir()):
        raise StoreError(f"{path}: a folder that is no Zarr store and not empty; choose another path")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a store while it is brought up to date; workers write under their driver's lock.

    Raises
    ------
    StoreError
        When another process holds the lock, and when a disk fills up in the meantime.
    """
    location = absolute(path)
    _refuse_foreign(location)
    try:
        with locks.hold(location):
            yield
    except locks.LockedError as error:
        raise StoreError(str(error)) from error
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise StoreError(
            f"{path}: {error.strerror}; finished work is kept: make space, and run the same command again"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error means that a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def revision(path: str | os.PathLike[str], variable: str) -> str:
    """Hash a text variable over all groups; the hash of all fingerprints changes when any value does."""
    digest = hashlib.sha256()

    def visit(group: Group, prefix: str) -> None:
        for name, array in sorted(group.arrays()):
            if name == variable:
                digest.update(json.dumps([prefix, read(array).tolist()]).encode())
        for name, child in sorted(group.groups()):
            visit(child, f"{prefix}/{name}")

    visit(open_store(path), "")
    return digest.hexdigest()[:32]


def field_keys(root: Group, variable: str) -> list[str]:
    """List the ``<dataset>/<field>`` paths of all groups, two levels down, that hold ``variable``.

    Raises
    ------
    DamagedError
        Naming the metadata documents that cannot be read.
    """
    try:
        return [
            f"{dataset}/{field}"
            for dataset, group in sorted(root.groups())
            for field, leaf in sorted(group.groups())
            if variable in leaf
        ]
    except NO_METADATA:
        metadata.check_documents(root)
        raise


def get_array(group: Group, name: str) -> Array:
    """Open the array ``name`` of ``group``; raise :class:`StoreError` where there is none."""
    try:
        member = group[name]
    except NO_METADATA as error:
        metadata.raise_unreadable(group, name, error)
        raise StoreError(f"{group.store_path}: no array {name!r}") from error
    if not isinstance(member, zarr.Array):
        raise StoreError(f"{group.store_path}/{name}: expected an array, found a group")
    return write_nan_chunks(member)


def get_group(group: Group, path: str) -> Group:
    """Open the child group at ``path``; raise :class:`StoreError` where there is none."""
    try:
        member = group[path]
    except NO_METADATA as error:
        metadata.raise_unreadable(group, path, error)
        raise StoreError(f"{group.store_path}: no group {path!r}") from error
    if not isinstance(member, zarr.Group):
        raise StoreError(f"{group.store_path}/{path}: expected a group, found an array")
    return member


def create_array(
    group: Group,
    name: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dims: tuple[str, ...],
    dtype: Any,
    shards: tuple[int, ...] | None = None,
    fill_value: Any = None,
) -> Array:
    """Create an array's metadata, and write none of its values.

    Parameters
    ----------
    group : Group
    name : str
    shape, chunks : tuple of int
    dims : tuple of str
        Names of the dimensions.
    dtype : dtype
        ``str`` for texts.
    shards : tuple of int, optional
        Shape of a shard; none by default.
    fill_value : optional
        By default NaN for floats, since a missing distance must not read as a small one; else 0 or "".

    Returns
    -------
    Array
        It writes empty chunks too, so that a chunk of fill values counts as written.
    """
    is_text = dtype is str
    if fill_value is None:
        fill_value = "" if is_text else np.nan if np.dtype(dtype).kind == "f" else 0
    return group.create_array(
        name,
        shape=shape,
        # Zarr requires chunks of at least 1, even along an axis that is still empty.
        chunks=tuple(max(1, c) for c in chunks),
        shards=shards,
        dtype=dtype,
        fill_value=fill_value,
        dimension_names=dims,
        compressors=(CHECKSUM,) if is_text else (COMPRESSION, CHECKSUM),
        config={"write_empty_chunks": True},
    )


def create_group(parent: zarr.Group, path: str) -> zarr.Group:
    """Create an empty group at ``path``; an array or group that is there is deleted."""
    return parent.create_group(path, overwrite=True)


def delete(parent: zarr.Group, path: str) -> None:
    """Delete the array or group at ``path`` with all its members; none there is no error."""
    if path in parent:
        del parent[path]


def rows_per_shard(frames_per_sequence: int, frame_bytes: int) -> int:
    """Choose the sequences in a shard: about :data:`SHARD_BYTES`, at least one, not too many chunks."""
    by_bytes = SHARD_BYTES // max(1, frames_per_sequence * frame_bytes)
    return max(1, min(by_bytes, SHARD_CHUNKS // max(1, frames_per_sequence)))


def write_block(array: Array, origin: tuple[int, ...], values: np.ndarray) -> None:
    """Write a block of whole chunks, or of whole shards where the array is sharded.

    Parameters
    ----------
    array : Array
    origin : tuple of int
        Index of the block's first value along each axis.
    values : ndarray
        As many axes as the array.

    Raises
    ------
    StoreError
        When the block does not begin and end at chunk (or shard) boundaries or at the array's end: it
        would touch a chunk that another writer owns.
    """
    units = array.shards or array.chunks
    if values.ndim != array.ndim or len(origin) != array.ndim:
        raise StoreError(f"{array.store_path}: block of shape {values.shape} at {origin} for {array.shape}")
    region = tuple(slice(start, start + length) for start, length in zip(origin, values.shape, strict=True))
    for axis, (part, unit, length) in enumerate(zip(region, units, array.shape, strict=True)):
        if part.start % unit or (part.stop % unit and part.stop != length) or part.stop > length:
            raise StoreError(
                f"{array.store_path}: {part.start}:{part.stop} is not whole blocks of {unit} along axis "
                f"{axis} (length {length}); a partial write would race with the block's other writer"
            )
    array[region] = values


def write_rows(array: Array, start: int, values: np.ndarray) -> None:
    """Write whole rows along the first axis, beginning at ``start``; see :func:`write_block`."""
    write_block(array, (start, *(0 for _ in array.shape[1:])), values)


def read(array: Array, region: Any = ...) -> np.ndarray:
    """Read a region of an array into memory; texts come as an object array of ``str``.

    Parameters
    ----------
    array : Array
    region : slices and integers, optional
        All by default.

    Raises
    ------
    DamagedError
        Naming the chunks that cannot be decoded.
    OversizedError
        When the region is larger than the memory of this machine; nothing is allocated.
    """
    check_fits(array, region)
    with damage_named(array, region):
        decoded = read_shards(array, region)
        values = np.asarray(array[region]) if decoded is None else decoded
    return values.astype(object) if values.dtype.kind == "T" else values


def resize_rows(array: Array, length: int, *, axis: int = 0) -> None:
    """Make an array longer or shorter along ``axis``; rows beyond the end are deleted."""
    shape = list(array.shape)
    if shape[axis] != length:
        shape[axis] = length
        array.resize(tuple(shape))


def set_attributes(group: Group, attributes: Mapping[str, Any]) -> None:
    """Update a group's attributes with JSON values, in one write; remove the digest of the root's."""
    if not group.path:
        group.metadata.attributes.pop("digest", None)
    group.update_attributes(json.loads(json.dumps(dict(attributes))))


def set_units(array: Array, units: str) -> None:
    """Record the units of an array's values, empty where unknown; write only a change."""
    if units != array.attrs.get("units", ""):
        array.update_attributes({"units": units})


def set_directed(array: Array, directed: bool) -> None:
    """Record whether an array's [i, j] and [j, i] may differ; write only a change."""
    if directed != bool(array.attrs.get(schema.DIRECTED, False)):
        array.update_attributes({schema.DIRECTED: directed})


def open_dataset(path: str | os.PathLike[str], key: str) -> xr.Dataset:
    """Open one group of a store as a lazy :class:`xarray.Dataset` (no Dask)."""
    return xr.open_zarr(zarr_store(path), group=key, consolidated=False, chunks=None)


def load_dataset(path: str | os.PathLike[str], key: str, names: Sequence[str] | None = None) -> xr.Dataset:
    """Open one group of a store and load variables: those of ``names``, or all; the others stay lazy.

    Raises
    ------
    DamagedError
        Naming the chunks that cannot be decoded.
    """
    group = get_group(open_store(path), key)
    for name, array in group.arrays():
        if getattr(array.metadata, "dimension_names", None) == (name,):
            read(array)  # xarray reads an index when it opens a group
    dataset = open_dataset(path, key)
    for name in map(str, dataset.variables) if names is None else names:
        if name in dataset.variables:
            check_fits(get_array(group, name))
            with damage_named(get_array(group, name)):
                dataset.variables[name].load()
    return dataset


def iterate_datasets(path: str | os.PathLike[str], variable: str) -> Iterator[tuple[str, xr.Dataset]]:
    """Yield ``(<dataset>/<field>, dataset)`` for all groups of a store that hold ``variable``."""
    for key in field_keys(open_store(path), variable):
        yield key, open_dataset(path, key)


def specifications(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(metric, specification)`` for every metric of every field of a ``distances.zarr``.

    A run that was stopped before its first block may have named a metric without its specification. A
    specification of another metric or field is left out: :mod:`pipeline.storage.recorded` reports it.
    """
    root = open_store(path)
    for key in field_keys(root, schema.PROVENANCE):
        provenance = get_group(root, f"{key}/{schema.PROVENANCE}")
        names, texts = (read(get_array(provenance, name)) for name in (schema.METRIC, schema.SPECIFICATION))
        for name, text in zip(names, texts, strict=False):
            if name and text:
                specification = json.loads(str(text))
                if digests.is_sealed(specification, key, str(name)):
                    yield str(name), {k: v for k, v in specification.items() if k != "digest"}


def consolidate(path: str | os.PathLike[str]) -> None:
    """Write consolidated metadata, so that xarray opens the store in one read."""
    root_document = _HeldDocument(open_store(path, "r+").store)
    with warnings.catch_warnings():
        # Readers that don't know consolidated metadata read the arrays' own.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(root_document, zarr_format=3)
    # In one write: a disk that fills up between two would leave metadata without its digest.
    metadata.write_document(path, metadata.seal_of_root(json.loads(root_document.document)))


class _HeldDocument(WrapperStore[Any]):
    """A store that holds what is written to its root's document, and writes nothing."""

    document = b"{}"

    async def set(self, key: str, value: Any) -> None:
        """Hold the root's document."""
        if key != metadata.DOCUMENT:
            raise StoreError(f"{key}: expected the root's document alone to be written")
        self.document = value.to_bytes()


def is_consolidated(path: str | os.PathLike[str]) -> bool:
    """Tell whether the store at ``path`` has consolidated metadata."""
    document = metadata.read_document(path)
    return document is not None and json.loads(document).get("consolidated_metadata") is not None


def drop_consolidated(path: str | os.PathLike[str]) -> None:
    """Remove consolidated metadata before the hierarchy changes: stale, it would hide what is new."""
    document = json.loads(metadata.read_document(path) or b"{}")
    sealed = document.get("attributes", {}).pop("digest", None) is not None
    if document.pop("consolidated_metadata", None) is not None or sealed:
        metadata.write_document(path, document)


def remove_partials(path: str | os.PathLike[str]) -> None:
    """Remove files that a killed writer left half-written; call it only under the store's lock.

    Object stores have none: an object is written whole or not at all.
    """
    location = absolute(path)
    if is_address(location):
        return
    for partial in Path(location).rglob("*.partial"):
        partial.unlink()


def store_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Compute the decoded size of an array in bytes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
