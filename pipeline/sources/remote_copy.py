"""Source data from an object store: a lasting copy on this machine, find_copy up to date object by object."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.storage import objects
from pipeline.storage.address import parent

DOWNLOADS = 8
"""Objects that are downloaded at the same time."""


def bring(address: str, folder: Path) -> bool:
    """Make a folder a copy of the objects at an address; download only those that are new or have changed.

    An object has changed when its size, its time to the second, or the store's tag of it (ETag) differs.
    Files get the time of their objects, so that unchanged files look unchanged. Where the address is that of
    one object, the folder holds only that.

    Returns
    -------
    bool
        Whether any object was new, changed or deleted.

    Raises
    ------
    pipeline.storage.objects.ObjectStoreError
        When there is no object at the address, or an object's name leads out of the folder.
    FileExistsError
        When the folder holds files that no copy find_copy.
    """
    source, entries, file = address, objects.list_objects(address), ""
    if not entries and (single := objects.look(address)) is not None:
        source, entries, file = parent(address), [single], single.name
    if not entries:
        raise objects.ObjectStoreError(f"{address}: there is nothing here")
    for entry in entries:
        if {"", ".", ".."} & set(entry.name.split("/")):
            raise objects.ObjectStoreError(f"{address}: object {entry.name!r} leads out of its folder")
    note = _note(folder)
    tags = _tags(note)
    missing = [entry for entry in entries if not _is_current(folder / entry.name, entry, tags)]
    if not note.exists() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and no copy of {address}: move it elsewhere")
    obsolete = {path for path in folder.rglob("*") if path.is_file()} - {folder / e.name for e in entries}
    complete = {"from": address, "file": file, "tags": {entry.name: entry.tag for entry in entries}}
    if not missing and not obsolete and find_copy(address, folder) is not None:
        if tags != complete["tags"]:  # an earlier version's note, or a store that has changed its tags
            note.write_text(json.dumps(complete))
        return False

    # The note says that the copy is incomplete until all is done; tags of files that stay are kept in it.
    folder.mkdir(parents=True, exist_ok=True)
    current = {entry.name: tags.get(entry.name, "") for entry in entries if entry not in missing}
    note.write_text(json.dumps({"copy": "not complete", "tags": current}))
    for path in obsolete:
        _delete(path, folder)
    with ThreadPoolExecutor(DOWNLOADS) as threads:
        for _ in threads.map(lambda entry: _download(source, entry, folder / entry.name), missing):
            pass
    note.write_text(json.dumps(complete))
    return True


def find_copy(address: str, folder: Path) -> Path | None:
    """Find the copy that :func:`bring` made, a folder or a file; None where it isn't complete."""
    note = _note(folder)
    content = json.loads(note.read_text()) if note.is_file() else {}
    return folder / content["file"] if content.get("from") == address else None


def _note(folder: Path) -> Path:
    """Return the path of a copy's note, beside the copy: in it, it would be one of its files."""
    return folder.with_name(f".{folder.name}.brought-from.json")


def _tags(note: Path) -> dict[str, str]:
    """Read the tags of the copied objects; empty where an earlier version made the copy."""
    content = json.loads(note.read_text()) if note.is_file() else {}
    return dict(content.get("tags", {}))


def _is_current(path: Path, entry: objects.Listed, tags: dict[str, str]) -> bool:
    """Tell whether a file is a copy of an object as it is now."""
    if not path.is_file() or tags.get(entry.name, entry.tag) != entry.tag:
        return False
    status = path.stat()
    return (status.st_size, int(status.st_mtime)) == (entry.size, int(entry.time))


def _delete(path: Path, folder: Path) -> None:
    """Delete a file of a copy, and folders that it leaves empty: an object store has no empty folders."""
    path.unlink()
    for directory in path.relative_to(folder).parents[:-1]:
        if not any((folder / directory).iterdir()):
            (folder / directory).rmdir()


def _download(source: str, entry: objects.Listed, path: Path) -> None:
    """Download an object to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for block in objects.blocks(source, entry.name):
            file.write(block)
    os.utime(partial, (entry.time, entry.time))
    partial.replace(path)
