"""Gather what the report shows of a ``matrix.zarr``: maps, and the nearest frames of a few references.

A matrix may be too large to be shown whole. Of one with more than :data:`SHOWN_FRAMES` frames evenly spaced
sequences are shown, and only a few of its rows are read, some chunks at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.matrix import mds
from pipeline.matrix.neighbours import (
    COLUMNS_TOGETHER,
    NAMES_TOGETHER,
    Frame,
    Neighbours,
    leading_metric,
    matrix_keys,
    metrics_of,
    neighbours_of,
)
from pipeline.metrics.resolution import list_unresolved
from pipeline.report.reading import ReportError, find_frames
from pipeline.storage import metadata, schema, store
from pipeline.storage.checked_frames import NOT_READ, check_bound, read_sequence
from pipeline.storage.recorded import CheckedMatrix, labels_of_blocks

SHOWN_MATRICES = 12
"""Matrices beyond this many are named; the page must stay small."""
SHOWN_FRAMES = 3000
"""Largest number of frames on the map of a matrix."""
SMALL_MAPS = 8
"""Metrics with a map besides the first; others are named."""
MARKED = 8
"""Frames of a map with a number and a picture."""
REFERENCES, NEAREST = 3, 6
"""Number of references whose nearest frames are shown, and of these frames."""


@dataclass(frozen=True)
class MetricMap:
    """A metric's map, or the reason why there is none."""

    metric: str
    frame_map: mds.FrameMap | None
    reason: str


@dataclass(frozen=True)
class Matrix:
    """One matrix, with what the page draws of it.

    Attributes
    ----------
    key : str
    count : int
        Number of frames in the matrix.
    fields, sequences : list of str
        Field and sequence of each frame on the map.
    numbers, parameter : ndarray of shape (frame,)
        Number within its sequence, and parameter, of each frame on the map.
    maps : list of MetricMap
        The leading metric's first.
    not_mapped : list of str
        Metrics beyond those with a map.
    marked : list of int
        Positions of the frames with a number and a picture.
    nearest : list of Neighbours
        Nearest frames of a few references, in other sequences.
    left_out : list of str
        Tiles that don't count, with the reason.
    directed : list of str
        Metrics whose two directions are both stored.
    """

    key: str
    count: int
    fields: list[str]
    sequences: list[str]
    numbers: np.ndarray
    parameter: np.ndarray
    maps: list[MetricMap]
    not_mapped: list[str]
    marked: list[int]
    nearest: list[Neighbours]
    left_out: list[str]
    directed: list[str]


@dataclass(frozen=True)
class FailedFrames:
    """Frames of a sequence that have no distances for one reason, with the metrics this holds for."""

    matrix: str
    field: str
    sequence: str
    reason: str
    metrics: list[str]
    frames: list[int]


@dataclass(frozen=True)
class Run:
    """One run of the matrix stage."""

    started: str
    seconds: str
    tiles: str
    embeddings: str
    profile: str
    workers: str
    stages: str


@dataclass(frozen=True)
class MatrixContents:
    """Everything that the page shows of a ``matrix.zarr``, under the names that its template uses.

    Attributes
    ----------
    title : str
    matrices : list of Matrix
    not_illustrated : list of str
    count : int
    metrics : list of str
    scope : str
    weighted : list of str
    failures : list of FailedFrames
    unresolved : list of str
    unavailable : dict of str to str
    runs : list of Run
    plans : list of str
    specifications : dict of str to str
    frames_by_name : dict of str to ndarray
        The frames with a picture, (y, x, channel), where they could be read.
    missing_frames : str
    damaged : list of str
    table : DataFrame
        Position of each frame on each map.
    """

    title: str
    matrices: list[Matrix]
    not_illustrated: list[str]
    count: int
    metrics: list[str]
    scope: str
    weighted: list[str]
    failures: list[FailedFrames]
    unresolved: list[str]
    unavailable: dict[str, str]
    runs: list[Run]
    plans: list[str]
    specifications: dict[str, str]
    frames_by_name: dict[str, np.ndarray]
    missing_frames: str
    damaged: list[str]
    table: pd.DataFrame


def is_matrix(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is a ``matrix.zarr`` at a path or address."""
    return store.exists(path) and store.open_store(path).attrs.get("kind") == schema.MATRIX_STORE


def gather_matrices(path: str | os.PathLike[str]) -> MatrixContents:
    """Read all that the report shows of a ``matrix.zarr``.

    Raises
    ------
    ReportError
        When there is no such store at ``path``, or it has no distances yet.
    """
    root = store.open_store(path)
    attributes: dict[str, Any] = dict(root.attrs)
    if attributes.get("kind") != schema.MATRIX_STORE:
        raise ReportError(
            f"{path}: expected a store of kind matrix, found {attributes.get('kind', 'another kind')}; "
            "'lsim matrix FRAMES --out matrix.zarr' makes one"
        )
    keys = matrix_keys(root)
    groups = {key: store.get_group(root, key) for key in keys}
    metrics = sorted({name for group in groups.values() for name in metrics_of(group)})
    if not metrics:
        raise ReportError(f"{path}: no matrix has distances yet")
    metadata.check_documents(root)
    matrices = [_gather_matrix(root, key) for key in keys[:SHOWN_MATRICES]]
    frames, missing_frames = find_frames(path, attributes)
    frames_by_name, damage = _read_pictured_frames(frames, matrices) if frames is not None else ({}, "")
    plans = attributes.get("plan", [])
    return MatrixContents(
        title=str(attributes.get("title") or ""),
        matrices=matrices,
        not_illustrated=keys[SHOWN_MATRICES:],
        count=sum(store.get_array(group, schema.NUMBER).shape[0] for group in groups.values()),
        metrics=_leading_first(metrics),
        scope=_scope_in_words(attributes.get("scope")),
        weighted=_weighted(path),
        failures=[failure for key, group in groups.items() for failure in _list_failures(key, group)],
        unresolved=[str(unresolved) for unresolved in list_unresolved(root)],
        unavailable={str(k): str(v) for k, v in attributes.get("unavailable", {}).items()},
        runs=[_describe_run(run) for run in attributes.get("runs", [])],
        plans=[str(plan) for plan in plans] if isinstance(plans, list) else [str(plans)],
        specifications=_specifications(path),
        frames_by_name=frames_by_name,
        missing_frames=missing_frames or damage,
        damaged=[text for matrix in matrices for text in matrix.left_out],
        table=_tabulate_maps(matrices),
    )


def say_how_much(frame_map: mds.FrameMap) -> str:
    """Say how much of the distances a map shows, in a sentence or two."""
    if np.isnan(frame_map.explained):
        return "All frames are the same to this metric."
    share = f"{100 * frame_map.explained:.0f} %"
    if frame_map.explained > 0.995:
        return f"The two axes hold {share} of the variance: the map is all there is."
    if frame_map.explained >= 0.8:
        return f"The two axes hold {share} of the variance: what is near on the map is near."
    if frame_map.explained >= 0.5:
        return f"The two axes hold {share} of the variance: most of what tells frames apart, not all of it."
    return (
        f"The two axes hold only {share} of the variance: frames that are near on the map may be far from "
        "one another in ways that it doesn't show."
    )


def _gather_matrix(root: store.Group, key: str) -> Matrix:
    """Read one matrix: labels of the frames on its map, maps, and nearest frames of a few references."""
    group = store.get_group(root, key)
    count = store.get_array(group, schema.NUMBER).shape[0]
    frame_indices = _choose_frames(group, count)
    fields, sequences, numbers, parameter = (
        _read_at(store.get_array(group, name), frame_indices)
        for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER, schema.PARAMETER)
    )
    names = _leading_first(metrics_of(group))
    labels = labels_of_blocks(group, store.get_array(group, names[0]).chunks[0]) if names else []
    matrices = [CheckedMatrix(root, key, name, labels) for name in names]
    for metric_matrix in matrices:
        metric_matrix.check_records()

    # The first metric that has a map marks frames and gives the nearest.
    maps = [_make_map(metric_matrix, frame_indices) for metric_matrix in matrices[: 1 + SMALL_MAPS]]
    marked, leading = [], None
    for metric_map in maps:
        if metric_map.frame_map is not None:
            marked = mds.spread(metric_map.frame_map.positions, MARKED)
            leading = metric_map.metric
            break
    matrix = Matrix(
        key=key,
        count=count,
        fields=[str(name) for name in fields],
        sequences=[str(name) for name in sequences],
        numbers=numbers.astype(int),
        parameter=parameter.astype(float),
        maps=maps,
        not_mapped=names[1 + SMALL_MAPS :],
        marked=marked,
        nearest=[],
        left_out=[],
        directed=[metric_matrix.metric for metric_matrix in matrices if metric_matrix.directed],
    )
    nearest = list(_find_nearest(root, matrix, frame_indices, leading)) if leading is not None else []
    damage = [text for metric_matrix in matrices for text in metric_matrix.left_out]
    damage += [text for neighbours in nearest for text in neighbours.left_out]
    return replace(matrix, nearest=nearest, left_out=list(dict.fromkeys(damage)))


def _leading_first(names: Sequence[str]) -> list[str]:
    """Move the metric that leads the page to the front."""
    if not names:
        return []
    first = leading_metric(names)
    return [first, *(name for name in names if name != first)]


# -- Frames on the map --------------------------------------------------------------------------------


def _choose_frames(group: store.Group, count: int) -> np.ndarray:
    """Choose the frames on the map: all, or those of evenly spaced sequences."""
    if count <= SHOWN_FRAMES:
        return np.arange(count)
    bounds = [*_sequence_starts(group, count), count]
    longest = int(max(np.diff(bounds)))
    sequences = min(max(1, SHOWN_FRAMES // longest), len(bounds) - 1)
    positions = np.unique(np.linspace(0, len(bounds) - 2, sequences).round().astype(int))
    return np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in positions])[:SHOWN_FRAMES]


def _sequence_starts(group: store.Group, count: int) -> list[int]:
    """List the first frame of each sequence; labels are read some at a time."""
    starts = [0]
    last: tuple[str, str] | None = None
    fields, sequences = store.get_array(group, schema.FIELD), store.get_array(group, schema.SEQUENCE)
    for begin in range(0, count, NAMES_TOGETHER):
        part = slice(begin, min(begin + NAMES_TOGETHER, count))
        labels = zip(store.read(fields, part).tolist(), store.read(sequences, part).tolist(), strict=True)
        for position, pair in enumerate(labels, begin):
            if last is not None and pair != last:
                starts.append(position)
            last = pair
    return starts


def _read_at(array: store.Array, positions: np.ndarray) -> np.ndarray:
    """Read the values of an array at rising positions, some chunks at a time."""
    length, chunk = array.shape[0], array.chunks[0]
    step = max(1, COLUMNS_TOGETHER // chunk) * chunk
    parts = []
    for start in range(0, length, step):
        inside = positions[(positions >= start) & (positions < start + step)]
        if len(inside):
            parts.append(store.read(array, slice(start, min(start + step, length)))[inside - start])
    return np.concatenate(parts) if parts else store.read(array, slice(0, 0))


def _read_row_at(matrix: CheckedMatrix, row: int, positions: np.ndarray) -> np.ndarray:
    """Read distances of a frame to others, the mean of both directions, some tiles at a time."""
    step = max(1, COLUMNS_TOGETHER // matrix.tile) * matrix.tile
    parts = []
    for start in range(0, matrix.length, step):
        inside = positions[(positions >= start) & (positions < start + step)]
        if len(inside):
            columns = slice(start, min(start + step, matrix.length))
            parts.append(matrix.both_ways(row, columns)[inside - start])
    return np.concatenate(parts) if parts else np.empty(0)


# -- Maps ---------------------------------------------------------------------------------------------


def _make_map(matrix: CheckedMatrix, frame_indices: np.ndarray) -> MetricMap:
    """Map the frames shown by all distances between them, or by those to landmarks, where frames are many.

    A map has one distance for a pair: for a metric that isn't symmetric, the mean of both directions.
    """

    def row(k: int) -> np.ndarray:
        return _read_row_at(matrix, int(frame_indices[k]), frame_indices)

    metric = matrix.metric
    try:
        if len(frame_indices) <= mds.CLASSICAL_UP_TO and len(frame_indices) == matrix.length:
            distances = matrix.whole().astype(np.float64)
            frame_map = mds.classical_map((distances + distances.T) / 2 if matrix.directed else distances)
        else:
            landmarks, rows = mds.choose_landmarks(row, len(frame_indices))
            frame_map = mds.landmark_map(rows, landmarks)
    except ValueError as error:
        return MetricMap(metric, None, str(error))
    if len(frame_map.left_out) == len(frame_indices):
        return MetricMap(metric, None, "no frame has distances")
    return MetricMap(metric, frame_map, "")


def _find_nearest(
    root: store.Group, matrix: Matrix, frame_indices: np.ndarray, metric: str
) -> Iterator[Neighbours]:
    """Find the nearest frames of the references of marked sequences, as far as other sequences have any."""
    references = {
        (matrix.fields[k], matrix.sequences[k]): k for k in np.flatnonzero(matrix.numbers == 0)[::-1].tolist()
    }
    marked = dict.fromkeys((matrix.fields[k], matrix.sequences[k]) for k in matrix.marked)
    positions = [references[sequence] for sequence in marked if sequence in references]
    for k in positions[:REFERENCES]:
        reference = _frame(matrix, k, int(frame_indices[k]))
        neighbours = neighbours_of(root, reference, NEAREST, metric, other_sequences=True)
        if neighbours.nearest:
            yield neighbours


def _frame(matrix: Matrix, k: int, row: int = -1) -> Frame:
    return Frame(
        matrix.key,
        (row,),
        matrix.fields[k],
        matrix.sequences[k],
        int(matrix.numbers[k]),
        float(matrix.parameter[k]),
    )


# -- Frames with a picture ----------------------------------------------------------------------------


def marked_frames(matrix: Matrix) -> list[Frame]:
    """List the frames of a map that have a number and a picture."""
    return [_frame(matrix, k) for k in matrix.marked]


def _read_pictured_frames(path: str, matrices: Sequence[Matrix]) -> tuple[dict[str, np.ndarray], str]:
    """Read the frames that the page has pictures of, by name; return also a note on damaged ones.

    Frames that are no longer in the store are left out.
    """
    pictured = [frame for matrix in matrices for frame in marked_frames(matrix)]
    for matrix in matrices:
        for neighbours in matrix.nearest:
            pictured += [neighbours.of, *(near.frame for near in neighbours.nearest)]
    root = store.open_store(path)
    stored = set(store.field_keys(root, schema.FRAMES))
    frames: dict[str, np.ndarray] = {}
    damaged: list[str] = []
    for key in dict.fromkeys(frame.field for frame in pictured if frame.field in stored):
        of_field = [frame for frame in pictured if frame.field == key]
        values, damage = _read_frames_of_field(store.get_group(root, key), of_field)
        frames |= values
        damaged += damage
    return frames, f"Damaged: {', '.join(dict.fromkeys(damaged))}." if damaged else ""


def _read_frames_of_field(
    group: store.Group, frames: Sequence[Frame]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read frames of one field, a sequence at a time; return them by name, and the names of damaged ones."""
    names = store.read(store.get_array(group, schema.SEQUENCE))
    rows = {str(name): row for row, name in enumerate(names)}
    contents = store.read(store.get_array(group, schema.CONTENT))
    length = store.get_array(group, schema.FRAMES).shape[1]
    by_sequence: dict[str, list[Frame]] = {}
    for frame in frames:
        if frame.sequence in rows and frame.number < length:
            by_sequence.setdefault(frame.sequence, []).append(frame)
    values: dict[str, np.ndarray] = {}
    damaged: list[str] = []
    for sequence, of_sequence in by_sequence.items():
        row = rows[sequence]
        try:
            check_bound(group)
            decoded = read_sequence(group, row, str(contents[row]))
        except NOT_READ:
            damaged += [frame.name for frame in of_sequence]
        else:
            values |= {frame.name: decoded[frame.number] for frame in of_sequence}
    return values, damaged


# -- How it was made ----------------------------------------------------------------------------------


def _list_failures(key: str, group: store.Group) -> list[FailedFrames]:
    """List the frames of a matrix without distances, by sequence and reason."""
    provenance = store.get_group(group, schema.PROVENANCE)
    metrics = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    numbers_by_metric: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for place, metric in enumerate(metrics):
        texts = store.read(store.get_array(provenance, schema.FAILURE), place)
        indices = np.flatnonzero(texts != "")
        if not len(indices):
            continue
        fields, sequences, numbers = (
            store.read(store.get_array(group, name))
            for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER)
        )
        for k in indices.tolist():
            cause = (str(fields[k]), str(sequences[k]), str(texts[k]))
            numbers_by_metric.setdefault(cause, {}).setdefault(metric, []).append(int(numbers[k]))
    return [
        FailedFrames(
            matrix=key,
            field=field,
            sequence=sequence,
            reason=reason,
            metrics=list(by_metric),
            frames=sorted({number for numbers in by_metric.values() for number in numbers}),
        )
        for (field, sequence, reason), by_metric in numbers_by_metric.items()
    ]


def _scope_in_words(scope: Any) -> str:
    if scope == "none":
        return "values in their own units"
    if scope == "dataset":
        return "minimum and maximum of all frames of a matrix"
    return f"the range {json.dumps(scope)} for all frames" if scope is not None else "a range not recorded"


def _describe_run(run: dict[str, Any]) -> Run:
    seconds_by_stage = run.get("seconds_by_stage", {})
    return Run(
        started=str(run.get("started", "")),
        seconds=str(run.get("seconds", "")),
        tiles=str(run.get("tiles", "")),
        embeddings=str(run.get("embeddings", "")),
        profile=str(run.get("profile", "")),
        workers=str(run.get("workers", "")),
        stages=", ".join(f"{name} {seconds:.1f}" for name, seconds in seconds_by_stage.items()),
    )


def _specifications(path: str | os.PathLike[str]) -> dict[str, str]:
    """Lay out each metric's specification, from the first matrix that has it."""
    texts: dict[str, str] = {}
    for metric, specification in store.specifications(path):
        texts.setdefault(metric, json.dumps(specification, indent=2, ensure_ascii=False))
    return texts


def _weighted(path: str | os.PathLike[str]) -> list[str]:
    """List the metrics whose means over pixels are weighted."""
    pairs = store.specifications(path)
    return list(dict.fromkeys(name for name, specification in pairs if "weights_of_pixels" in specification))


def _tabulate_maps(matrices: Sequence[Matrix]) -> pd.DataFrame:
    """Tabulate the position of each frame on each map, for the CSV beside the page."""
    tables = []
    for matrix in matrices:
        for metric_map in matrix.maps:
            if metric_map.frame_map is not None:
                columns = {
                    "matrix": matrix.key,
                    "metric": metric_map.metric,
                    "field": matrix.fields,
                    "sequence": matrix.sequences,
                    "number": matrix.numbers,
                    "parameter": matrix.parameter,
                    "x": metric_map.frame_map.positions[:, 0],
                    "y": metric_map.frame_map.positions[:, 1],
                }
                tables.append(pd.DataFrame(columns))
    names = ["matrix", "metric", "field", "sequence", "number", "parameter", "x", "y"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names)
