"""The frames nearest to a frame, read from its row of a distance matrix and from nothing else.

A row of an archive's matrix is read some chunks at a time, and the nearest so far are kept: memory is the
same for a thousand frames and a million.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from pipeline.metrics.resolution import from_text
from pipeline.storage import metadata, schema, store
from pipeline.storage.recorded import CheckedMatrix, check_rows, labels_of_blocks

NAMES_TOGETHER = 1 << 16
"""Frames whose names are in memory at once."""
COLUMNS_TOGETHER = 1 << 14
"""Distances of a row that are read at once: of tiles of 256², 16 MB."""
NAMED = 5
"""Frames, or sequences, that an error names."""
DEFAULT_METRICS = ("lsim", "lsim-open")
"""The metric that orders neighbours unless one is chosen, in order of preference; else the first there is."""


class NeighboursError(ValueError):
    """A frame that isn't there, or isn't the only one of its name, or has no neighbours to be found."""


@dataclass(frozen=True)
class Frame:
    """A frame of a matrix.

    ``matrix`` is the group of the matrix, ``row`` the index of the frame's distances in it, and ``field`` the
    ``<dataset>/<field>`` that the frame is of.
    """

    matrix: str
    row: tuple[int, ...]
    field: str
    sequence: str
    number: int
    parameter: float

    @property
    def name(self) -> str:
        """``<dataset>/<field>/<sequence>:<number>``."""
        return frame_name(self.field, self.sequence, self.number)


@dataclass(frozen=True)
class Neighbour:
    """A frame with its distances by metric."""

    frame: Frame
    distances: dict[str, float]


@dataclass(frozen=True)
class Neighbours:
    """The frames nearest to another.

    Attributes
    ----------
    of : Frame
    metric : str
        That they are ordered by.
    nearest : list of Neighbour
        Nearest first; of equally near ones in the order of the matrix.
    compared : int
        Frames that were looked at, the frame itself and, where asked, its sequence apart.
    without_distance : int
        How many of these have no distance to it.
    unresolved : int
        Distances that rounding may have changed by more than 0.1 %, of the sequence or the tiles that those
        shown are from, by the metric that orders them.
    left_out : list of str
        Distances that were looked at and don't count, with the reason: damaged ones, and those that aren't
        computed yet.
    directed : list of str
        Metrics of which both directions are kept: their distances are those with the frame as the reference.
    """

    of: Frame
    metric: str
    nearest: list[Neighbour]
    compared: int
    without_distance: int
    unresolved: int = 0
    left_out: list[str] = field(default_factory=list)
    directed: list[str] = field(default_factory=list)


class _CheckedSequence:
    """A sequence's matrix of a ``distances.zarr``; NaN where it doesn't count, and ``left_out`` says why."""

    def __init__(self, values: np.ndarray, left_out: list[str]) -> None:
        self._values = values
        self.left_out = dict.fromkeys(left_out)
        self.length = len(values)

    def row(self, index: int, columns: slice) -> np.ndarray:
        """Read distances of one frame, (column,)."""
        return np.asarray(self._values[index, columns])

    def value(self, index: int, column: int) -> float:
        """Read one distance."""
        return float(self._values[index, column])


_Matrix: TypeAlias = CheckedMatrix | _CheckedSequence


def find_neighbours(
    path: str | os.PathLike[str],
    name: str,
    k: int = 10,
    metric: str | None = None,
    *,
    matrix: str | None = None,
    other_sequences: bool = False,
) -> Neighbours:
    """The frames nearest to one of an archive's, or of a sequence's in a ``distances.zarr``.

    Parameters
    ----------
    path : path
        A store of distances: of an archive, or of sequences, whose frames are compared with those of their
        own sequence alone.
    name : str
        ``<dataset>/<field>/<sequence>:<number>`` or an end of that after a slash, as long as it is of one
        frame; without a number, frame 0.
    k : int
        How many; fewer where there are no more.
    metric : str, optional
        What orders them. Default: ``lsim`` where it is there, else ``lsim-open``, else the first.
    matrix : str, optional
        Group of the matrix, where the frame is in several.
    other_sequences : bool
        Leave out the frames of its own sequence.

    Raises
    ------
    NeighboursError
        When no frame or several have that name, when there is no such metric or matrix, or when the frame has
        no distances.
    pipeline.storage.store.StoreError
        When this is no store of distances.
    """
    if k < 1:
        raise NeighboursError(f"expected at least one neighbour to look for, got {k}")
    root = _open(path)
    metadata.check_documents(root)
    frame = find_frame(path, name, matrix)
    group = store.get_group(root, frame.matrix)
    if other_sequences and not _is_archive(group):
        raise NeighboursError(
            f"{path} compares frames with those of their own sequence alone; a matrix of all frames is made "
            "by 'lsim matrix FRAMES --out matrix.zarr'"
        )
    metric = _choose_metric(path, frame.matrix, metrics_of(group), metric)
    found = neighbours_of(root, frame, k, metric, other_sequences=other_sequences)
    if found.without_distance == found.compared:
        why = "; ".join(found.left_out[:NAMED]) or _why(group, frame, metric)
        raise NeighboursError(f"{frame.name} has no distances by {metric}" + (f": {why}" if why else ""))
    return found


def neighbours_of(
    root: store.Group, frame: Frame, k: int, metric: str, *, other_sequences: bool = False
) -> Neighbours:
    """:func:`find_neighbours` for a frame that is known."""
    group = store.get_group(root, frame.matrix)
    apart = (frame.field, frame.sequence) if other_sequences else None
    matrices = _checked_matrices(root, group, frame)
    columns, compared, missing = _nearest_columns(matrices[metric], group, frame.row[-1], k, apart)
    nearest = [
        Neighbour(
            _frame(group, frame.matrix, (*frame.row[:-1], column)),
            {name: matrix.value(frame.row[-1], column) for name, matrix in matrices.items()},
        )
        for column in columns
    ]
    unresolved = _unresolved_near(group, frame.row, columns, metric)
    left_out = [text for matrix in matrices.values() for text in matrix.left_out]
    directed = [name for name in matrices if store.get_array(group, name).attrs.get(schema.DIRECTED)]
    return Neighbours(frame, metric, nearest, compared, missing, unresolved, left_out, directed)


def _checked_matrices(root: store.Group, group: store.Group, frame: Frame) -> dict[str, _Matrix]:
    """The matrices that a frame is in, by metric: each is compared with its record where it is read."""
    names, key = metrics_of(group), frame.matrix
    if _is_archive(group):
        if not names:
            return {}
        labels = labels_of_blocks(group, store.get_array(group, names[0]).chunks[0])
        return {name: CheckedMatrix(root, key, name, labels) for name in names}
    row = slice(frame.row[0], frame.row[0] + 1)
    values = {name: store.read(store.get_array(group, name), row) for name in names}
    checked = check_rows(root, key, values, row)
    found: dict[str, _Matrix] = {}
    for name, matrix in values.items():
        reason = checked.problems.get(name, [""])[0]
        if checked.counts(name, 0):
            found[name] = _CheckedSequence(matrix[0], [])
        else:
            about = f"{key}: {name}, sequence {frame.sequence}: {reason}"
            found[name] = _CheckedSequence(np.full_like(matrix[0], np.nan), [about])
    return found


def find_frame(path: str | os.PathLike[str], name: str, matrix: str | None = None) -> Frame:
    """The one frame of a store of distances that has this name; see :func:`find_neighbours`."""
    root = _open(path)
    keys = matrix_keys(root)
    if matrix is not None:
        if matrix not in keys:
            raise NeighboursError(f"{path}: no matrix {matrix!r}; there are {_listed(keys)}")
        keys = [matrix]
    wanted = (name, f"{name}:0")
    ends = tuple(f"/{text}" for text in wanted)
    exact: list[tuple[str, str, tuple[int, ...]]] = []
    tails: list[tuple[str, str, tuple[int, ...]]] = []
    for key in keys:
        for row, full in _names(store.get_group(root, key), key):
            if full in wanted:
                exact.append((full, key, row))
            elif full.endswith(ends):
                tails.append((full, key, row))
    matches = exact or tails
    if not matches:
        raise NeighboursError(_unknown(path, root, keys, name))
    if len(matches) == 1:
        _, key, row = matches[0]
        return _frame(store.get_group(root, key), key, row)
    found = list(dict.fromkeys(full for full, _, _ in matches))
    if len(found) > 1:
        raise NeighboursError(f"{path}: {name!r} may be any of {_listed(found)}: give more of its name")
    there = _listed([key for _, key, _ in matches])
    raise NeighboursError(f"{path}: {found[0]} is in several matrices, {there}: choose one of them")


def matrix_keys(root: store.Group) -> list[str]:
    """Groups of a store of distances that hold matrices."""
    return store.field_keys(root, schema.PARAMETER)


def metrics_of(group: store.Group) -> list[str]:
    """Metrics of a matrix's group."""
    names = schema.matrix_metric_names if _is_archive(group) else schema.metric_names
    return names(group.array_keys())


def leading_metric(names: Sequence[str]) -> str:
    """The metric that is shown first: see :data:`DEFAULT_METRICS`."""
    return next((name for name in DEFAULT_METRICS if name in names), names[0])


def frame_name(field: str, sequence: str, number: int) -> str:
    """What a frame is called."""
    return f"{field}/{sequence}:{number}"


# ---------------------------------------------------------------- distances


def _nearest_columns(
    matrix: _Matrix, group: store.Group, row: int, k: int, apart: tuple[str, str] | None
) -> tuple[list[int], int, int]:
    """The ``k`` other columns of a row with the smallest distances, nearest first.

    And how many others there are, and how many of these have no distance. Frames of the field and sequence
    ``apart`` are no others.
    """
    length = matrix.length
    tile = matrix.tile if isinstance(matrix, CheckedMatrix) else length
    step = max(1, COLUMNS_TOGETHER // tile) * tile
    distances, columns = np.empty(0), np.empty(0, dtype=int)
    compared = missing = 0
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        values = matrix.row(row, part).astype(np.float64)
        here = np.arange(part.start, part.stop)
        kept = here != row
        if apart is not None:
            kept &= ~_is_of(group, part, *apart)
        values, here = values[kept], here[kept]
        there = ~np.isnan(values)
        compared += len(values)
        missing += len(values) - int(there.sum())
        distances = np.concatenate([distances, values[there]])
        columns = np.concatenate([columns, here[there]])
        best = np.argsort(distances, kind="stable")[:k]
        distances, columns = distances[best], columns[best]
    return columns.tolist(), compared, missing


def _unresolved_near(group: store.Group, row: tuple[int, ...], columns: Sequence[int], metric: str) -> int:
    """Count what a store records as unresolved where some distances of a row are; 0 where it doesn't say."""
    recorded = schema.UNRESOLVED if _is_archive(group) else schema.RESOLUTION
    if f"{schema.PROVENANCE}/{recorded}" not in group:
        return 0
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    if metric not in names:
        return 0
    place, array = names.index(metric), store.get_array(provenance, recorded)
    if recorded == schema.RESOLUTION:
        text = str(store.read(array, (slice(place, place + 1), slice(row[0], row[0] + 1))).item())
        resolution = from_text(text)
        return 0 if resolution is None else resolution.unresolved
    tile = store.get_array(group, metric).chunks[0]
    tiles = {tuple(sorted((row[0] // tile, column // tile))) for column in columns}
    return sum(
        int(store.read(array, tuple(slice(k, k + 1) for k in (place, *pair))).item()) for pair in tiles
    )


def _why(group: store.Group, frame: Frame, metric: str) -> str:
    """Why a frame has no distances, where the store says so."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    if metric not in names:
        return ""
    # Of a sequence's matrix, one reason for all of its frames.
    texts = store.get_array(provenance, schema.FAILURE)
    place = (names.index(metric), frame.row[0])
    return str(store.read(texts, tuple(slice(k, k + 1) for k in place)).item())


# ---------------------------------------------------------------- names


def _open(path: str | os.PathLike[str]) -> store.Group:
    root = store.open_store(path)
    kind = root.attrs.get("kind", schema.DISTANCES_STORE)
    if kind not in (schema.MATRIX_STORE, schema.DISTANCES_STORE):
        raise store.StoreError(
            f"{path}: expected a store of distances, of an archive best; found one of {kind}"
        )
    return root


def _is_archive(group: store.Group) -> bool:
    """Whether a matrix is of all frames, and not of each sequence's."""
    return schema.NUMBER in group


def _names(group: store.Group, key: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every frame's row and name."""
    sequences = store.get_array(group, schema.SEQUENCE)
    if not _is_archive(group):
        numbers = range(store.get_array(group, schema.PARAMETER).shape[1])
        for row, sequence in enumerate(store.read(sequences)):
            for number in numbers:
                yield (row, number), frame_name(key, str(sequence), number)
        return
    for start in range(0, sequences.shape[0], NAMES_TOGETHER):
        part = slice(start, start + NAMES_TOGETHER)
        columns = (
            store.read(store.get_array(group, name), part).tolist()
            for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER)
        )
        for position, parts in enumerate(zip(*columns, strict=True), start):
            yield (position,), frame_name(*parts)


def _frame(group: store.Group, key: str, row: tuple[int, ...]) -> Frame:
    """The frame of a row; of a sequence's matrix, of the row's last index in that sequence."""

    def at(name: str, *place: int) -> Any:
        return store.read(store.get_array(group, name), tuple(slice(k, k + 1) for k in place)).item()

    parameter = float(at(schema.PARAMETER, *row))
    sequence = str(at(schema.SEQUENCE, row[0]))
    if not _is_archive(group):
        return Frame(key, row, key, sequence, row[1], parameter)
    return Frame(key, row, str(at(schema.FIELD, *row)), sequence, int(at(schema.NUMBER, *row)), parameter)


def _is_of(group: store.Group, part: slice, field: str, sequence: str) -> np.ndarray:
    """Which of some frames are of a sequence."""
    fields, sequences = (
        store.read(store.get_array(group, name), part) for name in (schema.FIELD, schema.SEQUENCE)
    )
    return (fields == field) & (sequences == sequence)


def _unknown(path: str | os.PathLike[str], root: store.Group, keys: Sequence[str], name: str) -> str:
    """What is said of a name that nothing has: near ones, or how far the sequence goes."""
    stem, colon, number = name.rpartition(":")
    stem = stem if colon and number.isdigit() else name
    lengths: dict[str, int] = {}
    for key in keys:
        for _, full in _names(store.get_group(root, key), key):
            sequence, _, place = full.rpartition(":")
            lengths[sequence] = max(lengths.get(sequence, 0), int(place))
    for sequence, last in lengths.items():
        if sequence == stem or sequence.endswith(f"/{stem}"):
            return f"{path}: {sequence} has frames 0 to {last}, and no {name!r}"
    tails: dict[str, list[str]] = {}
    for sequence in lengths:
        parts = sequence.split("/")
        for tail in ("/".join(parts[k:]) for k in range(min(len(parts), 3))):
            tails.setdefault(tail, []).append(sequence)
    near = [full for tail in difflib.get_close_matches(stem, tails, n=3, cutoff=0.5) for full in tails[tail]]
    if near:
        return f"{path}: no frame {name!r}; did you mean one of {_listed(list(dict.fromkeys(near)))}?"
    return f"{path}: no frame {name!r}; there are frames of {_listed(list(lengths))}"


def _choose_metric(path: str | os.PathLike[str], key: str, names: Sequence[str], metric: str | None) -> str:
    if not names:
        raise NeighboursError(f"{path}/{key}: no metric has distances here yet")
    if metric is None:
        return leading_metric(names)
    if metric not in names:
        raise NeighboursError(
            f"{path}/{key}: no distances by {metric!r}; there are those by {_listed(names)}"
        )
    return metric


def _listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
