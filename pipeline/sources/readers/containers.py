"""Check the metadata of HDF5 files and Zarr stores before xarray opens them, and refuse what leads outside.

HDF5 can refer to other files: by external links, by raw files as storage, by virtual data sets. An archive
with these could have any file of this machine converted as if it were a field. Zarr format 2 can name a codec
that unpickles, which runs any program in the data.
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
    """Check the metadata of an HDF5 file or a Zarr store; other files pass.

    Parameters
    ----------
    path : Path
    folder : Path
        Folder of the data set, which contains ``path``, or is ``path``.

    Raises
    ------
    ReaderError
        When something leads out of the folder, or would be unpickled. Also when the variables of one
        dimension, which xarray reads at once as coordinates, claim more than
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
    """Check all links and data sets of an HDF5 file."""
    import h5py

    coordinates = _Coordinates()

    def look(name: str, link: Any) -> ReaderError | None:
        if isinstance(link, h5py.ExternalLink):
            return ReaderError(
                f"{name!r} is a link to another file, {link.filename!r}, and not followed", path
            )
        # The target of a soft link is in the same file, and is checked there.
        dataset = None if isinstance(link, h5py.SoftLink) else file[name]
        if not isinstance(dataset, h5py.Dataset):
            return None
        if dataset.external:
            files = ", ".join(repr(raw) for raw, _, _ in dataset.external[:3])
            return ReaderError(f"{name!r} has its values in other files ({files}), which are not read", path)
        if dataset.is_virtual:
            file_names = sorted({source.file_name for source in dataset.virtual_sources()} - {"."})[:3]
            if file_names:
                files = ", ".join(map(repr, file_names))
                return ReaderError(f"{name!r} is made of other files ({files}), which are not read", path)
        if dataset.shape is None:  # it has no values at all
            return None
        try:
            coordinates.add(dataset.shape, dataset.dtype.itemsize, dataset.dtype.kind, path, repr(name))
        except ReaderError as error:
            return error
        return None

    # h5py lets no exception through, but stops at a value other than None and returns it.
    if (fault := file.visititems_links(look)) is not None:
        raise fault


def _check_zarr(path: Path) -> None:
    """Check all links and metadata documents of a Zarr store."""
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
    """Check a metadata document of Zarr."""
    size = os.path.getsize(file)
    if size > _DOCUMENT_BYTES:
        raise ReaderError(f"metadata of {size} bytes; expected {_DOCUMENT_BYTES} at most", file)
    with open(file, encoding="utf-8") as stream:
        document = json.load(stream)
    # Metadata of other arrays in a document are copies, and are counted apart.
    copies = _Coordinates()
    for node in _nodes(document):
        if any(str(node.get(key)).rpartition(".")[2] == "pickle" for key in ("id", "name")):
            raise ReaderError("values are pickled programs (codec 'pickle') and not loaded", file)
        shape, dtype = node.get("shape"), node.get("data_type", node.get("dtype"))
        if isinstance(shape, list) and all(isinstance(length, int) for length in shape) and dtype is not None:
            total = coordinates if node is document else copies
            total.add(shape, *_value(dtype), file, "a variable")


class _Coordinates:
    """Count of the bytes that the variables of one dimension in a file claim together."""

    def __init__(self) -> None:
        self._nbytes = 0

    def add(self, shape: Iterable[int], itemsize: int, kind: str, path: str, subject: str) -> None:
        """Count a variable, and refuse it if it is too large; ``kind`` is NumPy's, S for text."""
        shape = list(shape)
        if len(shape) == 2 and (itemsize, kind) == (1, "S"):  # xarray joins characters to texts
            shape, itemsize = shape[:1], shape[1]
        if len(shape) != 1:
            return
        rule = "a variable of one dimension may take {}"
        # A negative length is an error elsewhere; here it must not make room for others.
        self._nbytes += max(0, check_size(shape, itemsize, COORDINATE_BYTES, path, subject, rule))
        if itemsize > COORDINATE_VALUE_BYTES:
            raise TooLargeError(
                f"{subject}: values of {readable(itemsize)} each; expected {COORDINATE_VALUE_BYTES} bytes at "
                "most in a variable of one dimension",
                path,
            )
        limit = min(COORDINATE_BYTES, memory_bytes())
        if self._nbytes > limit:
            raise TooLargeError(
                f"variables of one dimension would take {readable(self._nbytes)} together, with {subject}; "
                f"they may take {readable(limit)}",
                path,
            )


def _value(dtype: Any) -> tuple[int, str]:
    """Parse the bytes of one value and its kind (NumPy's; S for text) from a Zarr array's metadata.

    Format 2 writes ``"<f8"``, or a list of a record's fields; format 3 a name, or a mapping with a
    configuration. An unknown type has at most as many bytes as the number in its name.
    """
    if isinstance(dtype, dict):
        configuration = dtype.get("configuration")
        configuration = configuration if isinstance(configuration, dict) else {}
        if isinstance(length := configuration.get("length_bytes"), int):
            return length, "S"
        return _value(configuration["fields"]) if "fields" in configuration else _value(dtype.get("name"))
    if isinstance(dtype, list):
        return sum(map(_field_bytes, dtype)), "V"
    name = str(dtype).removeprefix("numpy.")
    try:
        numpy_dtype = np.dtype(name)
    except (TypeError, ValueError, OverflowError, SyntaxError):
        return max([16, *map(int, re.findall(r"[0-9]+", name))]), "V"
    return numpy_dtype.itemsize, numpy_dtype.kind


def _field_bytes(field: Any) -> int:
    """Compute the bytes of a record's field: name and type, perhaps a shape."""
    if isinstance(field, dict):
        return _value(field.get("data_type"))[0]
    _, dtype, *shape = field
    return _value(dtype)[0] * math.prod(int(length) for lengths in shape for length in lengths)


def _nodes(document: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings in a document, except users' attributes."""
    if isinstance(document, dict):
        yield document
        for key, value in document.items():
            if key != "attributes" and not key.endswith(".zattrs"):
                yield from _nodes(value)
    elif isinstance(document, list):
        for value in document:
            yield from _nodes(value)
