"""The only Zarr I/O: create, open, read, write one aligned block.

Metadata first, then region writes. A writer owns whole chunks, or whole shards where an array is
sharded: two writers in one shard lose data silently, and neither zarr nor xarray check it for NumPy
input, so :func:`write_rows` does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, ObjectStore

from pipeline.storage import digests, limits, locks, objects, schema
from pipeline.storage.address import absolute, is_address
from pipeline.storage.text_chunks import read_texts

Group = zarr.Group
Array = zarr.Array

COMPRESSION = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
CHECKSUM = Crc32cCodec()
"""Last codec of every chunk: one that was damaged raises when it is read, and never gives other values."""
DOCUMENT = "zarr.json"
"""Name of the metadata document of a group or an array."""
SHARD_BYTES = 128 * 2**20
"""Target size of a shard of decoded frames; it holds a whole number of sequences, at least one."""
SHARD_CHUNKS = 4096
"""Most chunks in a shard: a shard's index, 16 bytes a chunk, is read before any frame of it."""


class StoreError(RuntimeError):
    """A store that cannot be opened or a write that would damage one."""


class DamagedError(StoreError):
    """Values in a store that are not those that were written; ``damage`` says which, and names no folder."""

    def __init__(self, where: str, damage: str) -> None:
        super().__init__(where, damage)
        self.damage = damage

    def __str__(self) -> str:
        where, damage = self.args
        return f"{where}: {damage}; 'lsim verify' lists all that is damaged in a store"


class OversizedError(StoreError):
    """An array that claims more than this machine's memory; ``claim`` says how much, and names no folder."""

    def __init__(self, where: str, claim: str) -> None:
        super().__init__(where, claim)
        self.claim = claim

    def __str__(self) -> str:
        return ": ".join(self.args)


UNREADABLE = (ValueError, RuntimeError, SystemError, MemoryError)
"""What codecs raise for bytes that they did not write: each has kinds of its own."""
NO_METADATA = (ValueError, KeyError, TypeError, AttributeError)
"""What Zarr raises for a document that it did not write: no JSON, or without what belongs in it."""
NO_DIGEST = (
    "consolidated metadata without the digest that was written with it, or of a version that wrote none: run "
    "again what made this store"
)
MOST_CHUNKS = 10**8
"""Of one array, where each is looked at: metadata of a few bytes may claim 10¹²."""


def open_store(path: str | os.PathLike[str], mode: Literal["r", "r+", "a"] = "r") -> Group:
    """Open a store's root group; ``"a"`` creates it when absent.

    Raises
    ------
    StoreError
        When there is no Zarr group at ``path`` and ``mode`` is not ``"a"``.
    """
    try:
        return zarr.open_group(_storage(path), mode=mode, zarr_format=3, use_consolidated=False)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no Zarr store here") from error
    except NO_METADATA as error:
        if not exists(path):
            raise
        raise DamagedError(str(path), f"{DOCUMENT}: {_unreadable(error)}") from error


def _unreadable(error: Exception) -> str:
    return f"no metadata of Zarr ({type(error).__name__}: {' '.join(str(error).split())})"


class _AddressStore(ObjectStore[Any]):
    """Zarr's store of an address, which messages call by the address."""

    def __init__(self, store: Any, *, read_only: bool = False, address: str = "") -> None:
        super().__init__(store, read_only=read_only)
        self._address = address

    def with_read_only(self, read_only: bool = False) -> _AddressStore:
        return type(self)(self.store, read_only=read_only, address=self._address)

    def __str__(self) -> str:
        return self._address

    async def get(self, *arguments: Any, **named: Any) -> Any:
        with objects.in_one_line(self._address):
            return await super().get(*arguments, **named)

    async def get_partial_values(self, *arguments: Any, **named: Any) -> Any:
        with objects.in_one_line(self._address):
            return await super().get_partial_values(*arguments, **named)

    async def exists(self, key: str) -> bool:
        with objects.in_one_line(self._address):
            return await super().exists(key)

    async def getsize(self, key: str) -> int:
        with objects.in_one_line(self._address):
            return await super().getsize(key)

    async def getsize_prefix(self, prefix: str) -> int:
        with objects.in_one_line(self._address):
            return await super().getsize_prefix(prefix)

    async def set(self, key: str, value: Any) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        locks.check(self._address)
        with objects.in_one_line(self._address):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        with objects.in_one_line(self._address):
            await super().delete_dir(prefix)

    async def list(self) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            async for key in super().list():
                yield key

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            async for key in super().list_prefix(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        with objects.in_one_line(self._address):
            found = await objects.names_directly_below(self.store, prefix)
        for name in found:
            yield name


def _storage(path: str | os.PathLike[str]) -> str | _AddressStore:
    """What zarr and xarray open: obstore for an address; for a path itself, of which zarr makes a LocalStore.

    Never fsspec for paths: it shows half-written chunks.
    """
    location = absolute(path)
    return _AddressStore(objects.connect(location), address=location) if is_address(location) else location


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a store at a path or address."""
    return _read_document(path) is not None


def _read_document(path: str | os.PathLike[str]) -> bytes | None:
    """The root's metadata document; None where there is none."""
    location = absolute(path)
    if is_address(location):
        return objects.read(location, DOCUMENT)
    document = Path(location) / DOCUMENT
    return document.read_bytes() if document.exists() else None


def open_output(path: str | os.PathLike[str], kind: str) -> Group:
    """Open a store to bring it up to date, created when absent.

    Raises
    ------
    StoreError
        When there is a store of another kind or version, which writing would damage.
    """
    _refuse_foreign(absolute(path))
    root = open_store(path, "a")
    found = (root.attrs.get("kind"), root.attrs.get("schema_version"))
    if found == (None, None) and next(iter(root.members()), None) is None:
        set_attributes(root, {"kind": kind, "schema_version": schema.SCHEMA_VERSION})
    elif found != (kind, schema.SCHEMA_VERSION):
        raise StoreError(
            f"{path}: expected a store of kind {kind!r}, schema_version {schema.SCHEMA_VERSION}; found kind "
            f"{found[0]!r}, schema_version {found[1]!r}: choose another path"
        )
    return root


def _refuse_foreign(location: str) -> None:
    """A folder with something else in it is nobody's to write to."""
    if is_address(location):
        if not exists(location) and (name := next(objects.names(location), None)) is not None:
            raise StoreError(f"{location}: no Zarr store, and not empty ({name}); choose another address")
        return
    path = Path(location)
    if path.is_file():
        raise StoreError(f"{path}: expected a folder for the store, found a file")
    if path.is_dir() and not (path / DOCUMENT).exists() and any(path.iterdir()):
        raise StoreError(f"{path}: a folder that is no Zarr store and not empty; choose another path")


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only process that brings a store up to date; workers write under their driver's lock.

    Raises
    ------
    StoreError
        When another process does so already, and when a disk is full meanwhile.
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
            f"{path}: {error.strerror}; what is finished is kept: make space, and run the same command again"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk, or one's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def revision(path: str | os.PathLike[str], variable: str) -> str:
    """Hash of a text variable of all groups; that of the fingerprints changes when the values do."""
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
    """The ``<dataset>/<field>`` paths of all groups, two levels down, that hold ``variable``.

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
        check_documents(root)
        raise


def get_array(group: Group, name: str) -> Array:
    """The array ``name`` of ``group``; raises :class:`StoreError` where that is no array."""
    try:
        found = group[name]
    except NO_METADATA as error:
        _name_document(group, name, error)
        raise StoreError(f"{group.store_path}: no array {name!r}") from error
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{group.store_path}/{name}: expected an array, found a group")
    # Zarr stores no such setting. A chunk of NaN counts as written: only one that is lost is absent.
    return found.with_config({"write_empty_chunks": True}) if found.dtype.kind == "f" else found


def get_group(group: Group, path: str) -> Group:
    """The child group at ``path``; raises :class:`StoreError` where that is no group."""
    try:
        found = group[path]
    except NO_METADATA as error:
        _name_document(group, path, error)
        raise StoreError(f"{group.store_path}: no group {path!r}") from error
    if not isinstance(found, zarr.Group):
        raise StoreError(f"{group.store_path}/{path}: expected a group, found an array")
    return found


def _name_document(group: Group, path: str, error: Exception) -> None:
    """Raise :class:`DamagedError` where a document is there, and is what an error is about."""
    document = f"{path}/{DOCUMENT}"
    if sync(group.store.exists(f"{group.path}/{document}".lstrip("/"))):
        raise DamagedError(str(group.store_path), f"{document}: {_unreadable(error)}") from error


def listed_members(root: Group) -> dict[str, Any] | None:
    """Metadata of all groups and arrays by path, as consolidated; None where a run has not come to its end.

    A run removes it before it changes anything, and writes it anew when it is done.
    """
    data = sync(root.store.get(DOCUMENT, default_buffer_prototype()))
    document: dict[str, Any] = json.loads(data.to_bytes()) if data is not None else {}
    consolidated = document.get("consolidated_metadata")
    return None if consolidated is None else dict(consolidated["metadata"])


def members(
    group: Group, listed: Mapping[str, Any] | None
) -> tuple[dict[str, Array], dict[str, Group], dict[str, str]]:
    """Arrays and groups in a group, and why others that should be there can't be opened, by name.

    Parameters
    ----------
    group : Group
    listed : mapping or None
        See :func:`listed_members`; without it nobody knows what is lost.
    """

    async def names() -> list[str]:
        return [name async for name in group.store.list_dir(group.path)]

    prefix = f"{group.path}/" if group.path else ""
    inside = (path.removeprefix(prefix) for path in listed or () if path.startswith(prefix))
    expected = {name for name in inside if "/" not in name}
    arrays, groups, faults = {}, {}, {}
    for name in sorted({*sync(names()), *expected} - {DOCUMENT}):
        try:
            found = group[name]
        except NO_METADATA as error:
            if sync(group.store.exists(f"{prefix}{name}/{DOCUMENT}")):
                faults[name] = _unreadable(error)
            elif name in expected:
                faults[name] = "missing"
            continue
        if name in expected and _document_of(found) != _without_members((listed or {})[f"{prefix}{name}"]):
            faults[name] = "other metadata than the consolidated metadata of the root has"
        elif isinstance(found, zarr.Array):
            arrays[name] = get_array(group, name)
        else:
            groups[name] = found
    return arrays, groups, faults


def _document_of(found: Array | Group) -> dict[str, Any]:
    """Metadata of a group or an array, as its document has it."""
    buffers = found.metadata.to_buffer_dict(default_buffer_prototype())
    document: dict[str, Any] = json.loads(buffers[DOCUMENT].to_bytes())
    return _without_members(document)


def _without_members(document: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a group or an array without users' attributes, and what it lists of its members."""
    rest = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    return rest | {"attributes": _own(document.get("attributes", {}))}


def _own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that the stages write; users may add others to a store that is done."""
    return {name: value for name, value in attributes.items() if name in schema.ATTRIBUTES}


def root_fault(root: Group) -> str:
    """Say what is wrong with the root's own metadata, which has a digest where a run came to its end.

    A run that is under way, or was stopped, has removed it with the consolidated metadata. Stores that don't
    say their kind were made by others.
    """
    data = sync(root.store.get(DOCUMENT, default_buffer_prototype()))
    document: dict[str, Any] = json.loads(data.to_bytes()) if data is not None else {}
    attributes = document.get("attributes", {})
    if "digest" not in attributes:
        ended = document.get("consolidated_metadata") is not None
        of_ours = not attributes.keys().isdisjoint(("kind", "schema_version"))
        return NO_DIGEST if ended and of_ours else ""
    if _seal_of_root(document) == document:
        return ""
    return "attributes, or consolidated metadata, that are not those that were written with it"


def _seal_of_root(document: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the root's document, as an attribute, the digest of its attributes and consolidated metadata."""
    attributes = document.get("attributes", {})
    listed = (document.get("consolidated_metadata") or {}).get("metadata", {})
    of_members = {path: _without_members(member) for path, member in listed.items()}
    digest = digests.hash_document([_own(attributes), of_members])
    return {**document, "attributes": {**attributes, "digest": digest}}


def check_documents(root: Group, *, itself: bool = True) -> None:
    """Raise :class:`DamagedError` for metadata documents that are lost, changed, or that cannot be read.

    One that is lost shows where it is listed in the consolidated metadata: Zarr itself takes a group or an
    array without a document for none. So does one that says something else than is listed there.

    Parameters
    ----------
    root : Group
    itself : bool
        Whether the root's own document is looked at as well.
    """
    if itself and (fault := root_fault(root)):
        raise DamagedError(str(root.store_path), f"{DOCUMENT}: {fault}")
    listed = listed_members(root)

    def visit(group: Group) -> Iterator[str]:
        _, groups, faults = members(group, listed)
        for name, reason in faults.items():
            yield f"{group.path}/{name}/{DOCUMENT}: {reason}".lstrip("/")
        for child in groups.values():
            yield from visit(child)

    if found := list(visit(root)):
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise DamagedError(str(root.store_path), "; ".join(found[:3]) + more)


def paths_of_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of a store's groups and arrays that have a metadata document, whether the root has one or not."""
    location = absolute(path)
    if is_address(location):
        found: Iterable[str] = objects.names(location)
    else:
        found = (file.relative_to(location).as_posix() for file in Path(location).rglob(DOCUMENT))
    for name in found:
        folder, _, last = name.rpartition("/")
        if last == DOCUMENT and folder:
            yield folder


def restore_root(path: str | os.PathLike[str], attributes: Mapping[str, Any]) -> None:
    """Write a lost metadata document of the root again, with these attributes alone."""
    _write_document(path, {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def _replace(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_bytes(content)
    partial.replace(file)


def restore_document(root: Group, path: str) -> None:
    """Write a lost document of a group or an array again, as it is in the consolidated metadata.

    Raises
    ------
    StoreError
        When there is no consolidated metadata, or the document isn't listed there.
    """
    listed = listed_members(root)
    if listed is None or path not in listed:
        raise StoreError(
            f"{root.store_path}: {path}/{DOCUMENT} is listed nowhere else, and cannot be restored"
        )
    # Of a group, it has a list of members as well, which is empty.
    document = {name: value for name, value in listed[path].items() if name != "consolidated_metadata"}
    data = default_buffer_prototype().buffer.from_bytes(json.dumps(document, indent=2).encode())
    sync(root.store.set(f"{path}/{DOCUMENT}", data))


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
        compressors=(CHECKSUM,) if is_text else (COMPRESSION, CHECKSUM),
        config={"write_empty_chunks": True},
    )


def create_group(parent: zarr.Group, path: str) -> zarr.Group:
    """Create an empty group at ``path``; whatever stood there is deleted."""
    return parent.create_group(path, overwrite=True)


def delete(parent: zarr.Group, path: str) -> None:
    """Delete the array or group at ``path``, with all that is in it; nothing there is no error."""
    if path in parent:
        del parent[path]


def rows_per_shard(frames_per_sequence: int, frame_bytes: int) -> int:
    """How many sequences make a shard of about :data:`SHARD_BYTES`; at least one, and not too many chunks."""
    by_bytes = SHARD_BYTES // max(1, frames_per_sequence * frame_bytes)
    return max(1, min(by_bytes, SHARD_CHUNKS // max(1, frames_per_sequence)))


def write_block(array: Array, origin: tuple[int, ...], values: np.ndarray) -> None:
    """Write a block that consists of whole chunks, or of whole shards where the array is sharded.

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
    """Read a region of an array as NumPy; text comes as a ``str`` object array.

    Raises
    ------
    DamagedError
        Naming the chunks that cannot be decoded.
    OversizedError
        When the region is larger than the memory of this machine; nothing is allocated.
    """
    check_fits(array, region)
    if (found := _read_text_files(array, region)) is not None:
        return found
    with damage_named(array, region):
        values = np.asarray(array[region])
    return values.astype(object) if values.dtype.kind == "T" else values


def _read_text_files(array: Array, region: Any) -> np.ndarray | None:
    """A region of text in files, past Zarr; None where Zarr has to read it, or say what is damaged."""
    parts = region if isinstance(region, tuple) else () if region is ... else (region,)
    codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]  # type: ignore[union-attr]
    if (
        codecs not in (["vlen-utf8"], ["vlen-utf8", "crc32c"])
        or not isinstance(array.store, LocalStore)
        or not all(isinstance(part, slice) and part.step in (None, 1) for part in parts)
    ):
        return None
    parts = (*parts, *[slice(None)] * (array.ndim - len(parts)))
    ranges = [part.indices(length) for part, length in zip(parts, array.shape, strict=True)]
    return read_texts(
        array.store.root / array.path,
        array.metadata.encode_chunk_key,
        array.chunks,
        [slice(start, max(start, stop)) for start, stop, _ in ranges],
        checked=len(codecs) == 2,
        fill=str(array.fill_value),
    )


def check_fits(array: Array, region: Any = ...) -> None:
    """Raise :class:`OversizedError` where a region of slices and whole numbers, or a chunk, is beyond memory.

    Shapes are claims: metadata of a few bytes may speak of a petabyte.
    """
    parts = region if isinstance(region, tuple) else () if region is ... else (region,)
    shape = [
        len(range(*part.indices(length))) if isinstance(part, slice) else 1
        for part, length in zip((*parts, *[slice(None)] * array.ndim), array.shape, strict=False)
    ]
    memory = limits.memory_bytes()
    for what, counts in (("values of shape", shape), ("a chunk of shape", array.chunks)):
        if (nbytes := limits.array_bytes(counts, array.dtype.itemsize)) > memory:
            raise OversizedError(
                str(array.store_path),
                f"{what} {tuple(counts)} would take {limits.readable(nbytes)}; this machine has "
                f"{limits.readable(memory)} of memory",
            )


@contextlib.contextmanager
def damage_named(array: Array, region: Any = ...) -> Iterator[None]:
    """Make an error of reading a region a :class:`DamagedError` that names the damaged chunks, if any are."""
    try:
        yield
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        damaged = damaged_chunks(array, region)
        if not damaged:
            raise
        raise DamagedError(str(array.store_path), damaged_text(damaged)) from error


@dataclass(frozen=True)
class DamagedChunk:
    """A chunk that cannot be decoded: its key, the index of its first value, and what decoding it says.

    Chunks of one shard have the key of the shard.
    """

    key: str
    start: tuple[int, ...]
    reason: str


def damaged_text(damaged: Sequence[DamagedChunk], shown: int = 3) -> str:
    """Damaged chunks in words, the first few by name."""
    named = "; ".join(f"chunk {c.key} (from {c.start}) is damaged: {c.reason}" for c in damaged[:shown])
    return named + (f"; and {len(damaged) - shown} more" if len(damaged) > shown else "")


def damaged_chunks(array: Array, region: Any = ...) -> list[DamagedChunk]:
    """The chunks that a region touches and that cannot be decoded, found by reading each by itself."""
    found = []
    for start in chunk_starts(array, region):
        try:
            read_chunk(array, start)
        except (*UNREADABLE, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if "checksum do not match" in reason:
                reason = "its checksum does not match"
            found.append(DamagedChunk(chunk_key(array, start), start, reason))
    return found


def chunk_count(array: Array) -> int:
    """How many chunks an array has by its metadata.

    Raises
    ------
    OversizedError
        For more than :data:`MOST_CHUNKS`, which nobody can look at one by one.
    """
    count = math.prod(-(-length // chunk) for length, chunk in zip(array.shape, array.chunks, strict=True))
    if count > MOST_CHUNKS:
        raise OversizedError(
            str(array.store_path),
            f"shape {array.shape} in chunks of {array.chunks} would be {count} chunks; {MOST_CHUNKS} at most "
            "are looked at",
        )
    return count


def missing_chunks(array: Array, region: Any = ...) -> list[str]:
    """Keys of the chunks (or shards) that a region touches and that are not in the store."""
    keys = dict.fromkeys(chunk_key(array, start) for start in chunk_starts(array, region))
    return [key for key in keys if not sync(array.store.exists(f"{array.path}/{key}"))]


def delete_chunk(array: Array, key: str) -> None:
    """Delete a chunk (or shard) by its key: its values read as fill values; nothing there is no error."""
    sync(array.store.delete(f"{array.path}/{key}"))


def chunk_starts(array: Array, region: Any = ...) -> Iterator[tuple[int, ...]]:
    """Index of the first value of every chunk that a region of slices and whole numbers touches."""
    parts = region if isinstance(region, tuple) else () if region is ... else (region,)
    spans = []
    for axis, (length, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)):
        part = parts[axis] if axis < len(parts) else slice(None)
        whole = part if isinstance(part, slice) else slice(int(part), int(part) + 1)
        first, stop, _ = whole.indices(length)
        spans.append(range(first - first % chunk, stop, chunk))
    yield from itertools.product(*spans)


def read_chunk(array: Array, start: tuple[int, ...]) -> np.ndarray:
    """The chunk whose first value is at ``start``, as it is in the store; may raise whatever codecs do."""
    return np.asarray(array[tuple(slice(a, a + chunk) for a, chunk in zip(start, array.chunks, strict=True))])


def chunk_key(array: Array, start: tuple[int, ...]) -> str:
    """Key, below its array, of the chunk or shard that holds the value at ``start``."""
    units = array.shards or array.chunks
    return array.metadata.encode_chunk_key(tuple(a // unit for a, unit in zip(start, units, strict=True)))


def resize_rows(array: Array, length: int, *, axis: int = 0) -> None:
    """Make an array longer or shorter along ``axis``; rows beyond the end are deleted."""
    shape = list(array.shape)
    if shape[axis] != length:
        shape[axis] = length
        array.resize(tuple(shape))


def set_attributes(group: Group, attributes: Mapping[str, Any]) -> None:
    """Update a group's attributes with JSON values, in one write; the root's lose their digest."""
    if not group.path:
        group.metadata.attributes.pop("digest", None)
    group.update_attributes(json.loads(json.dumps(dict(attributes))))


def set_units(array: Array, units: str) -> None:
    """Say what an array's values are in, or nothing where it isn't known; written where it changes."""
    if units != array.attrs.get("units", ""):
        array.update_attributes({"units": units})


def set_directed(array: Array, directed: bool) -> None:
    """Say whether an array's [i, j] and [j, i] may differ; written where it changes."""
    if directed != bool(array.attrs.get(schema.DIRECTED, False)):
        array.update_attributes({schema.DIRECTED: directed})


def open_dataset(path: str | os.PathLike[str], key: str) -> xr.Dataset:
    """One group of a store as a lazy :class:`xarray.Dataset` (no Dask)."""
    return xr.open_zarr(_storage(path), group=key, consolidated=False, chunks=None)


def load_dataset(path: str | os.PathLike[str], key: str, names: Sequence[str] | None = None) -> xr.Dataset:
    """One group of a store with variables in memory: those of ``names``, or all; the others stay lazy.

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
    """All ``(<dataset>/<field>, dataset)`` of a store whose group holds ``variable``."""
    for key in field_keys(open_store(path), variable):
        yield key, open_dataset(path, key)


def specifications(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(metric, specification)`` of every field of a ``distances.zarr`` that records one.

    A run that was stopped before its first block may have named a metric and not described it. A
    specification of another metric or field is left out: :mod:`pipeline.storage.recorded` tells of what it
    damages.
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
    with warnings.catch_warnings():
        # Readers that don't know it read the arrays' own metadata, which are there as well.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(_storage(path), zarr_format=3)
    _write_document(path, _seal_of_root(json.loads(_read_document(path) or b"{}")))


def _write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Replace the root's metadata document, whole or not at all."""
    location, data = absolute(path), json.dumps(document, indent=2).encode()
    if is_address(location):
        objects.write(location, DOCUMENT, data)
    else:
        _replace(Path(location) / DOCUMENT, data)


def is_consolidated(path: str | os.PathLike[str]) -> bool:
    """Whether the store at ``path`` has consolidated metadata."""
    document = _read_document(path)
    return document is not None and json.loads(document).get("consolidated_metadata") is not None


def drop_consolidated(path: str | os.PathLike[str]) -> None:
    """Remove consolidated metadata before the hierarchy changes: stale, it would hide what is new."""
    document = json.loads(_read_document(path) or b"{}")
    sealed = document.get("attributes", {}).pop("digest", None) is not None
    if document.pop("consolidated_metadata", None) is not None or sealed:
        _write_document(path, document)


def remove_partials(path: str | os.PathLike[str]) -> None:
    """Remove what a killed writer left half-written; only while nobody else writes to the store.

    Object stores have no such thing: an object is there whole, or not at all.
    """
    location = absolute(path)
    if is_address(location):
        return
    for partial in Path(location).rglob("*.partial"):
        partial.unlink()


def store_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Decoded size of an array in bytes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
