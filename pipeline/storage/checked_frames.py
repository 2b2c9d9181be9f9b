"""Read frames and check that they are still those that were converted, by their hash.

Disks lose bits, copies end early, and deleted chunks read as fill values. All computations read their frames
here, so they never use frames that differ from those behind the store's ``content``.
"""

from __future__ import annotations

import json

import numpy as np
import xxhash

from pipeline.storage import chunks, schema, store
from pipeline.storage.digests import is_sealed


def content_hash(frames: np.ndarray, parameter: np.ndarray) -> str:
    """Hash decoded frames and parameter: xxh3 (128 bits, hex) of dtype, shape and bytes of both.

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
    """Extract the hash of a sequence's weights from its recorded source; empty where it has none."""
    return str(json.loads(source or "{}").get(schema.WEIGHTS, ""))


def stored_weights(group: store.Group) -> np.ndarray | None:
    """Read a field's weights of pixels unchecked, (y, x); None where it has none."""
    if schema.WEIGHTS not in group:
        return None
    return store.read(store.get_array(group, schema.WEIGHTS))


def read_weights(group: store.Group, source_digest: str | None = None) -> np.ndarray | None:
    """Read a field's weights of pixels and check them.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``.
    source_digest : str, optional
        Their hash. Default: the hash that conversion recorded with every sequence; a store that was made by
        others records none.

    Returns
    -------
    ndarray of shape (y, x), float64, or None
        None where the field has none.

    Raises
    ------
    DamagedError
        When they cannot be decoded, are missing, or differ from those that were converted.
    pipeline.storage.schema.SchemaError
        When they are not valid weights of the field's pixels.
    """
    weights = stored_weights(group)
    digest = "" if weights is None else hash_weights(weights)
    recorded = {digest} if schema.SOURCE not in group else recorded_weights(group) or {digest}
    if {digest} != (recorded if source_digest is None else {source_digest}):
        raise store.DamagedError(
            str(group.store_path), f"{weights_fault(digest)}; 'lsim convert' makes the field anew"
        )
    if weights is not None:
        shape = store.get_array(group, schema.FRAMES).shape[2:4]
        schema.validate_weights(weights, shape, str(group.store_path))
    return weights


def recorded_weights(group: store.Group) -> set[str]:
    """List the hashes of weights that are recorded with a field's sequences: one, unless it is damaged.

    An empty text stands for no weights. Sequences that aren't committed don't count.
    """
    columns = [store.read(store.get_array(group, name)) for name in (schema.CONTENT, schema.SOURCE)]
    return {weights_of_record(str(source)) for content, source in zip(*columns, strict=True) if content}


def weights_fault(digest: str) -> str:
    """Describe damaged weights, which have this hash."""
    if not digest:
        return f"{schema.WEIGHTS} are missing"
    return f"{schema.WEIGHTS} are not those that were converted: their hash is {digest}"


NOT_READ = (store.DamagedError, store.OversizedError)
"""Errors of :func:`read_sequence`: the sequence isn't compared, and the next run tries it again."""


def why_not_read(error: store.DamagedError | store.OversizedError) -> str:
    """Describe why a sequence can't be read. The text is recorded, so it names no folder."""
    return error.claim if isinstance(error, store.OversizedError) else f"damaged frames: {error.damage}"


def read_sequence(group: store.Group, row: int, content: str) -> np.ndarray:
    """Read one sequence's frames, (n, y, x, channel), and check them.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``.
    row : int
    content : str
        The hash that conversion recorded for it.

    Raises
    ------
    DamagedError
        When a chunk cannot be decoded, is missing, or holds other values than were converted.
    OversizedError
        When it is larger than this machine's memory.
    """
    frames = store.get_array(group, schema.FRAMES)
    values = store.read(frames, row)
    digest = content_hash(values, store.read(store.get_array(group, schema.PARAMETER), row))
    if digest != content:
        missing = chunks.missing_chunks(frames, row)
        if missing:
            raise store.DamagedError(str(frames.store_path), f"chunk {', '.join(missing)} is missing")
        raise store.DamagedError(
            str(frames.store_path),
            f"row {row}: frames and parameter are not those that were converted: their hash is {digest}, "
            f"expected {content}",
        )
    return values


def unbound_rows(group: store.Group) -> list[int]:
    """List the rows of a field whose name, source and content don't belong together.

    Parameters
    ----------
    group : Group
        A field of ``frames.zarr``. One without ``source`` was made by others, and has nothing to check.
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
    """Tell whether a sequence's recorded source belongs to that name and content."""
    return is_sealed(json.loads(source or "{}"), key, name, content)


def check_bound(group: store.Group) -> None:
    """Raise :class:`~pipeline.storage.store.DamagedError` if :func:`unbound_rows` lists any sequences."""
    if rows := unbound_rows(group):
        names = store.read(store.get_array(group, schema.SEQUENCE))
        labels = ", ".join(str(names[row]) or f"row {row}" for row in rows[:5])
        suffix = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise store.DamagedError(
            str(group.store_path),
            f"name, source and content of sequences {labels}{suffix} are not those of one conversion: "
            "convert again",
        )
