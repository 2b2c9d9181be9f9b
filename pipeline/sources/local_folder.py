"""A folder of small files at a location: itself, or a copy of an address's that is written back."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import objects
from pipeline.storage.address import is_address


@contextlib.contextmanager
def local_folder(location: str) -> Iterator[Path]:
    """The folder at a path; for an address a copy of its files, without folders below, while it is open.

    What changed is written back at the end, in the order in which it was written, and what was deleted is
    deleted; nothing is where the block ends with an exception. An object is replaced whole.
    """
    if not is_address(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="lsim-") as name:
        folder = Path(name)
        before = {}
        for found in objects.names(location):
            if "/" not in found and (content := objects.read(location, found)) is not None:
                (folder / found).write_bytes(content)
                before[found] = content
        yield folder
        files = sorted(
            (path for path in folder.iterdir() if path.is_file()), key=lambda p: p.stat().st_mtime_ns
        )
        for gone in before.keys() - {path.name for path in files}:
            objects.delete(location, gone)
        for path in files:
            content = path.read_bytes()
            if before.get(path.name) != content:
                objects.write(location, path.name, content)
