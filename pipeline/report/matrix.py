"""What the report shows of an archive: maps of its matrices, and what lies near a few references.

An archive may be too large to be shown whole. Of a matrix with more than :data:`SHOWN_FRAMES` frames some
sequences are shown, evenly spaced, and no more than a few rows of it are read, some chunks at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from pipeline.storage import schema, store
from pipeline.storage.checked_frames import NOT_READ, check_bound, read_sequence
from pipeline.storage.recorded import CheckedMatrix, labels_of_blocks

SHOWN_MATRICES = 12
"""Matrices beyond this many are named; the page must stay small."""
SHOWN_FRAMES = 3000
"""Frames of a matrix that are on its map."""
SMALL_MAPS = 8
"""Metrics with a map besides the first; the others are named."""
MARKED = 8
"""Frames of a map that are shown."""
REFERENCES, NEAREST = 3, 6
"""References of which the nearest frames are shown, and how many."""


@dataclass(frozen=True)
class MetricMap:
    """A metric's map, or why there is none."""

    metric: str
    found: mds.FrameMap | None
    reason: str


@dataclass(frozen=True)
class Matrix:
    """One matrix of an archive, with what the page draws of it.

    Attributes
    ----------
    key : str
    count : int
        Frames of the matrix.
    fields, sequences : list of str
        Of each frame that is shown.
    numbers, parameter : ndarray
        The same.
    maps : list of MetricMap
        The leading metric's first.
    not_mapped : list of str
        Metrics without a map, as there are many.
    marked : list of int
        Which of the frames shown are looked at.
    nearest : list of Neighbours
        Of a few references, in other sequences.
    left_out : list of str
        Tiles that don't count, with the reason.
    directed : list of str
        Metrics of which both directions are kept.
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
class MatrixContents:
    """Everything that the page shows of an archive, under the names that its template uses.

    ``frames_by_name`` holds the frames that are shown, (y, x, channel), where they could be read; ``table``
    has where each frame lies on each map.
    """

    title: str
    matrices: list[Matrix]
    not_illustrated: list[str]
    count: int
    metrics: list[str]
    scope: str
    weighted: list[str]
    failures: list[dict[str, Any]]
    unresolved: list[str]
    unavailable: dict[str, str]
    runs: list[dict[str, Any]]
    plans: list[str]
    specifications: dict[str, str]
    frames_by_name: dict[str, np.ndarray]
    missing_frames: str
    damaged: list[str]
    table: pd.DataFrame


def is_matrix(path: str | os.PathLike[str]) -> bool:
    """Whether there is an ``matrix.zarr`` at a path or address."""
    return store.exists(path) and store.open_store(path).attrs.get("kind") == schema.MATRIX_STORE


def gather_matrices(path: str | os.PathLike[str]) -> MatrixContents:
    """Read all that the report shows of an archive.

    Raises
    ------
    ReportError
        When there is no archive at ``path``, or it has no distances yet.
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
    store.check_documents(root)
    matrices = [_matrix(root, key) for key in keys[:SHOWN_MATRICES]]
    frames, missing_frames = find_frames(path, attributes)
    frames_by_name, damage = _read_frames(frames, matrices) if frames is not None else ({}, "")
    plans = attributes.get("plan", [])
    return MatrixContents(
        title=str(attributes.get("title") or ""),
        matrices=matrices,
        not_illustrated=keys[SHOWN_MATRICES:],
        count=sum(store.get_array(group, schema.NUMBER).shape[0] for group in groups.values()),
        metrics=_leading_first(metrics),
        scope=_scope_in_words(attributes.get("scope")),
        weighted=_weighted(path),
        failures=[failure for key, group in groups.items() for failure in _failures(key, group)],
        unresolved=[str(one) for one in list_unresolved(root)],
        unavailable={str(k): str(v) for k, v in attributes.get("unavailable", {}).items()},
        runs=[_run(run) for run in attributes.get("runs", [])],
        plans=[str(plan) for plan in plans] if isinstance(plans, list) else [str(plans)],
        specifications=_specifications(path),
        frames_by_name=frames_by_name,
        missing_frames=missing_frames or damage,
        damaged=[text for matrix in matrices for text in matrix.left_out],
        table=_table(matrices),
    )


def say_how_much(found: mds.FrameMap) -> str:
    """How much of the distances a map shows, in a sentence or two."""
    if np.isnan(found.explained):
        return "All frames are the same to this metric."
    share = f"{100 * found.explained:.0f} %"
    if found.explained > 0.995:
        return f"The two axes hold {share} of the variance: the map is all there is."
    if found.explained >= 0.8:
        return f"The two axes hold {share} of the variance: what is near on the map is near."
    if found.explained >= 0.5:
        return f"The two axes hold {share} of the variance: most of what tells frames apart, not all of it."
    return (
        f"The two axes hold only {share} of the variance: frames that are near on the map may be far from "
        "one another in ways that it doesn't show."
    )


def _matrix(root: store.Group, key: str) -> Matrix:
    group = store.get_group(root, key)
    count = store.get_array(group, schema.NUMBER).shape[0]
    shown = _sample(group, count)
    fields, sequences, numbers, parameter = (
        _picked(store.get_array(group, name), shown)
        for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER, schema.PARAMETER)
    )
    names = _leading_first(metrics_of(group))
    labels = labels_of_blocks(group, store.get_array(group, names[0]).chunks[0]) if names else []
    checked = [CheckedMatrix(root, key, name, labels) for name in names]
    for one in checked:
        one.check_records()
    maps = [_map(one, shown) for one in checked[: 1 + SMALL_MAPS]]
    first = next((one for one in maps if one.found is not None), None)
    matrix = Matrix(
        key=key,
        count=count,
        fields=[str(name) for name in fields],
        sequences=[str(name) for name in sequences],
        numbers=numbers.astype(int),
        parameter=parameter.astype(float),
        maps=maps,
        not_mapped=names[1 + SMALL_MAPS :],
        marked=mds.spread(first.found.positions, MARKED) if first and first.found else [],
        nearest=[],
        left_out=[],
        directed=[one.metric for one in checked if one.directed],
    )
    if first is not None:
        matrix.nearest.extend(_nearest(root, matrix, shown, first.metric))
    left_out = [*(one.left_out for one in checked), *(near.left_out for near in matrix.nearest)]
    matrix.left_out.extend(dict.fromkeys(text for texts in left_out for text in texts))
    return matrix


def _leading_first(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    first = leading_metric(names)
    return [first, *(name for name in names if name != first)]


# -- Which frames -------------------------------------------------------------------------------------


def _sample(group: store.Group, count: int) -> np.ndarray:
    """Frames to be shown: all, or those of sequences that are evenly spaced."""
    if count <= SHOWN_FRAMES:
        return np.arange(count)
    starts = [0]
    last: tuple[str, str] | None = None
    names = (store.get_array(group, schema.FIELD), store.get_array(group, schema.SEQUENCE))
    for begin in range(0, count, NAMES_TOGETHER):
        part = slice(begin, min(begin + NAMES_TOGETHER, count))
        for position, pair in enumerate(
            zip(*(store.read(a, part).tolist() for a in names), strict=True), begin
        ):
            if last is not None and pair != last:
                starts.append(position)
            last = pair
    bounds = [*starts, count]
    longest = max(np.diff(bounds))
    kept = max(1, SHOWN_FRAMES // int(longest))
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(kept, len(starts))).round().astype(int))
    return np.concatenate([np.arange(bounds[k], bounds[k + 1]) for k in chosen])[:SHOWN_FRAMES]


def _picked(array: store.Array, places: np.ndarray) -> np.ndarray:
    """Values of an array at places; read some chunks at a time."""
    length, chunk = array.shape[0], array.chunks[0]
    step = max(1, COLUMNS_TOGETHER // chunk) * chunk
    found = []
    for start in range(0, length, step):
        here = places[(places >= start) & (places < start + step)]
        if len(here):
            found.append(store.read(array, slice(start, min(start + step, length)))[here - start])
    return np.concatenate(found) if found else store.read(array, slice(0, 0))


def _picked_of_row(matrix: CheckedMatrix, row: int, places: np.ndarray) -> np.ndarray:
    """Read distances of a frame to others, the mean of both directions, some tiles at a time."""
    step = max(1, COLUMNS_TOGETHER // matrix.tile) * matrix.tile
    found = []
    for start in range(0, matrix.length, step):
        here = places[(places >= start) & (places < start + step)]
        if len(here):
            found.append(matrix.both_ways(row, slice(start, min(start + step, matrix.length)))[here - start])
    return np.concatenate(found) if found else np.empty(0)


# -- Maps ---------------------------------------------------------------------------------------------


def _map(matrix: CheckedMatrix, shown: np.ndarray) -> MetricMap:
    """Map the frames shown by all distances between them, or by those to landmarks, where frames are many.

    A map has one distance for a pair: of a metric that isn't symmetric, the mean of both directions.
    """

    def row(k: int) -> np.ndarray:
        return _picked_of_row(matrix, int(shown[k]), shown)

    metric = matrix.metric
    try:
        if len(shown) <= mds.CLASSICAL_UP_TO and len(shown) == matrix.length:
            distances = matrix.whole().astype(np.float64)
            found = mds.classical_map((distances + distances.T) / 2 if matrix.directed else distances)
        else:
            landmarks, rows = mds.choose_landmarks(row, len(shown))
            found = mds.landmark_map(rows, landmarks)
    except ValueError as error:
        return MetricMap(metric, None, str(error))
    if len(found.left_out) == len(shown):
        return MetricMap(metric, None, "no frame has distances")
    return MetricMap(metric, found, "")


def _nearest(root: store.Group, matrix: Matrix, shown: np.ndarray, metric: str) -> Iterator[Neighbours]:
    """Of references of the sequences of the frames that are marked, as long as there are other sequences."""
    references = {
        (matrix.fields[k], matrix.sequences[k]): k for k in np.flatnonzero(matrix.numbers == 0)[::-1].tolist()
    }
    wanted = [(matrix.fields[k], matrix.sequences[k]) for k in matrix.marked]
    places = [references[pair] for pair in dict.fromkeys(wanted) if pair in references]
    for k in places[:REFERENCES]:
        reference = _frame(matrix, k, int(shown[k]))
        found = neighbours_of(root, reference, NEAREST, metric, other_sequences=True)
        if found.nearest:
            yield found


def _frame(matrix: Matrix, k: int, row: int = -1) -> Frame:
    return Frame(
        matrix.key,
        (row,),
        matrix.fields[k],
        matrix.sequences[k],
        int(matrix.numbers[k]),
        float(matrix.parameter[k]),
    )


# -- Frames -------------------------------------------------------------------------------------------


def marked_frames(matrix: Matrix) -> list[Frame]:
    """The frames of a map that are looked at."""
    return [_frame(matrix, k) for k in matrix.marked]


def _read_frames(path: str, matrices: Sequence[Matrix]) -> tuple[dict[str, np.ndarray], str]:
    """The frames that the page has pictures of, by name, and what is said of those that are damaged.

    Those that are there no more are left out.
    """
    wanted = [frame for matrix in matrices for frame in marked_frames(matrix)]
    for found in (found for matrix in matrices for found in matrix.nearest):
        wanted += [found.of, *(near.frame for near in found.nearest)]
    root = store.open_store(path)
    there = set(store.field_keys(root, schema.FRAMES))
    frames: dict[str, np.ndarray] = {}
    damaged: dict[str, None] = {}
    for key in dict.fromkeys(frame.field for frame in wanted if frame.field in there):
        group = store.get_group(root, key)
        names = store.read(store.get_array(group, schema.SEQUENCE))
        row_of = {str(name): row for row, name in enumerate(names)}
        contents = store.read(store.get_array(group, schema.CONTENT))
        length = store.get_array(group, schema.FRAMES).shape[1]
        here = [f for f in wanted if f.field == key and f.sequence in row_of and f.number < length]
        for sequence in dict.fromkeys(frame.sequence for frame in here):
            of_sequence = [frame for frame in here if frame.sequence == sequence]
            row = row_of[sequence]
            try:
                check_bound(group)
                values = read_sequence(group, row, str(contents[row]))
            except NOT_READ:
                damaged |= dict.fromkeys(frame.name for frame in of_sequence)
            else:
                frames |= {frame.name: values[frame.number] for frame in of_sequence}
    return frames, f"Damaged: {', '.join(damaged)}." if damaged else ""


# -- How it was made ----------------------------------------------------------------------------------


def _failures(key: str, group: store.Group) -> list[dict[str, Any]]:
    """Frames of a matrix without distances, by sequence and reason, with the metrics that it holds for."""
    provenance = store.get_group(group, schema.PROVENANCE)
    metrics = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    found: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for place, metric in enumerate(metrics):
        texts = store.read(store.get_array(provenance, schema.FAILURE), place)
        bad = np.flatnonzero(texts != "")
        if not len(bad):
            continue
        fields, sequences, numbers = (
            store.read(store.get_array(group, name))
            for name in (schema.FIELD, schema.SEQUENCE, schema.NUMBER)
        )
        for k in bad.tolist():
            at = (str(fields[k]), str(sequences[k]), str(texts[k]))
            found.setdefault(at, {}).setdefault(metric, []).append(int(numbers[k]))
    return [
        {"matrix": key, "field": field, "sequence": sequence, "reason": reason, "metrics": list(by_metric)}
        | {"frames": sorted({number for numbers in by_metric.values() for number in numbers})}
        for (field, sequence, reason), by_metric in found.items()
    ]


def _scope_in_words(scope: Any) -> str:
    if scope == "none":
        return "values in their own units"
    if scope == "dataset":
        return "minimum and maximum of all frames of a matrix"
    return f"the range {json.dumps(scope)} for all frames" if scope is not None else "a range not recorded"


def _run(run: dict[str, Any]) -> dict[str, str]:
    """What the page says of a run."""
    spent = {name: f"{seconds:.1f}" for name, seconds in run.get("seconds_by_stage", {}).items()}
    told = ("started", "seconds", "tiles", "embeddings", "profile", "workers", "threads")
    return {name: str(run.get(name, "")) for name in told} | {
        "stages": ", ".join(f"{name} {seconds}" for name, seconds in spent.items())
    }


def _specifications(path: str | os.PathLike[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for metric, specification in store.specifications(path):
        found.setdefault(metric, json.dumps(specification, indent=2, ensure_ascii=False))
    return found


def _weighted(path: str | os.PathLike[str]) -> list[str]:
    """List the metrics whose means over pixels are weighted."""
    specifications = store.specifications(path)
    return list(dict.fromkeys(name for name, found in specifications if "weights_of_pixels" in found))


def _table(matrices: Sequence[Matrix]) -> pd.DataFrame:
    """Where each frame lies on each map, for the CSV beside the page."""
    tables = []
    for matrix in matrices:
        for one in matrix.maps:
            if one.found is not None:
                columns = {
                    "matrix": matrix.key,
                    "metric": one.metric,
                    "field": matrix.fields,
                    "sequence": matrix.sequences,
                    "number": matrix.numbers,
                    "parameter": matrix.parameter,
                    "x": one.found.positions[:, 0],
                    "y": one.found.positions[:, 1],
                }
                tables.append(pd.DataFrame(columns))
    names = ["matrix", "metric", "field", "sequence", "number", "parameter", "x", "y"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=names)
