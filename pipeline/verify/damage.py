"""What can be wrong with a store, and how each chunk is looked at: what all kinds have in common."""

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
    """Something in a store that is not as it was written.

    Attributes
    ----------
    group, array : str
        Path of the group, and the array's name; below ``provenance`` with that in front.
    chunk : str
        Key of the chunk, or of the shard that holds it; empty where no single one is to blame. The name of a
        metadata document where that is what is lost or cannot be read.
    what : str
        What it belongs to: sequence, frame or metric.
    reason : str
    rows : tuple of int
        The sequences that it touches; of an archive's matrix, the tile.
    metric : str
        Whose distances, empty where it touches those of all metrics or none.
    unreadable : bool
        Whether the chunk cannot be decoded, and with it everything that it holds is lost.
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
    """What :func:`verify` found.

    Attributes
    ----------
    kind : str
        Of the store: ``"frames"``, ``"distances"``, …
    chunks : int
        How many were read.
    compared : int
        Sequences whose content, or matrices whose fingerprint, was compared with the record.
    unfinished : int
        Sequences or matrices that are not there, as the record says: a run that was stopped.
    damages : list of Damage
    """

    kind: str
    chunks: int = 0
    compared: int = 0
    unfinished: int = 0
    damages: list[Damage] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.damages


Check: TypeAlias = Callable[[], list[Damage]]
"""Reads some chunks, and says what is damaged."""


@dataclass
class Checks:
    """Checks that are made when it is their turn, and how many they will be."""

    count: int = 0
    parts: list[Iterable[Check]] = field(default_factory=list)

    def add(self, count: int, checks: Iterable[Check]) -> None:
        self.count += count
        self.parts.append(checks)

    def __iter__(self) -> Iterator[Check]:
        return itertools.chain.from_iterable(self.parts)


def add_chunks(
    checks: Checks, group: str, array: store.Array, report: VerifyReport, prefix: str = ""
) -> None:
    """A check for each chunk of an array."""
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
    """A small array whole, chunk by chunk; what cannot be decoded is damage, and fill values here."""
    chunks.check_fits(array)
    report.chunks += chunks.chunk_count(array)
    try:
        return store.read(array)
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array)
    values = np.full(array.shape, array.fill_value, dtype=object if array.dtype.kind == "T" else array.dtype)
    for start in chunks.chunk_starts(array):
        if start not in {chunk.start for chunk in damaged}:
            found = chunks.read_chunk(array, start)
            values[tuple(slice(a, a + n) for a, n in zip(start, found.shape, strict=True))] = found
    for chunk in damaged:
        rows, what = _rows_of(array, chunk.start)
        report.damages.append(
            Damage(group, f"{prefix}{array.basename}", chunk.key, what, chunk.reason, rows, unreadable=True)
        )
    return values


def document_damage(group: str, name: str, reason: str) -> Damage:
    """What is wrong with the metadata of a group or an array."""
    return Damage(group, name, metadata.DOCUMENT, "its metadata", reason)


def is_of_root(damage: Damage) -> bool:
    """Whether it is the metadata of the store's root that is lost."""
    return not damage.group and not damage.array and damage.chunk == metadata.DOCUMENT


def lost_chunks(group: str, array: store.Array, done: np.ndarray) -> Iterator[Damage]:
    """Chunks of a small array that are not there, though rows of them are ``done``: they were."""
    for start in chunks.chunk_starts(array):
        rows, what = _rows_of(array, start)
        if done[slice(rows[0], rows[-1] + 1)].any():
            region = tuple(slice(a, a + 1) for a in start)
            for key in chunks.missing_chunks(array, region):
                yield Damage(group, array.basename, key, what, "missing", rows)


def _rows_of(array: store.Array, first: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """The sequences that a chunk of a small array has something of, and the same in words."""
    dims: Any = getattr(array.metadata, "dimension_names", None) or ()
    if schema.SEQUENCE not in dims:
        return (), "all metrics"
    axis = dims.index(schema.SEQUENCE)
    start = first[axis]
    rows = tuple(range(start, min(start + array.chunks[axis], array.shape[axis])))
    return rows, f"sequences in rows {rows[0]} to {rows[-1]}"


def recorded_specification(text: str) -> tuple[str, Any]:
    """Hash of a metric's specification, and its scope, as provenance has them."""
    recorded: dict[str, Any] = json.loads(text)
    settings = {"scope", "pairs", "versions", "digest", schema.DIRECTED}
    metric = {name: value for name, value in recorded.items() if name not in settings}
    return hash_specification(metric), recorded["scope"]
