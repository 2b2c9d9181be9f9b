"""Nearest frames of a frame, read from its row of a stored distance matrix.

A row of an archive's matrix is read a few chunks at a time, and only the nearest frames so far are kept: a
million frames need no more memory than a thousand.
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
"""Number of frames whose names are in memory at once."""
COLUMNS_TOGETHER = 1 << 14
"""Distances of a row that are read at once; with tiles of 256², their chunks have 16 MB."""
NAMED = 5
"""Number of frames or sequences that an error lists."""
DEFAULT_METRICS = ("lsim", "lsim-open")
"""Default metrics that order neighbours, by preference; without them, the first metric of the store."""


class NeighboursError(ValueError):
    """A frame is unknown or ambiguous, or has no distances."""


@dataclass(frozen=True)
class Frame:
    """A frame of a matrix.

    Attributes
    ----------
    matrix : str
        Group of the matrix.
    row : tuple of int
        Index of the frame's distances in it.
    field : str
        ``<dataset>/<field>`` of the frame.
    sequence : str
    number : int
    parameter : float
    """

    matrix: str
    row: tuple[int, ...]
    field: str
    sequence: str
    number: int
    parameter: float

    @property
    def name(self) -> str:
        """The full name ``<dataset>/<field>/<sequence>:<number>``."""
        return frame_name(self.field, self.sequence, self.number)


@dataclass(frozen=True)
class Neighbour:
    """A frame with its distances by metric."""

    frame: Frame
    distances: dict[str, float]


@dataclass(frozen=True)
class Neighbours:
    """Nearest frames of a frame.

    Attributes
    ----------
    of : Frame
        The frame.
    metric : str
        Metric that orders the others.
    nearest : list of Neighbour
        Nearest first; frames at equal distances in the order of the matrix.
    compared : int
        Number of other frames, without those of its own sequence if they were excluded.
    without_distance : int
        Number of compared frames that have no distance to the frame.
    unresolved : int
        Number of distances by ``metric`` that rounding may have changed by more than 0.1 %, among all
        distances of the sequence, or of the tiles, that contain the nearest.
    left_out : list of str
        Descriptions of distances that were ignored because they are damaged or not computed yet.
    directed : list of str
        Metrics stored in both directions; their distances have the frame as the reference.
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
    """Matrix of a sequence in a ``distances.zarr``; NaN if it was ignored for the reasons in ``left_out``."""

    def __init__(self, values: np.ndarray, omissions: list[str]) -> None:
        self._values = values
        self.left_out = dict.fromkeys(omissions)
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
    """Find the nearest frames of a frame in a store of distances.

    Parameters
    ----------
    path : path
        A ``matrix.zarr``; or a ``distances.zarr``, where frames have distances within their sequence only.
    name : str
        ``<dataset>/<field>/<sequence>:<number>``, or its last parts if they are unambiguous. Without a
        number: frame 0.
    k : int
        Number of neighbours; fewer are returned if there are no more.
    metric : str, optional
        Metric that orders the frames. Default: ``lsim``, else ``lsim-open``, else the first in the store.
    matrix : str, optional
        Group of the matrix, if the frame is in several.
    other_sequences : bool
        Exclude frames of the same sequence.

    Raises
    ------
    NeighboursError
        When no frame or several frames have that name, for an unknown metric or matrix, or when the frame has
        no distances.
    pipeline.storage.store.StoreError
        When the path is no store of distances.
    """
    if k < 1:
        raise NeighboursError(f"k: expected at least 1 neighbour, found {k}")
    root = _open(path)
    metadata.check_documents(root)
    frame = find_frame(path, name, matrix)
    group = store.get_group(root, frame.matrix)
    if other_sequences and not _is_archive(group):
        raise NeighboursError(
            f"{path} has distances of frames in their own sequence alone; a matrix of all frames is made by "
            "'lsim matrix FRAMES --out matrix.zarr'"
        )
    metric = _choose_metric(path, frame.matrix, metrics_of(group), metric)
    neighbours = neighbours_of(root, frame, k, metric, other_sequences=other_sequences)
    if neighbours.without_distance == neighbours.compared:
        reason = "; ".join(neighbours.left_out[:NAMED]) or _recorded_failure(group, frame, metric)
        raise NeighboursError(
            f"{frame.name} has no distances by {metric}" + (f": {reason}" if reason else "")
        )
    return neighbours


def neighbours_of(
    root: store.Group, frame: Frame, k: int, metric: str, *, other_sequences: bool = False
) -> Neighbours:
    """Find the nearest frames of a frame that :func:`find_frame` returned; see :func:`find_neighbours`."""
    group = store.get_group(root, frame.matrix)
    own_sequence = (frame.field, frame.sequence) if other_sequences else None
    matrices = _checked_matrices(root, group, frame)
    columns, compared, missing = _nearest_columns(matrices[metric], group, frame.row[-1], k, own_sequence)
    nearest = [
        Neighbour(
            _frame(group, frame.matrix, (*frame.row[:-1], column)),
            {name: matrix.value(frame.row[-1], column) for name, matrix in matrices.items()},
        )
        for column in columns
    ]
    unresolved = _unresolved_near(group, frame.row, columns, metric)
    omissions = [text for matrix in matrices.values() for text in matrix.left_out]
    directed = [name for name in matrices if store.get_array(group, name).attrs.get(schema.DIRECTED)]
    return Neighbours(frame, metric, nearest, compared, missing, unresolved, omissions, directed)


def _checked_matrices(root: store.Group, group: store.Group, frame: Frame) -> dict[str, _Matrix]:
    """Open the matrices of a frame by metric; distances are compared with their record when they are read."""
    names, key = metrics_of(group), frame.matrix
    if _is_archive(group):
        if not names:
            return {}
        labels = labels_of_blocks(group, store.get_array(group, names[0]).chunks[0])
        return {name: CheckedMatrix(root, key, name, labels) for name in names}
    row = slice(frame.row[0], frame.row[0] + 1)
    values = {name: store.read(store.get_array(group, name), row) for name in names}
    check = check_rows(root, key, values, row)
    matrices: dict[str, _Matrix] = {}
    for name, matrix in values.items():
        reason = check.problems.get(name, [""])[0]
        if check.counts(name, 0):
            matrices[name] = _CheckedSequence(matrix[0], [])
        else:
            text = f"{key}: {name}, sequence {frame.sequence}: {reason}"
            matrices[name] = _CheckedSequence(np.full_like(matrix[0], np.nan), [text])
    return matrices


def find_frame(path: str | os.PathLike[str], name: str, matrix: str | None = None) -> Frame:
    """Find a frame of a store of distances by name; arguments and errors as in :func:`find_neighbours`."""
    root = _open(path)
    keys = matrix_keys(root)
    if matrix is not None:
        if matrix not in keys:
            raise NeighboursError(f"{path}: no matrix {matrix!r}; there are {_shortened(keys)}")
        keys = [matrix]
    full_names = (name, f"{name}:0")
    endings = tuple(f"/{text}" for text in full_names)
    exact: list[tuple[str, str, tuple[int, ...]]] = []
    tails: list[tuple[str, str, tuple[int, ...]]] = []
    for key in keys:
        for row, full in _names(store.get_group(root, key), key):
            if full in full_names:
                exact.append((full, key, row))
            elif full.endswith(endings):
                tails.append((full, key, row))
    matches = exact or tails
    if not matches:
        raise NeighboursError(_explain_unknown(path, root, keys, name))
    if len(matches) == 1:
        _, key, row = matches[0]
        return _frame(store.get_group(root, key), key, row)
    names = list(dict.fromkeys(full for full, _, _ in matches))
    if len(names) > 1:
        raise NeighboursError(f"{path}: {name!r} may be any of {_shortened(names)}: give more of its name")
    groups = _shortened([key for _, key, _ in matches])
    raise NeighboursError(
        f"{path}: {names[0]} is in several matrices, {groups}: choose one of them (--group)"
    )


def matrix_keys(root: store.Group) -> list[str]:
    """List the groups of a store of distances that hold matrices."""
    return store.field_keys(root, schema.PARAMETER)


def metrics_of(group: store.Group) -> list[str]:
    """List the metrics in the group of a matrix."""
    names = schema.matrix_metric_names if _is_archive(group) else schema.metric_names
    return names(group.array_keys())


def leading_metric(names: Sequence[str]) -> str:
    """Choose the metric to show first, see :data:`DEFAULT_METRICS`."""
    return next((name for name in DEFAULT_METRICS if name in names), names[0])


def frame_name(field: str, sequence: str, number: int) -> str:
    """Build the full name of a frame."""
    return f"{field}/{sequence}:{number}"


# ---------------------------------------------------------------- distances


def _nearest_columns(
    matrix: _Matrix, group: store.Group, row: int, k: int, own_sequence: tuple[str, str] | None
) -> tuple[list[int], int, int]:
    """Find the ``k`` columns of a row with the smallest distances, nearest first.

    Returns the columns, the number of compared columns, and the number of these without a distance. The frame
    itself, and frames of the field and sequence ``own_sequence``, are not compared.
    """
    length = matrix.length
    tile = matrix.tile if isinstance(matrix, CheckedMatrix) else length
    step = max(1, COLUMNS_TOGETHER // tile) * tile
    distances, columns = np.empty(0), np.empty(0, dtype=int)
    compared = missing = 0
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        values = matrix.row(row, part).astype(np.float64)
        indices = np.arange(part.start, part.stop)
        is_other = indices != row
        if own_sequence is not None:
            is_other &= ~_is_in_sequence(group, part, *own_sequence)
        values, indices = values[is_other], indices[is_other]
        valid = ~np.isnan(values)
        compared += len(values)
        missing += len(values) - int(valid.sum())
        # Keep the nearest of those so far and these.
        distances = np.concatenate([distances, values[valid]])
        columns = np.concatenate([columns, indices[valid]])
        best = np.argsort(distances, kind="stable")[:k]
        distances, columns = distances[best], columns[best]
    return columns.tolist(), compared, missing


def _unresolved_near(group: store.Group, row: tuple[int, ...], columns: Sequence[int], metric: str) -> int:
    """Count the unresolved distances in the tiles, or the sequence, of a row's columns; 0 without records."""
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


def _recorded_failure(group: store.Group, frame: Frame, metric: str) -> str:
    """Read the recorded reason why a frame has no distances; empty if there is none."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    if metric not in names:
        return ""
    # The matrix of a sequence has one reason for all frames.
    texts = store.get_array(provenance, schema.FAILURE)
    place = (names.index(metric), frame.row[0])
    return str(store.read(texts, tuple(slice(k, k + 1) for k in place)).item())


# ---------------------------------------------------------------- names


def _open(path: str | os.PathLike[str]) -> store.Group:
    root = store.open_store(path)
    kind = root.attrs.get("kind", schema.DISTANCES_STORE)
    if kind not in (schema.MATRIX_STORE, schema.DISTANCES_STORE):
        raise store.StoreError(f"{path}: expected a matrix.zarr or a distances.zarr, found a store of {kind}")
    return root


def _is_archive(group: store.Group) -> bool:
    """Tell whether a group has a matrix of all frames, rather than one for each sequence."""
    return schema.NUMBER in group


def _names(group: store.Group, key: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the row and the full name of each frame."""
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
    """Read the frame of a row: (frame,) in a matrix of all frames, (sequence, frame) in others."""

    def at(name: str, *index: int) -> Any:
        return store.read(store.get_array(group, name), tuple(slice(k, k + 1) for k in index)).item()

    parameter = float(at(schema.PARAMETER, *row))
    sequence = str(at(schema.SEQUENCE, row[0]))
    if not _is_archive(group):
        return Frame(key, row, key, sequence, row[1], parameter)
    return Frame(key, row, str(at(schema.FIELD, *row)), sequence, int(at(schema.NUMBER, *row)), parameter)


def _is_in_sequence(group: store.Group, part: slice, field: str, sequence: str) -> np.ndarray:
    """Tell for each frame of a part of the matrix whether it is in a sequence."""
    fields, sequences = (
        store.read(store.get_array(group, name), part) for name in (schema.FIELD, schema.SEQUENCE)
    )
    return (fields == field) & (sequences == sequence)


def _explain_unknown(path: str | os.PathLike[str], root: store.Group, keys: Sequence[str], name: str) -> str:
    """Write the message for an unknown name, with the sequence's frames or similar names."""
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
        return f"{path}: no frame {name!r}; did you mean one of {_shortened(list(dict.fromkeys(near)))}?"
    return f"{path}: no frame {name!r}; there are frames of {_shortened(list(lengths))}"


def _choose_metric(path: str | os.PathLike[str], key: str, names: Sequence[str], metric: str | None) -> str:
    """Check the name of a metric, or choose the default."""
    if not names:
        raise NeighboursError(
            f"{path}/{key}: no metric has distances yet: run 'lsim matrix' or 'lsim distances'"
        )
    if metric is None:
        return leading_metric(names)
    if metric not in names:
        raise NeighboursError(
            f"{path}/{key}: no distances by {metric!r}; there are those by {_shortened(names)}"
        )
    return metric


def _shortened(names: Sequence[str]) -> str:
    """List the first few names, and count the others."""
    suffix = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + suffix
