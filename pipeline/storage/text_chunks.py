"""Read chunks of text straight from their files: a store of 10⁵ blocks has as many small ones.

Zarr takes 0.15 ms a chunk, most of it between its threads; this takes a tenth of that. It reads what
:func:`pipeline.storage.store.create_array` writes, and nothing else: text without compression, with a
checksum or (in older stores) without.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.vlen import VLenUTF8

CHECKSUM_BYTES = 4

_DECODER = VLenUTF8()


def read_texts(
    folder: Path,
    key_of: Callable[[tuple[int, ...]], str],
    chunks: Sequence[int],
    region: Sequence[slice],
    *,
    checked: bool,
    fill: str,
) -> np.ndarray | None:
    """Read a region of an array of text; None where a chunk can't be read, and Zarr then says why.

    Parameters
    ----------
    folder : path
        The array's folder.
    key_of : callable
        Gives the key of a chunk, below the array, from its index along each axis.
    chunks : sequence of int
    region : sequence of slice
        Starts and stops along each axis, within the array; steps of 1.
    checked : bool
        Chunks end with the CRC-32C of their other bytes.
    fill : str
        Text of chunks that don't exist.

    Returns
    -------
    ndarray of object (str), or None
    """
    values = np.full([part.stop - part.start for part in region], fill, dtype=object)
    if not folder.exists():
        return None
    array = f"{folder}{os.sep}"  # joined 10⁵ times: paths would take longer than reading
    spans = [
        range(part.start // chunk, -(-part.stop // chunk)) for part, chunk in zip(region, chunks, strict=True)
    ]
    for place in itertools.product(*spans):
        try:
            with open(array + key_of(place), "rb", buffering=0) as file:
                encoded = file.read()
        except FileNotFoundError:
            continue
        except OSError:
            return None
        texts = _decoded(encoded, chunks, checked)
        if texts is None:
            return None
        into, out_of = [], []
        for index, chunk, part in zip(place, chunks, region, strict=True):
            start, stop = max(index * chunk, part.start), min((index + 1) * chunk, part.stop)
            into.append(slice(start - part.start, stop - part.start))
            out_of.append(slice(start - index * chunk, stop - index * chunk))
        values[tuple(into)] = texts[tuple(out_of)]
    return values


def _decoded(encoded: bytes, chunks: Sequence[int], checked: bool) -> np.ndarray | None:
    if checked:
        encoded, checksum = encoded[:-CHECKSUM_BYTES], encoded[-CHECKSUM_BYTES:]
        if google_crc32c.value(encoded) != int.from_bytes(checksum, "little"):
            return None
    try:
        return _DECODER.decode(encoded).reshape(chunks)
    except (ValueError, RuntimeError):  # bytes that are no text, or too few of them
        return None
