"""Whether a sequence's frames are still those that were converted: they are hashed as conversion hashed them.

Disks lose bits, copies end early, chunks get deleted and then read as fill values. Whoever computes from
frames reads them here, and so never computes from others than the store's ``content`` was made of.
"""

from __future__ import annotations

import numpy as np
import xxhash

from pipeline import schema, store


def content_hash(frames: np.ndarray, parameter: np.ndarray) -> str:
    """xxh3 (128 bits, hex) of decoded frames and parameter: dtype, shape and bytes of both.

    Parameters
    ----------
    frames : ndarray of shape (n, y, x, channel)
    parameter : ndarray of shape (n,)
    """
    digest = xxhash.xxh3_128()
    for values in (frames, parameter):
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        digest.update(f"{little.dtype.str} {little.shape}\n".encode())
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


NOT_READ = (store.DamagedError, store.OversizedError)
"""What :func:`read_sequence` raises for a sequence that isn't compared, and is looked at again next time."""


def why_not_read(error: store.DamagedError | store.OversizedError) -> str:
    """What is wrong with a sequence, in words that name no folder: they are recorded."""
    return error.claim if isinstance(error, store.OversizedError) else f"damaged frames: {error.damage}"


def read_sequence(group: store.Group, row: int, content: str) -> np.ndarray:
    """One sequence's frames, (n, y, x, channel), once they are known to be whole.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``.
    row : int
    content : str
        The hash that conversion recorded of it.

    Raises
    ------
    DamagedError
        When a chunk cannot be decoded, is gone, or holds other values than were converted.
    OversizedError
        When it is larger than this machine's memory.
    """
    frames = store.get_array(group, schema.FRAMES)
    values = store.read(frames, row)
    found = content_hash(values, store.read(store.get_array(group, schema.PARAMETER), row))
    if found != content:
        if missing := store.missing_chunks(frames, row):
            raise store.DamagedError(str(frames.store_path), f"chunk {', '.join(missing)} is missing")
        raise store.DamagedError(
            str(frames.store_path),
            f"row {row}: frames and parameter are not those that were converted: their hash is {found}, "
            f"expected {content}",
        )
    return values
