"""Metadata documents of a store: find lost and changed ones, seal the root's, and restore them.

Each group and array has a document of its own. A run that comes to its end writes a copy of them all into the
root's document (*consolidated metadata*), sealed by a digest. A document that is lost or changed later shows
beside that copy: Zarr itself simply doesn't see a group or an array without a document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from pipeline.storage import digests, locks, objects, schema
from pipeline.storage.address import absolute, is_address
from pipeline.storage.chunks import write_nan_chunks
from pipeline.storage.errors import NO_METADATA, DamagedError, StoreError

DOCUMENT = "zarr.json"
"""Name of the metadata document of a group or an array."""
NO_DIGEST = (
    "consolidated metadata without the digest that was written with it, or of a version that wrote none: run "
    "again what made this store"
)


# -- the root's document -----------------------------------------------------------------------------------


def read_document(path: str | os.PathLike[str]) -> bytes | None:
    """Read the root's metadata document; None where there is none."""
    location = absolute(path)
    if is_address(location):
        return objects.read(location, DOCUMENT)
    document = Path(location) / DOCUMENT
    return document.read_bytes() if document.exists() else None


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Replace the root's metadata document, whole or not at all.

    Raises
    ------
    pipeline.storage.locks.LockedError
        When this process has lost its lock on the store.
    """
    location, data = absolute(path), json.dumps(document, indent=2).encode()
    if is_address(location):
        locks.check(location)
        objects.write(location, DOCUMENT, data)
        return
    file = Path(location) / DOCUMENT
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_bytes(data)
    partial.replace(file)


def _document_of_root(root: zarr.Group) -> dict[str, Any]:
    """Read the root's document through its store; empty where there is none."""
    data = sync(root.store.get(DOCUMENT, default_buffer_prototype()))
    document: dict[str, Any] = json.loads(data.to_bytes()) if data is not None else {}
    return document


def seal_of_root(document: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the root's document, as an attribute, the digest of its attributes and consolidated metadata."""
    attributes = document.get("attributes", {})
    documents = (document.get("consolidated_metadata") or {}).get("metadata", {})
    of_members = {path: _without_members(member) for path, member in documents.items()}
    digest = digests.hash_document([_leave_out_users(attributes), of_members])
    return {**document, "attributes": {**attributes, "digest": digest}}


def root_fault(root: zarr.Group) -> str:
    """Say what is wrong with the root's own document, by its digest; empty where nothing is.

    A run that is under way, or was stopped, has removed the digest with the consolidated metadata. Stores
    that don't say their kind were made by others, and need none.
    """
    document = _document_of_root(root)
    attributes = document.get("attributes", {})
    if "digest" not in attributes:
        is_consolidated = document.get("consolidated_metadata") is not None
        ours = not attributes.keys().isdisjoint(("kind", "schema_version"))
        return NO_DIGEST if is_consolidated and ours else ""
    if seal_of_root(document) == document:
        return ""
    return "attributes, or consolidated metadata, that are not those that were written with it"


def listed_members(root: zarr.Group) -> dict[str, Any] | None:
    """Return the consolidated metadata of all groups and arrays by path.

    None where a run has not come to its end: it removes them before it changes anything, and writes them
    again when it is done.
    """
    consolidated = _document_of_root(root).get("consolidated_metadata")
    return None if consolidated is None else dict(consolidated["metadata"])


# -- documents of groups and arrays ------------------------------------------------------------------------


def members(
    group: zarr.Group, documents: Mapping[str, Any] | None
) -> tuple[dict[str, zarr.Array], dict[str, zarr.Group], dict[str, str]]:
    """Open all arrays and groups in a group.

    Parameters
    ----------
    group : Group
    documents : mapping or None
        See :func:`listed_members`; without it nothing tells which members are lost.

    Returns
    -------
    arrays : dict of str to Array
    groups : dict of str to Group
    faults : dict of str to str
        Why others that should be there can't be opened, by name.
    """

    async def names() -> list[str]:
        return [name async for name in group.store.list_dir(group.path)]

    prefix = f"{group.path}/" if group.path else ""
    inside = (path.removeprefix(prefix) for path in documents or () if path.startswith(prefix))
    child_names = {name for name in inside if "/" not in name}
    arrays, groups, faults = {}, {}, {}
    for name in sorted({*sync(names()), *child_names} - {DOCUMENT}):
        try:
            member = group[name]
        except NO_METADATA as error:
            if sync(group.store.exists(f"{prefix}{name}/{DOCUMENT}")):
                faults[name] = _unreadable(error)
            elif name in child_names:
                faults[name] = "missing"
            continue
        if name in child_names and _document_of(member) != _without_members(
            (documents or {})[f"{prefix}{name}"]
        ):
            faults[name] = "other metadata than the consolidated metadata of the root has"
        elif isinstance(member, zarr.Array):
            arrays[name] = write_nan_chunks(member)
        else:
            groups[name] = member
    return arrays, groups, faults


def check_documents(root: zarr.Group, *, itself: bool = True) -> None:
    """Raise :class:`DamagedError` for metadata documents that are lost, changed or unreadable.

    Parameters
    ----------
    root : Group
    itself : bool
        Whether to check the root's own document too.
    """
    if itself and (fault := root_fault(root)):
        raise DamagedError(str(root.store_path), f"{DOCUMENT}: {fault}")
    documents = listed_members(root)

    def visit(group: zarr.Group) -> Iterator[str]:
        _, groups, faults = members(group, documents)
        for name, reason in faults.items():
            yield f"{group.path}/{name}/{DOCUMENT}: {reason}".lstrip("/")
        for child in groups.values():
            yield from visit(child)

    if faults := list(visit(root)):
        suffix = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DamagedError(str(root.store_path), "; ".join(faults[:3]) + suffix)


def raise_unreadable(group: zarr.Group, path: str, error: Exception) -> None:
    """Raise :class:`DamagedError` where ``path`` has a document, so that an error is about its content."""
    document = f"{path}/{DOCUMENT}" if path else DOCUMENT
    if sync(group.store.exists(f"{group.path}/{document}".lstrip("/"))):
        raise DamagedError(str(group.store_path), f"{document}: {_unreadable(error)}") from error


def unreadable_root(path: str | os.PathLike[str], error: Exception) -> DamagedError:
    """Make the error for a root's document that Zarr can't read."""
    return DamagedError(str(path), f"{DOCUMENT}: {_unreadable(error)}")


def _unreadable(error: Exception) -> str:
    return f"no metadata of Zarr ({type(error).__name__}: {' '.join(str(error).split())})"


def _document_of(member: zarr.Array | zarr.Group) -> dict[str, Any]:
    """Return the metadata of a group or an array, as its document has it."""
    buffers = member.metadata.to_buffer_dict(default_buffer_prototype())
    document: dict[str, Any] = json.loads(buffers[DOCUMENT].to_bytes())
    return _without_members(document)


def _without_members(document: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a document the attributes of users, and the list of members."""
    rest = {name: value for name, value in document.items() if name != "consolidated_metadata"}
    return rest | {"attributes": _leave_out_users(document.get("attributes", {}))}


def _leave_out_users(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Select the attributes that the stages write; users may add others to a finished store."""
    return {name: value for name, value in attributes.items() if name in schema.ATTRIBUTES}


# -- repair ------------------------------------------------------------------------------------------------


def paths_of_documents(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of a store's groups and arrays that have a document, even if the root has none."""
    location = absolute(path)
    if is_address(location):
        names: Iterable[str] = objects.names(location)
    else:
        names = (file.relative_to(location).as_posix() for file in Path(location).rglob(DOCUMENT))
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == DOCUMENT and folder:
            yield folder


def restore_root(path: str | os.PathLike[str], attributes: Mapping[str, Any]) -> None:
    """Write a lost document of the root again, with these attributes alone."""
    write_document(path, {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def restore_document(root: zarr.Group, path: str) -> None:
    """Write a lost document of a group or an array again, as it is in the consolidated metadata.

    Raises
    ------
    StoreError
        When there is no consolidated metadata, or the document isn't listed there.
    """
    documents = listed_members(root)
    if documents is None or path not in documents:
        raise StoreError(
            f"{root.store_path}: {path}/{DOCUMENT} is listed nowhere else, and cannot be restored"
        )
    # A listed group has an empty list of members besides.
    document = {name: value for name, value in documents[path].items() if name != "consolidated_metadata"}
    data = default_buffer_prototype().buffer.from_bytes(json.dumps(document, indent=2).encode())
    sync(root.store.set(f"{path}/{DOCUMENT}", data))
