"""What HDF5 files and Zarr stores may say before xarray opens them: nothing that leads out of them.

HDF5 can name other files to read from: by external links, by raw files as storage, by virtual data sets. An
archive with those could have any file of this machine converted as if it were a field. Zarr's second
version could name a codec that unpickles, which runs whatever program stands there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.limits import COORDINATE_BYTES
from pipeline.readers.base import LEADS_OUT, ReaderError, check_size, is_within

_DOCUMENTS = ("zarr.json", ".zarray", ".zmetadata")
_DOCUMENT_BYTES = 2**28


def check_container(path: Path, folder: Path) -> None:
    """Look through the metadata of an HDF5 file or a Zarr store; others are let pass.

    Parameters
    ----------
    path : Path
    folder : Path
        Of the data set, which ``path`` lies in, or is.

    Raises
    ------
    ReaderError
        When something leads out of it, would be unpickled, or is a variable of one dimension (a coordinate
        is read at once) that claims more than :data:`~pipeline.limits.COORDINATE_BYTES`.
    """
    if path != folder and not is_within(os.path.realpath(path), os.path.realpath(folder)):
        raise ReaderError(LEADS_OUT, str(path))
    if path.is_dir():
        _check_zarr(path)
        return
    import h5py

    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            _check_hdf5(file, str(path))


def _check_hdf5(file: Any, path: str) -> None:
    import h5py

    def look(name: str, link: Any) -> ReaderError | None:
        if isinstance(link, h5py.ExternalLink):
            return ReaderError(
                f"{name!r} is a link to another file, {link.filename!r}, and not followed", path
            )
        # What a soft link leads to within the file is looked at where it stands.
        found = None if isinstance(link, h5py.SoftLink) else file[name]
        if not isinstance(found, h5py.Dataset):
            return None
        if found.external:
            files = ", ".join(repr(raw) for raw, _, _ in found.external[:3])
            return ReaderError(f"{name!r} has its values in other files ({files}), which are not read", path)
        if found.is_virtual:
            others = sorted({source.file_name for source in found.virtual_sources()} - {"."})[:3]
            if others:
                files = ", ".join(map(repr, others))
                return ReaderError(f"{name!r} is made of other files ({files}), which are not read", path)
        if found.ndim == 1:
            try:
                _check_coordinate(found.shape, found.dtype.itemsize, path, repr(name))
            except ReaderError as error:
                return error
        return None

    # h5py lets no exception through, but ends with what is returned.
    if (fault := file.visititems_links(look)) is not None:
        raise fault


def _check_zarr(path: Path) -> None:
    top = os.path.realpath(path)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = os.path.join(folder, name)
            if os.path.islink(entry) and not is_within(os.path.realpath(entry), top):
                raise ReaderError("a link that leads out of the store, and is not followed", entry)
        for name in set(files) & set(_DOCUMENTS):
            _check_document(os.path.join(folder, name))


def _check_document(file: str) -> None:
    if (size := os.path.getsize(file)) > _DOCUMENT_BYTES:
        raise ReaderError(f"metadata of {size} bytes; expected {_DOCUMENT_BYTES} at most", file)
    with open(file, encoding="utf-8") as stream:
        document = json.load(stream)
    for node in _nodes(document):
        if any(str(node.get(key)).rpartition(".")[2] == "pickle" for key in ("id", "name")):
            raise ReaderError("values are pickled programs (codec 'pickle') and not loaded", file)
        shape = node.get("shape")
        if isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int):
            _check_coordinate(shape, 8, file, "a variable")


def _check_coordinate(shape: Iterable[int], itemsize: int, path: str, what: str) -> None:
    check_size(shape, itemsize, COORDINATE_BYTES, path, what, "a variable of one dimension may take {}")


def _nodes(document: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document, but for users' attributes."""
    if isinstance(document, dict):
        yield document
        for key, value in document.items():
            if key != "attributes" and not key.endswith(".zattrs"):
                yield from _nodes(value)
    elif isinstance(document, list):
        for value in document:
            yield from _nodes(value)
