"""What can be wrong with a store, and how each chunk is looked at: what all kinds have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from pipeline import schema, store


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not as it was written.

    Attributes
    ----------
    group, array : str
        Path of the group, and the array's name; below ``provenance`` with that in front.
    chunk : str
        Key of the chunk, or of the shard that holds it; empty where no single one is to blame.
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


def chunk_checks(group: str, array: store.Array, report: VerifyReport, prefix: str = "") -> list[Check]:
    """A check for each chunk of an array."""
    starts = list(store.chunk_starts(array))
    report.chunks += len(starts)
    return [partial(_chunk, group, array, start, prefix) for start in starts]


def _chunk(group: str, array: store.Array, start: tuple[int, ...], prefix: str) -> list[Damage]:
    region = tuple(slice(a, a + 1) for a in start)
    return [
        Damage(group, f"{prefix}{array.basename}", c.key, f"values from {c.start}", c.reason, unreadable=True)
        for c in store.damaged_chunks(array, region)
    ]


def read_column(group: str, array: store.Array, report: VerifyReport, prefix: str = "") -> np.ndarray:
    """A small array whole, chunk by chunk; what cannot be decoded is damage, and fill values here."""
    store.check_fits(array)
    report.chunks += sum(1 for _ in store.chunk_starts(array))
    try:
        return store.read(array)
    except store.DamagedError:
        damaged = store.damaged_chunks(array)
    values = np.full(array.shape, array.fill_value, dtype=object if array.dtype.kind == "T" else array.dtype)
    for start in store.chunk_starts(array):
        if start not in {chunk.start for chunk in damaged}:
            found = store.read_chunk(array, start)
            values[tuple(slice(a, a + n) for a, n in zip(start, found.shape, strict=True))] = found
    for chunk in damaged:
        rows, what = _rows_of(array, chunk)
        report.damages.append(
            Damage(group, f"{prefix}{array.basename}", chunk.key, what, chunk.reason, rows, unreadable=True)
        )
    return values


def _rows_of(array: store.Array, chunk: store.DamagedChunk) -> tuple[tuple[int, ...], str]:
    """The sequences that a damaged chunk of a small array has something of, and the same in words."""
    dims: Any = getattr(array.metadata, "dimension_names", None) or ()
    if schema.SEQUENCE not in dims:
        return (), "all metrics"
    axis = dims.index(schema.SEQUENCE)
    start = chunk.start[axis]
    rows = tuple(range(start, min(start + array.chunks[axis], array.shape[axis])))
    return rows, f"sequences in rows {rows[0]} to {rows[-1]}"


def recorded_specification(text: str) -> tuple[str, Any]:
    """Hash of a metric's specification, and its scope, as provenance has them."""
    recorded: dict[str, Any] = json.loads(text)
    settings = {"scope", "pairs", "versions"}
    metric = {name: value for name, value in recorded.items() if name not in settings}
    document = json.dumps(metric, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()[:32], recorded["scope"]
