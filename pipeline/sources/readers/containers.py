"""What HDF5 files and Zarr stores may say before xarray opens them: nothing that leads out of them.

HDF5 can name other files to read from: by external links, by raw files as storage, by virtual data sets. An
archive with those could have any file of this machine converted as if it were a field. Zarr's second
version could name a codec that unpickles, which runs whatever program stands there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.sources.readers.base import LEADS_OUT, ReaderError, TooLargeError, check_size, is_within
from pipeline.storage.limits import COORDINATE_BYTES, COORDINATE_VALUE_BYTES, memory_bytes, readable

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
        When something leads out of it, would be unpickled, or when the variables of one dimension (which
        coordinates are: they are read at once) claim more than
        :data:`~pipeline.storage.limits.COORDINATE_BYTES` together, or
        :data:`~pipeline.storage.limits.COORDINATE_VALUE_BYTES` for one value.
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

    coordinates = _Coordinates()

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
        if found.shape is None:  # no values at all
            return None
        try:
            coordinates.add(found.shape, found.dtype.itemsize, found.dtype.kind, path, repr(name))
        except ReaderError as error:
            return error
        return None

    # h5py lets no exception through, but ends with what is returned.
    if (fault := file.visititems_links(look)) is not None:
        raise fault


def _check_zarr(path: Path) -> None:
    top = os.path.realpath(path)
    coordinates = _Coordinates()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = os.path.join(folder, name)
            if os.path.islink(entry) and not is_within(os.path.realpath(entry), top):
                raise ReaderError("a link that leads out of the store, and is not followed", entry)
        for name in set(files) & set(_DOCUMENTS):
            _check_document(os.path.join(folder, name), coordinates)


def _check_document(file: str, coordinates: _Coordinates) -> None:
    if (size := os.path.getsize(file)) > _DOCUMENT_BYTES:
        raise ReaderError(f"metadata of {size} bytes; expected {_DOCUMENT_BYTES} at most", file)
    with open(file, encoding="utf-8") as stream:
        document = json.load(stream)
    # What a document says of others as well is a copy, and counts by itself.
    copies = _Coordinates()
    for node in _nodes(document):
        if any(str(node.get(key)).rpartition(".")[2] == "pickle" for key in ("id", "name")):
            raise ReaderError("values are pickled programs (codec 'pickle') and not loaded", file)
        shape, dtype = node.get("shape"), node.get("data_type", node.get("dtype"))
        if isinstance(shape, list) and all(isinstance(length, int) for length in shape) and dtype is not None:
            counted = coordinates if node is document else copies
            counted.add(shape, *_value(dtype), file, "a variable")


class _Coordinates:
    """What the variables of one dimension in a file claim together."""

    def __init__(self) -> None:
        self._nbytes = 0

    def add(self, shape: Iterable[int], itemsize: int, kind: str, path: str, what: str) -> None:
        """Count a variable, which is refused where it is too large; ``kind`` as NumPy's, S for text."""
        shape = list(shape)
        if len(shape) == 2 and (itemsize, kind) == (1, "S"):  # xarray joins characters to texts
            shape, itemsize = shape[:1], shape[1]
        if len(shape) != 1:
            return
        rule = "a variable of one dimension may take {}"
        # A negative length is an error elsewhere, and makes no room here.
        self._nbytes += max(0, check_size(shape, itemsize, COORDINATE_BYTES, path, what, rule))
        if itemsize > COORDINATE_VALUE_BYTES:
            raise TooLargeError(
                f"{what}: values of {readable(itemsize)} each; expected {COORDINATE_VALUE_BYTES} bytes at "
                "most in a variable of one dimension",
                path,
            )
        if self._nbytes > (most := min(COORDINATE_BYTES, memory_bytes())):
            raise TooLargeError(
                f"variables of one dimension would take {readable(self._nbytes)} together, with {what}; they "
                f"may take {readable(most)}",
                path,
            )


def _value(dtype: Any) -> tuple[int, str]:
    """Bytes of one value and its kind (NumPy's; S for text), as a Zarr array's metadata states them.

    Format 2 writes ``"<f8"``, or a list of a record's fields; format 3 a name, or a mapping with a
    configuration. What isn't known is no longer than the number in its name.
    """
    if isinstance(dtype, dict):
        about = dtype.get("configuration")
        about = about if isinstance(about, dict) else {}
        if isinstance(length := about.get("length_bytes"), int):
            return length, "S"
        return _value(about["fields"]) if "fields" in about else _value(dtype.get("name"))
    if isinstance(dtype, list):
        return sum(map(_field_bytes, dtype)), "V"
    name = str(dtype).removeprefix("numpy.")
    try:
        known = np.dtype(name)
    except (TypeError, ValueError, OverflowError, SyntaxError):
        return max([16, *map(int, re.findall(r"[0-9]+", name))]), "V"
    return known.itemsize, known.kind


def _field_bytes(field: Any) -> int:
    """Bytes of a record's field: name and type, perhaps a shape."""
    if isinstance(field, dict):
        return _value(field.get("data_type"))[0]
    _, dtype, *shape = field
    return _value(dtype)[0] * math.prod(int(length) for lengths in shape for length in lengths)


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
