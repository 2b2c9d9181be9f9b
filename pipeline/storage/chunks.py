"""Chunks of an array one by one: find the damaged and missing ones, and name them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from pipeline.storage import limits
from pipeline.storage.errors import UNREADABLE, DamagedError, OversizedError

MOST_CHUNKS = 10**8
"""Most chunks of an array that are looked at one by one: metadata of a few bytes may claim 10¹²."""


@dataclass(frozen=True)
class DamagedChunk:
    """A chunk that cannot be decoded: its key, the index of its first value, and the decoder's reason.

    Chunks of one shard have the key of the shard.
    """

    key: str
    start: tuple[int, ...]
    reason: str


def write_nan_chunks(array: zarr.Array) -> zarr.Array:
    """Set an array of floats to store chunks of NaN too, so that a chunk is absent only if it is lost.

    Zarr doesn't record this setting in a store.
    """
    return array.with_config({"write_empty_chunks": True}) if array.dtype.kind == "f" else array


def chunk_starts(array: zarr.Array, region: Any = ...) -> Iterator[tuple[int, ...]]:
    """Yield the index of the first value of every chunk that a region of slices and integers touches."""
    parts = region if isinstance(region, tuple) else () if region is ... else (region,)
    spans = []
    for axis, (length, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)):
        part = parts[axis] if axis < len(parts) else slice(None)
        whole = part if isinstance(part, slice) else slice(int(part), int(part) + 1)
        first, stop, _ = whole.indices(length)
        spans.append(range(first - first % chunk, stop, chunk))
    yield from itertools.product(*spans)


def chunk_key(array: zarr.Array, start: tuple[int, ...]) -> str:
    """Return the key, below its array, of the chunk or shard that holds the value at ``start``."""
    units = array.shards or array.chunks
    return array.metadata.encode_chunk_key(tuple(a // unit for a, unit in zip(start, units, strict=True)))


def chunk_count(array: zarr.Array) -> int:
    """Count the chunks of an array by its metadata.

    Raises
    ------
    OversizedError
        For more than :data:`MOST_CHUNKS`, too many to look at one by one.
    """
    count = math.prod(-(-length // chunk) for length, chunk in zip(array.shape, array.chunks, strict=True))
    if count > MOST_CHUNKS:
        raise OversizedError(
            str(array.store_path),
            f"shape {array.shape} in chunks of {array.chunks} would be {count} chunks; {MOST_CHUNKS} at most "
            "are looked at",
        )
    return count


def read_chunk(array: zarr.Array, start: tuple[int, ...]) -> np.ndarray:
    """Read the chunk whose first value is at ``start``; errors of its codecs pass."""
    return np.asarray(array[tuple(slice(a, a + chunk) for a, chunk in zip(start, array.chunks, strict=True))])


def missing_chunks(array: zarr.Array, region: Any = ...) -> list[str]:
    """List the keys of the chunks (or shards) that a region touches and that are not in the store."""
    keys = dict.fromkeys(chunk_key(array, start) for start in chunk_starts(array, region))
    return [key for key in keys if not sync(array.store.exists(f"{array.path}/{key}"))]


def delete_chunk(array: zarr.Array, key: str) -> None:
    """Delete a chunk (or shard) by its key, if it exists; its values then read as fill values."""
    sync(array.store.delete(f"{array.path}/{key}"))


def damaged_chunks(array: zarr.Array, region: Any = ...) -> list[DamagedChunk]:
    """List the chunks that a region touches and that cannot be decoded, by reading each on its own."""
    damaged = []
    for start in chunk_starts(array, region):
        try:
            read_chunk(array, start)
        except (*UNREADABLE, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if "checksum do not match" in reason:
                reason = "its checksum does not match"
            damaged.append(DamagedChunk(chunk_key(array, start), start, reason))
    return damaged


def describe_damage(damaged: Sequence[DamagedChunk], limit: int = 3) -> str:
    """Describe damaged chunks in one line, the first few by name."""
    text = "; ".join(f"chunk {c.key} (from {c.start}) is damaged: {c.reason}" for c in damaged[:limit])
    return text + (f"; and {len(damaged) - limit} more" if len(damaged) > limit else "")


@contextlib.contextmanager
def damage_named(array: zarr.Array, region: Any = ...) -> Iterator[None]:
    """Turn an error of reading a region into a :class:`DamagedError` that names the damaged chunks.

    An error passes as it is where every chunk can be decoded.
    """
    try:
        yield
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        damaged = damaged_chunks(array, region)
        if not damaged:
            raise
        raise DamagedError(str(array.store_path), describe_damage(damaged)) from error


def check_fits(array: zarr.Array, region: Any = ...) -> None:
    """Raise :class:`OversizedError` where a region of slices and integers, or one chunk, exceeds memory.

    Shapes are claims: metadata of a few bytes may speak of a petabyte.
    """
    parts = region if isinstance(region, tuple) else () if region is ... else (region,)
    shape = [
        len(range(*part.indices(length))) if isinstance(part, slice) else 1
        for part, length in zip((*parts, *[slice(None)] * array.ndim), array.shape, strict=False)
    ]
    memory = limits.memory_bytes()
    for subject, counts in (("values of shape", shape), ("a chunk of shape", array.chunks)):
        nbytes = limits.array_bytes(counts, array.dtype.itemsize)
        if nbytes > memory:
            raise OversizedError(
                str(array.store_path),
                f"{subject} {tuple(counts)} would take {limits.readable(nbytes)}; this machine has "
                f"{limits.readable(memory)} of memory",
            )
