"""Work on a folder of small files at a location, through a copy where it is an address."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import objects
from pipeline.storage.address import is_address


@contextlib.contextmanager
def local_folder(location: str) -> Iterator[Path]:
    """Open the folder at a path; for an address, open a copy of its files, without folders below.

    At the end, changed files are written back in the order in which they were written, and deleted files are
    deleted. Nothing is if the block ends with an exception. Objects are replaced whole.
    """
    if not is_address(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="lsim-") as name:
        folder = Path(name)
        contents = {}
        for object_name in objects.names(location):
            content = None if "/" in object_name else objects.read(location, object_name)
            if content is not None:
                (folder / object_name).write_bytes(content)
                contents[object_name] = content
        yield folder
        files = sorted(
            (path for path in folder.iterdir() if path.is_file()), key=lambda p: p.stat().st_mtime_ns
        )
        for old_name in contents.keys() - {path.name for path in files}:
            objects.delete(location, old_name)
        for path in files:
            content = path.read_bytes()
            if contents.get(path.name) != content:
                objects.write(location, path.name, content)
