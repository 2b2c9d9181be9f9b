"""Load NumPy's files, ``.npy`` and ``.npz``; check their headers before anything is allocated.

Headers are claims: a file of 128 bytes may say that it holds 10¹² numbers. Arrays of Python objects are
pickles, that is programs, and are never loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.sources.readers.base import ReaderError, check_size
from pipeline.sources.unpack import open_zip

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 10_000
"""NumPy's own bound; NumPy reads the whole header before it checks its length."""
_ARRAYS = 10_000
"""Most arrays in an ``.npz`` file."""


def load_npy(path: str, limit: int, *, mapped: bool = False) -> np.ndarray:
    """Load the array of an ``.npy`` file.

    Parameters
    ----------
    path : str
    limit : int
        Bound on the array in bytes.
    mapped : bool, default False
        Map the file into memory rather than read it.

    Raises
    ------
    ReaderError
        When it holds Python objects, or claims more than ``limit`` or than the file has.
    """
    with open(path, "rb") as file:
        nbytes = _look(file, path, "array", limit)
        size = os.fstat(file.fileno()).st_size - file.tell()
        if size < nbytes:
            raise ReaderError(f"the header claims {nbytes} bytes; the file has {size}", path)
        if mapped:
            return np.lib.format.open_memmap(path, mode="r")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def list_npz(path: str) -> list[str]:
    """List the arrays of an ``.npz`` file."""
    with open_zip(Path(path), _ARRAYS) as members:
        return [name.removesuffix(".npy") for name in members.namelist() if name.endswith(".npy")]


def load_npz(path: str, names: Sequence[str], limit: int) -> list[np.ndarray]:
    """Load some arrays of an ``.npz`` file.

    Parameters
    ----------
    path : str
    names : sequence of str
    limit : int
        Bound on each array in bytes.

    Raises
    ------
    ReaderError
        When one isn't there, holds Python objects, or claims more than ``limit``.
    UnpackError
        When the file holds more than 10,000 arrays.
    """
    with open_zip(Path(path), _ARRAYS) as members:
        present = [name.removesuffix(".npy") for name in members.namelist() if name.endswith(".npy")]
        arrays = []
        for name in names:
            if name not in present:
                raise ReaderError(f"no array {name!r}; found {', '.join(present) or 'none'}", path)
            with members.open(f"{name}.npy") as stream:
                _look(stream, path, f"array {name!r}", limit)
            with members.open(f"{name}.npy") as stream:
                arrays.append(np.lib.format.read_array(stream, allow_pickle=False))
    return arrays


def _look(file: IO[bytes], path: str, subject: str, limit: int) -> int:
    """Parse the header of an array, and refuse one that can't be loaded; return the array's bytes."""
    if not file.peek(len(_MAGIC)).startswith(_MAGIC):  # type: ignore[attr-defined]
        raise ReaderError(f"{subject}: not a NumPy file; a pickle is a program, and not loaded", path)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        length = int.from_bytes(file.peek(4)[:4], "little")  # type: ignore[attr-defined]
        if length > _HEADER_BYTES:
            raise ReaderError(
                f"{subject}: a header that claims {length} bytes; expected {_HEADER_BYTES} at most", path
            )
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ReaderError(f"{subject}: version {version} of the format, which is for records", path)
    if dtype.hasobject:
        raise ReaderError(f"{subject} holds Python objects, which are pickled programs and not loaded", path)
    if min(shape, default=0) < 0:
        raise ReaderError(f"{subject}: the header claims the shape {shape}", path)
    return check_size(shape, dtype.itemsize, limit, path, subject)
