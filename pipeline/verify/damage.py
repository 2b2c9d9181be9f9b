"""Damage of a store, and the checks of chunks that all kinds of stores share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from lsim.metric import hash_specification
from pipeline.storage import chunks, metadata, schema, store


@dataclass(frozen=True)
class Damage:
    """Part of a store that differs from what was written.

    Attributes
    ----------
    group, array : str
        Path of the group, and name of the array, which starts with ``provenance/`` for a record.
    chunk : str
        Key of the chunk, or of its shard; empty if no single chunk is damaged. For metadata, the name of the
        document.
    what : str
        Damaged sequence, frame, tile or metric, in words.
    reason : str
    rows : tuple of int
        Affected sequences; for a matrix over all frames, the indices of the tile.
    metric : str
        Metric whose distances are affected; empty for all metrics or none.
    unreadable : bool
        Whether the chunk cannot be decoded, so that all of its values are lost.
    """

    group: str
    array: str
    chunk: str
    what: str
    reason: str
    rows: tuple[int, ...] = ()
    metric: str = ""
    unreadable: bool = False


@dataclass
class VerifyReport:
    """Result of :func:`pipeline.verify.verify`.

    Attributes
    ----------
    kind : str
        Kind of the store: ``"frames"``, ``"distances"``, …
    chunks : int
        Number of chunks that were read.
    compared : int
        Number of sequences, matrices, tiles or blocks that were compared with their record.
    unfinished : int
        Number of these that have not been computed, according to the record.
    damages : list of Damage
    """

    kind: str
    chunks: int = 0
    compared: int = 0
    unfinished: int = 0
    damages: list[Damage] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """True if there is no damage."""
        return not self.damages


Check: TypeAlias = Callable[[], list[Damage]]
"""A function that reads some chunks and returns their damage."""


@dataclass
class Checks:
    """Checks, which are created lazily, and their number."""

    count: int = 0
    parts: list[Iterable[Check]] = field(default_factory=list)

    def add(self, count: int, checks: Iterable[Check]) -> None:
        """Add ``count`` checks."""
        self.count += count
        self.parts.append(checks)

    def __iter__(self) -> Iterator[Check]:
        return itertools.chain.from_iterable(self.parts)


def add_chunks(
    checks: Checks, group: str, array: store.Array, report: VerifyReport, prefix: str = ""
) -> None:
    """Add a check for each chunk of an array."""
    count = chunks.chunk_count(array)
    report.chunks += count
    checks.add(count, (partial(_chunk, group, array, start, prefix) for start in chunks.chunk_starts(array)))


def _chunk(group: str, array: store.Array, start: tuple[int, ...], prefix: str) -> list[Damage]:
    region = tuple(slice(a, a + 1) for a in start)
    return [
        Damage(group, f"{prefix}{array.basename}", c.key, f"values from {c.start}", c.reason, unreadable=True)
        for c in chunks.damaged_chunks(array, region)
    ]


def read_column(group: str, array: store.Array, report: VerifyReport, prefix: str = "") -> np.ndarray:
    """Read a small array; report chunks that cannot be decoded as damage, and read fill values for them."""
    chunks.check_fits(array)
    report.chunks += chunks.chunk_count(array)
    try:
        return store.read(array)
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array)
    values = np.full(array.shape, array.fill_value, dtype=object if array.dtype.kind == "T" else array.dtype)
    for start in chunks.chunk_starts(array):
        if start not in {entry.start for entry in damaged}:
            chunk = chunks.read_chunk(array, start)
            values[tuple(slice(a, a + n) for a, n in zip(start, chunk.shape, strict=True))] = chunk
    for entry in damaged:
        rows, content = _rows_of(array, entry.start)
        report.damages.append(
            Damage(
                group, f"{prefix}{array.basename}", entry.key, content, entry.reason, rows, unreadable=True
            )
        )
    return values


def document_damage(group: str, name: str, reason: str) -> Damage:
    """Describe damaged metadata of a group or an array."""
    return Damage(group, name, metadata.DOCUMENT, "its metadata", reason)


def is_of_root(damage: Damage) -> bool:
    """Tell whether the metadata of the store's root is damaged."""
    return not damage.group and not damage.array and damage.chunk == metadata.DOCUMENT


def lost_chunks(group: str, array: store.Array, finished: np.ndarray) -> Iterator[Damage]:
    """Find missing chunks of a small array with rows that are ``finished``, and so had been written."""
    for start in chunks.chunk_starts(array):
        rows, content = _rows_of(array, start)
        if finished[slice(rows[0], rows[-1] + 1)].any():
            region = tuple(slice(a, a + 1) for a in start)
            for key in chunks.missing_chunks(array, region):
                yield Damage(group, array.basename, key, content, "missing", rows)


def _rows_of(array: store.Array, first: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """List the sequences in a chunk of a small array, as numbers and in words."""
    dims: Any = getattr(array.metadata, "dimension_names", None) or ()
    if schema.SEQUENCE not in dims:
        return (), "all metrics"
    axis = dims.index(schema.SEQUENCE)
    start = first[axis]
    rows = tuple(range(start, min(start + array.chunks[axis], array.shape[axis])))
    return rows, f"sequences in rows {rows[0]} to {rows[-1]}"


def recorded_specification(text: str) -> tuple[str, Any]:
    """Compute the hash of a recorded specification, and read its scope."""
    recorded: dict[str, Any] = json.loads(text)
    settings = {"scope", "pairs", "versions", "digest", schema.DIRECTED}
    metric = {name: value for name, value in recorded.items() if name not in settings}
    return hash_specification(metric), recorded["scope"]
