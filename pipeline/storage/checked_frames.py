"""Whether a sequence's frames are still those that were converted: they are hashed as conversion hashed them.

Disks lose bits, copies end early, chunks get deleted and then read as fill values. Whoever computes from
frames reads them here, and so never computes from others than the store's ``content`` was made of.
"""

from __future__ import annotations

import json

import numpy as np
import xxhash

from pipeline.storage import chunks, schema, store
from pipeline.storage.digests import is_sealed


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


def hash_weights(weights: np.ndarray) -> str:
    """Hash a field's weights of pixels: xxh3 (128 bits, hex) of shape and bytes.

    Parameters
    ----------
    weights : ndarray of shape (y, x), float64
    """
    little = np.ascontiguousarray(weights, dtype="<f8")
    digest = xxhash.xxh3_128(f"{little.shape}\n".encode())
    digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def weights_of_record(source: str) -> str:
    """Read from what is recorded of a sequence's source the hash of its weights; empty where it has none."""
    return str(json.loads(source or "{}").get(schema.WEIGHTS, ""))


def stored_weights(group: store.Group) -> np.ndarray | None:
    """Read a field's weights of pixels as they are, (y, x); None where it has none."""
    if schema.WEIGHTS not in group:
        return None
    return store.read(store.get_array(group, schema.WEIGHTS))


def read_weights(group: store.Group, expected: str | None = None) -> np.ndarray | None:
    """Read a field's weights of pixels, once they are known to be whole.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``.
    expected : str, optional
        Their hash. Default: that which conversion recorded of every sequence; one that was made by others
        records none.

    Returns
    -------
    ndarray of shape (y, x), float64, or None
        None where the field has none.

    Raises
    ------
    DamagedError
        When they cannot be decoded, are gone, or are others than were converted.
    pipeline.storage.schema.SchemaError
        When they are no weights of the field's pixels.
    """
    weights = stored_weights(group)
    digest = "" if weights is None else hash_weights(weights)
    recorded = {digest} if schema.SOURCE not in group else recorded_weights(group) or {digest}
    if {digest} != (recorded if expected is None else {expected}):
        raise store.DamagedError(
            str(group.store_path), f"{weights_fault(digest)}; 'lsim convert' makes the field anew"
        )
    if weights is not None:
        shape = store.get_array(group, schema.FRAMES).shape[2:4]
        schema.validate_weights(weights, shape, str(group.store_path))
    return weights


def recorded_weights(group: store.Group) -> set[str]:
    """List the hashes of weights that are recorded of a field's sequences: one, where it is whole.

    Empty texts stand for sequences without weights; those that aren't converted don't count.
    """
    columns = [store.read(store.get_array(group, name)) for name in (schema.CONTENT, schema.SOURCE)]
    return {weights_of_record(str(source)) for content, source in zip(*columns, strict=True) if content}


def weights_fault(digest: str) -> str:
    """Say what is wrong with weights of this hash that are others than were converted."""
    if not digest:
        return f"{schema.WEIGHTS} are missing"
    return f"{schema.WEIGHTS} are not those that were converted: their hash is {digest}"


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
        if missing := chunks.missing_chunks(frames, row):
            raise store.DamagedError(str(frames.store_path), f"chunk {', '.join(missing)} is missing")
        raise store.DamagedError(
            str(frames.store_path),
            f"row {row}: frames and parameter are not those that were converted: their hash is {found}, "
            f"expected {content}",
        )
    return values


def unbound_rows(group: store.Group) -> list[int]:
    """List the sequences of a field whose name, source and content are not those of one conversion.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``. One without sources was made by others, and says nothing of this.
    """
    if schema.SOURCE not in group:
        return []
    columns = [
        store.read(store.get_array(group, n)) for n in (schema.SEQUENCE, schema.CONTENT, schema.SOURCE)
    ]
    return [
        row
        for row, (name, content, source) in enumerate(zip(*columns, strict=True))
        if content and not is_bound(group.path, str(name), str(content), str(source))
    ]


def is_bound(key: str, name: str, content: str, source: str) -> bool:
    """Tell whether what is recorded of a sequence's source is of that name and content."""
    return is_sealed(json.loads(source or "{}"), key, name, content)


def check_bound(group: store.Group) -> None:
    """Raise :class:`~pipeline.storage.store.DamagedError` naming the sequences that :func:`unbound_rows`
    lists."""
    if rows := unbound_rows(group):
        names = store.read(store.get_array(group, schema.SEQUENCE))
        named = ", ".join(str(names[row]) or f"row {row}" for row in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise store.DamagedError(
            str(group.store_path),
            f"name, source and content of sequences {named}{more} are not those of one conversion: "
            "convert again",
        )
