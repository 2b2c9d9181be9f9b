"""Source data from an object store: a lasting copy on this machine, brought up to date object by object."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.storage import objects
from pipeline.storage.address import parent

DOWNLOADS = 8
"""Objects that are downloaded at once."""


def bring(address: str, folder: Path) -> bool:
    """Make ``folder`` a copy of what lies at an address; only what is new or has changed is downloaded.

    An object has changed when its size, its time to the second, or the store's tag of it (ETag) is another.
    Files get the time of their objects, so that what didn't change looks as it did. Where there is one object
    of that name, the folder holds it alone.

    Returns
    -------
    bool
        Whether anything was new, changed or gone.

    Raises
    ------
    pipeline.storage.objects.ObjectStoreError
        When nothing is there, or the name of an object leads out of the folder.
    FileExistsError
        When the folder holds something that wasn't brought.
    """
    source, found, file = address, objects.listed(address), ""
    if not found and (alone := objects.look(address)) is not None:
        source, found, file = parent(address), [alone], alone.name
    if not found:
        raise objects.ObjectStoreError(f"{address}: there is nothing here")
    for one in found:
        if {"", ".", ".."} & set(one.name.split("/")):
            raise objects.ObjectStoreError(f"{address}: object {one.name!r} leads out of its folder")
    note = _note(folder)
    tags = _tags(note)
    missing = [one for one in found if not _is_here(folder / one.name, one, tags)]
    if not note.exists() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and no copy of {address}: move it elsewhere")
    gone = {path for path in folder.rglob("*") if path.is_file()} - {folder / one.name for one in found}
    complete = {"from": address, "file": file, "tags": {one.name: one.tag for one in found}}
    if not missing and not gone and brought(address, folder) is not None:
        if tags != complete["tags"]:  # of an earlier version, or of a store that has given others
            note.write_text(json.dumps(complete))
        return False
    folder.mkdir(parents=True, exist_ok=True)
    kept = {one.name: tags.get(one.name, "") for one in found if one not in missing}
    note.write_text(json.dumps({"copy": "not complete", "tags": kept}))
    for path in gone:
        path.unlink()
        for above in path.relative_to(folder).parents[:-1]:
            if not any((folder / above).iterdir()):  # an object store has no empty folders
                (folder / above).rmdir()
    with ThreadPoolExecutor(DOWNLOADS) as threads:
        for _ in threads.map(lambda one: _download(source, one, folder / one.name), missing):
            pass
    note.write_text(json.dumps(complete))
    return True


def brought(address: str, folder: Path) -> Path | None:
    """The copy that :func:`bring` made of an address, a folder or a file; None where it isn't complete."""
    note = _note(folder)
    found = json.loads(note.read_text()) if note.is_file() else {}
    return folder / found["file"] if found.get("from") == address else None


def _note(folder: Path) -> Path:
    """Beside the copy: in it, it would be one of its files."""
    return folder.with_name(f".{folder.name}.brought-from.json")


def _tags(note: Path) -> dict[str, str]:
    """Read the tags of the objects that files are copies of; none where an earlier version made the copy."""
    found = json.loads(note.read_text()) if note.is_file() else {}
    return dict(found.get("tags", {}))


def _is_here(path: Path, one: objects.Listed, tags: dict[str, str]) -> bool:
    if not path.is_file() or tags.get(one.name, one.tag) != one.tag:
        return False
    found = path.stat()
    return (found.st_size, int(found.st_mtime)) == (one.size, int(one.time))


def _download(source: str, one: objects.Listed, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for block in objects.blocks(source, one.name):
            file.write(block)
    os.utime(partial, (one.time, one.time))
    partial.replace(path)
