"""Read results and check them: each block is compared with its digest before its values count.

All distances are read here. Values and records that are lost, changed or in another's place are left out, and
reported by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.storage import chunks, digests, schema, store

NOT_COMPUTED = "not computed: its fingerprint is missing; run distances again"
NOT_RECORDED = "not recorded: nothing says what computed it; run distances again"
OTHER_RECORD = (
    "damaged distances: what is recorded of them, with their sequence and its parameter, is not what was "
    "written with them"
)
OTHER_VALUES = "damaged distances: they are not those that were computed"
NOT_EMBEDDED = "not computed: its fingerprint is missing; run embed again"
OTHER_EMBEDDING_RECORD = (
    "damaged embeddings: what is recorded of them, with the names of their frames, is not what was written "
    "with them"
)
OTHER_EMBEDDINGS = "damaged embeddings: they are not those that were computed"
OTHER_SPECIFICATION = "damaged distances: the specification of their metric is not the one that was recorded"


ROWS_AT_ONCE = 4096
"""Rows whose texts are read at once to list failures."""
TILES_AT_ONCE = 256
"""Most tiles along a side of a matrix whose records are read at once, and not band by band."""


def bound_rows(
    key: str, metric: str, identities: Sequence[bytes], texts: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Tell for each row of a metric whether its digest belongs to its record.

    Parameters
    ----------
    key : str
        ``<dataset>/<field>``.
    metric : str
    identities : sequence of bytes
        See :func:`pipeline.storage.digests.identify_rows`.
    texts : mapping of str to ndarray of shape (sequence,), object
        All texts that provenance has for the metric's rows, by name.

    Returns
    -------
    ndarray of shape (sequence,), bool
    """
    matrix_identity = digests.identify(key, metric)
    recorded = texts[schema.DIGEST].tolist()
    columns = {name: column.tolist() for name, column in texts.items() if name != schema.DIGEST}
    row_identities = [matrix_identity + identity for identity in identities]
    hashes = digests.bind_each(row_identities, columns, [digest[digests.HALF :] for digest in recorded])
    return np.array(
        [digest[: digests.HALF] == record for digest, record in zip(recorded, hashes, strict=True)],
        dtype=bool,
    )


@dataclass(frozen=True)
class CheckedRows:
    """Check of a field's matrices, by metric.

    Attributes
    ----------
    problems : dict of str to list of str
        Why each matrix doesn't count; empty where it does. Metrics are in the order in which they are
        recorded.
    damaged : dict of str to ndarray of bool
        True for each matrix that differs from what was written.
    finished : dict of str to ndarray of bool
        True for each matrix that has a fingerprint.
    resolutions : dict of str to list of str
        Record of rounding; missing in stores that have none.
    """

    problems: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, np.ndarray] = field(default_factory=dict)
    finished: dict[str, np.ndarray] = field(default_factory=dict)
    resolutions: dict[str, list[str]] = field(default_factory=dict)

    def counts(self, metric: str, row: int) -> bool:
        """Tell whether a matrix is as it was written, though some of its distances may be missing."""
        return metric not in self.problems or bool(
            self.finished[metric][row] and not self.damaged[metric][row]
        )

    def list_damaged(self, key: str, sequences: Sequence[str]) -> list[str]:
        """Name each matrix that is damaged."""
        return [
            f"{key}: {metric}, sequence {sequences[row]}: {self.problems[metric][row]}"
            for metric, rows in self.damaged.items()
            for row in np.flatnonzero(rows).tolist()
        ]


def check_rows(
    root: store.Group, key: str, matrices: Mapping[str, np.ndarray], rows: slice = slice(None)
) -> CheckedRows:
    """Compare matrices of a field of ``distances.zarr`` with their digests.

    Parameters
    ----------
    root : Group
        Root of the store. One that doesn't state its kind was made by others, needs no records, and counts.
    key : str
        ``<dataset>/<field>``.
    matrices : mapping of str to ndarray of shape (sequence, frame, frame)
        Matrices by metric, unchecked.
    rows : slice
        Their sequences; all by default.
    """
    group = store.get_group(root, key)
    count = len(range(*rows.indices(store.get_array(group, schema.SEQUENCE).shape[0])))
    if schema.PROVENANCE not in group:
        of_others = root.attrs.get("kind") is None
        problems = {} if of_others else {metric: [NOT_RECORDED] * count for metric in matrices}
        all_rows, no_rows = np.ones(count, bool), np.zeros(count, bool)
        return CheckedRows(problems, dict.fromkeys(problems, all_rows), dict.fromkeys(problems, no_rows))
    provenance = store.get_group(group, schema.PROVENANCE)
    metrics = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    specifications = store.read(store.get_array(provenance, schema.SPECIFICATION)).tolist()
    sequences, parameter = (
        store.read(store.get_array(group, name), rows) for name in (schema.SEQUENCE, schema.PARAMETER)
    )
    identities = digests.identify_rows(sequences, parameter)
    texts = _texts_of_rows(provenance, rows, count)
    check = CheckedRows()
    for place, metric in enumerate(metrics):
        if metric:
            of_metric = {name: column[place] for name, column in texts.items()}
            described = digests.is_sealed(json.loads(specifications[place] or "{}"), key, metric)
            bound = bound_rows(key, metric, identities, of_metric)
            values = matrices.get(metric)
            _judge(check, metric, of_metric, bound, described, values)
            if schema.RESOLUTION in of_metric:
                check.resolutions[metric] = of_metric[schema.RESOLUTION].tolist()
            if values is not None:
                _name_missing_chunks(check, store.get_array(group, metric), rows.start or 0)
    for metric in matrices.keys() - check.problems.keys():
        check.problems[metric] = [NOT_RECORDED] * count
        check.damaged[metric] = np.ones(count, bool)
        check.finished[metric] = np.zeros(count, bool)
    return check


def _texts_of_rows(provenance: store.Group, rows: slice, count: int) -> dict[str, np.ndarray]:
    """Read all texts by metric and sequence; add empty ones that stores of earlier versions lack.

    A run that was stopped while rows moved has left some arrays shorter: their missing texts are empty.
    """
    texts = {}
    for name, array in provenance.arrays():
        if getattr(array.metadata, "dimension_names", None) == schema.PROVENANCE_DIMS:
            values = store.read(array, (slice(None), rows))
            texts[name] = np.full((values.shape[0], count), "", dtype=object)
            texts[name][:, : values.shape[1]] = values
    shape = next(iter(texts.values())).shape if texts else (0, count)
    for name in (schema.FAILURE, schema.FINGERPRINT, schema.DIGEST):
        texts.setdefault(name, np.full(shape, "", dtype=object))
    return texts


def _judge(
    check: CheckedRows,
    metric: str,
    texts: Mapping[str, np.ndarray],
    bound: np.ndarray,
    described: bool,
    values: np.ndarray | None,
) -> None:
    """Find out why each of a metric's matrices doesn't count, and add it to the check."""
    finished = texts[schema.FINGERPRINT] != ""
    problems: list[str] = []
    damaged = np.zeros(len(finished), bool)
    hashes = [] if values is None else digests.hash_each(values)
    failures = texts[schema.FAILURE].tolist()
    for row, digest in enumerate(texts[schema.DIGEST].tolist()):
        reason = failures[row]
        if not finished[row]:
            # A matrix that isn't computed may have a reason of an earlier run.
            problems.append(reason if bound[row] and reason else NOT_COMPUTED)
            continue
        if not described:
            reason = OTHER_SPECIFICATION
        elif not bound[row]:
            reason = OTHER_RECORD
        elif values is None or digest[digests.HALF : 2 * digests.HALF] != hashes[row]:
            reason = OTHER_VALUES
        else:
            problems.append(reason)
            continue
        problems.append(reason)
        damaged[row] = True
    check.problems[metric], check.damaged[metric], check.finished[metric] = problems, damaged, finished


def _name_missing_chunks(check: CheckedRows, array: store.Array, first: int) -> None:
    """Name the missing chunks of damaged matrices."""
    problems = check.problems[array.basename]
    for row in np.flatnonzero(check.damaged[array.basename]):
        if problems[row] == OTHER_VALUES and (missing := chunks.missing_chunks(array, first + int(row))):
            problems[row] = f"damaged distances: chunk {', '.join(missing)} is missing"


# ---------------------------------------------------------------- failures


def failures_of_rows(root: store.Group, key: str) -> list[tuple[str, str, str]]:
    """List sequence, metric and reason of all matrices of a field that failed or have a damaged record.

    No distance is read.

    Parameters
    ----------
    root : Group
        Of a ``distances.zarr``.
    key : str
        ``<dataset>/<field>``.
    """
    group = store.get_group(root, key)
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    sequences, parameter = (
        store.read(store.get_array(group, name)) for name in (schema.SEQUENCE, schema.PARAMETER)
    )
    identities = digests.identify_rows(sequences, parameter)
    failures: dict[str, list[tuple[str, str, str]]] = {name: [] for name in names}
    for start in range(0, len(sequences), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(sequences)))
        texts = _texts_of_rows(provenance, rows, rows.stop - rows.start)
        for place, metric in enumerate(names):
            of_metric = {name: column[place] for name, column in texts.items()}
            bound = bound_rows(key, metric, identities[rows], of_metric)
            for row, reason in _reasons_of_rows(of_metric, bound):
                failures[metric].append((str(sequences[start + row]), metric, reason))
    return [failure for of_metric in failures.values() for failure in of_metric]


def _reasons_of_rows(texts: Mapping[str, np.ndarray], bound: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the rows of a metric that failed, or have a damaged record, with the reason."""
    finished = texts[schema.FINGERPRINT] != ""
    for row in np.flatnonzero(bound & (texts[schema.FAILURE] != "") | ~bound).tolist():
        if bound[row]:
            yield row, str(texts[schema.FAILURE][row])
        elif finished[row] or digests.is_of_no_values(str(texts[schema.DIGEST][row])):
            # Any other row was up to date once, and its record is obsolete.
            yield row, OTHER_RECORD


# ---------------------------------------------------------------- fingerprints


def count_fingerprints(group: store.Group) -> dict[str, int]:
    """Count the fingerprints of each metric in a group's provenance; under "" where metrics have no names."""
    provenance = store.get_group(group, schema.PROVENANCE)
    fingerprints = store.read(store.get_array(provenance, schema.FINGERPRINT))
    if schema.METRIC not in provenance:
        return {"": int((fingerprints != "").sum())}
    names = store.read(store.get_array(provenance, schema.METRIC))
    return {str(name): int((marks != "").sum()) for name, marks in zip(names, fingerprints, strict=True)}


def record_fingerprints(root: store.Group) -> None:
    """Record in each group's provenance how many fingerprints there are, at the end of a run.

    With this count, a fingerprint that is lost later differs from one that no run has written yet.
    """
    variable = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"
    fields = store.field_keys(root, variable)
    parts = [f"{key}/{part}" for key in fields for part in schema.PARTS_OF_ROLLOUTS]
    for key in (*fields, *(part for part in parts if f"{part}/{variable}" in root)):
        group = store.get_group(root, key)
        provenance = store.get_group(group, schema.PROVENANCE)
        store.set_attributes(provenance, {schema.RECORDED: count_fingerprints(group)})


# ---------------------------------------------------------------- tiles


LABELS = (schema.FIELD, schema.SEQUENCE, schema.NUMBER, schema.PARAMETER)
"""Labels of each frame in ``matrix.zarr`` and ``embeddings.zarr``."""
TILE_RECORDS = (schema.MISSING, schema.UNRESOLVED, schema.FINGERPRINT)
"""Arrays with a record of each tile, besides its digest and the failures of its frames."""


def tile_identity(key: str, metric: str, tile: tuple[int, int], rows: bytes, columns: bytes) -> bytes:
    """Identify a tile on or above the diagonal.

    Parameters
    ----------
    key : str
        Group of the matrix.
    metric : str
    tile : (int, int)
    rows, columns : bytes
        :func:`pipeline.storage.digests.hash_labels` of the frames of both blocks.
    """
    return digests.identify(key, metric, f"{tile[0]},{tile[1]}", "") + rows + b"," + columns


def tile_texts(
    fingerprint: str, missing: int, unresolved: int, failures: Sequence[str] = ()
) -> dict[str, str]:
    """Write the record of a tile as texts, for its digest.

    Parameters
    ----------
    fingerprint : str
    missing : int
        Number of distances that are NaN although both frames can be compared.
    unresolved : int
        Number of distances that rounding may have changed.
    failures : sequence of str
        Why each frame has no distances, for a block with itself.
    """
    reasons = "\x1f".join(f"{place}:{reason}" for place, reason in enumerate(failures) if reason)
    return {
        schema.FINGERPRINT: fingerprint,
        schema.MISSING: str(missing) if missing else "",
        schema.UNRESOLVED: str(unresolved) if unresolved else "",
        schema.FAILURE: reasons,
    }


def labels_of_blocks(group: store.Group, tile: int) -> list[bytes]:
    """Hash the labels of each block of frames, by :func:`pipeline.storage.digests.hash_labels`."""
    columns = {name: store.read(store.get_array(group, name)) for name in LABELS}
    count = len(columns[schema.NUMBER])
    return [
        digests.hash_labels({name: column[start : start + tile] for name, column in columns.items()})
        for start in range(0, count, tile)
    ]


@dataclass(frozen=True)
class TileFailures:
    """Recorded failures of a metric's matrix.

    Attributes
    ----------
    damaged : list of (str, str)
        Tiles with a damaged record, and the fault.
    reasons : ndarray of shape (frame,), object
        Why frames have no distances, as far as their records are undamaged.
    missing : int
        Number of distances that are NaN although both frames can be compared.
    """

    damaged: list[tuple[str, str]]
    reasons: np.ndarray
    missing: int


def failures_of_tiles(group: store.Group, metric: str, place: int, labels: Sequence[bytes]) -> TileFailures:
    """List what failed in a metric's matrix, compared with the digests of its tiles; no distance is read.

    Parameters
    ----------
    group : Group
        Of the matrix.
    metric : str
    place : int
        Index of the metric in provenance.
    labels : sequence of bytes
        :func:`labels_of_blocks`.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    reasons = store.get_array(provenance, schema.FAILURE)
    tile = reasons.chunks[1]
    reasons = store.read(reasons, (slice(place, place + 1), slice(None)))[0]
    if not all(name in provenance for name in (*TILE_RECORDS, schema.DIGEST)):
        return TileFailures([("all tiles", NOT_RECORDED)], np.full(reasons.shape, "", dtype=object), 0)
    missing, unresolved, fingerprints, recorded = (
        store.read(store.get_array(provenance, name), place) for name in (*TILE_RECORDS, schema.DIGEST)
    )

    missing, unresolved, fingerprints, recorded = (
        store.read(store.get_array(provenance, name), place) for name in (*TILE_RECORDS, schema.DIGEST)
    )
    frame_reasons, damaged, count = np.full(reasons.shape, "", dtype=object), [], 0
    for i, j in itertools.combinations_with_replacement(range(len(labels)), 2):
        digest, fingerprint = str(recorded[i, j]), str(fingerprints[i, j])
        rows = slice(i * tile, (i + 1) * tile)
        of_frames = reasons[rows].tolist() if i == j else ()
        texts = tile_texts(fingerprint, int(missing[i, j]), int(unresolved[i, j]), of_frames)
        if digests.binds(digest, tile_identity(group.path, metric, (i, j), labels[i], labels[j]), texts):
            count += int(missing[i, j])
            if i == j:
                frame_reasons[rows] = reasons[rows]
        elif fingerprint or digest:
            damaged.append((f"tile {i}, {j}", OTHER_RECORD))
    return TileFailures(damaged, frame_reasons, count)


@dataclass(frozen=True)
class BandRecord:
    """Records of a band of tiles (i, 0), (i, 1), …; below the diagonal, of their mirror image.

    Attributes
    ----------
    digests : list of str
    reasons : list of str
        Why each tile doesn't count by its record; empty where it does.
    """

    digests: list[str]
    reasons: list[str]


class CheckedMatrix:
    """A metric's matrix of a ``matrix.zarr``, each tile compared with its digest when it is read.

    Distances of tiles that don't count are NaN, and ``left_out`` names these tiles. ``directed`` means that
    rows are references, and that the two halves of the matrix differ.

    Parameters
    ----------
    root : Group
        Root of the store. One that doesn't state its kind was made by others, needs no records, and counts.
    key : str
        Group of the matrix.
    metric : str
    labels : list of bytes, optional
        Result of :func:`labels_of_blocks`, to save its computation.
    """

    def __init__(
        self, root: store.Group, key: str, metric: str, labels: Sequence[bytes] | None = None
    ) -> None:
        self.key, self.metric = key, metric
        group = store.get_group(root, key)
        self.array = store.get_array(group, metric)
        self.directed = bool(self.array.attrs.get(schema.DIRECTED, False))
        self.tile: int = self.array.chunks[0]
        self.left_out: dict[str, None] = {}
        self._labels = labels_of_blocks(group, self.tile) if labels is None else labels
        self._recorded = schema.PROVENANCE in group or root.attrs.get("kind") is not None
        self._records: dict[str, store.Array] = {}
        self._of_tiles: dict[str, np.ndarray] = {}
        self._place, self._described = -1, False
        self._bands: dict[int, BandRecord] = {}
        self._last: tuple[tuple[int, int], np.ndarray] | None = None
        if schema.PROVENANCE in group:
            self._open_records(store.get_group(group, schema.PROVENANCE))

    def _open_records(self, provenance: store.Group) -> None:
        names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
        required = (schema.FAILURE, schema.DIGEST, *TILE_RECORDS)
        if self.metric in names and all(name in provenance for name in required):
            self._place = names.index(self.metric)
            self._records = {name: store.get_array(provenance, name) for name in required}
            text = str(store.read(store.get_array(provenance, schema.SPECIFICATION))[self._place])
            self._described = digests.is_sealed(json.loads(text or "{}"), self.key, self.metric)

    @property
    def length(self) -> int:
        """Number of frames."""
        return int(self.array.shape[0])

    def row(self, index: int, columns: slice) -> np.ndarray:
        """Read distances of one frame, (column,) float32."""
        i, j = index // self.tile, columns.start // self.tile
        stop = -(-columns.stop // self.tile)
        first = j * self.tile
        values = self.band(i, j, stop)[index - i * self.tile]
        return values[columns.start - first : columns.stop - first]

    def both_ways(self, index: int, columns: slice) -> np.ndarray:
        """Read distances of one frame in both directions, and return their mean, (column,) float64."""
        values = self.row(index, columns).astype(np.float64)
        if not self.directed:
            return values
        i, place = divmod(index, self.tile)
        first, stop = columns.start // self.tile, -(-columns.stop // self.tile)
        column_values = np.concatenate([self.band(j, i, i + 1)[:, place] for j in range(first, stop)])
        start = first * self.tile
        return (values + column_values[columns.start - start : columns.stop - start]) / 2

    def value(self, index: int, column: int) -> float:
        """Read one distance."""
        i, j = index // self.tile, column // self.tile
        if self._last is None or self._last[0] != (i, j):
            self._last = ((i, j), self.band(i, j, j + 1))
        return float(self._last[1][index - i * self.tile, column - j * self.tile])

    def whole(self) -> np.ndarray:
        """Read all distances, (frame, frame) float32."""
        count = len(self._labels)
        bands = [self.band(i, 0, count) for i in range(count)]
        return np.concatenate(bands) if bands else np.empty(self.array.shape, np.float32)

    def check_records(self) -> None:
        """Compare the record of each tile on the diagonal with its digest; no distance is read."""
        for i in range(len(self._labels)):
            self._leave_out((i, i), self._band_record(i).reasons[i])

    def band(self, i: int, first: int, stop: int) -> np.ndarray:
        """Read tiles (i, first) to (i, stop - 1), side by side."""
        rows = slice(i * self.tile, min((i + 1) * self.tile, self.length))
        columns = slice(first * self.tile, min(stop * self.tile, self.length))
        try:
            values = store.read(self.array, (rows, columns))
        except store.DamagedError:
            if stop - first > 1:
                return np.concatenate([self.band(i, j, j + 1) for j in range(first, stop)], axis=1)
            key = chunks.chunk_key(self.array, (rows.start, columns.start))
            self._leave_out((i, first), f"damaged distances: chunk {key} cannot be decoded")
            return np.full((rows.stop - rows.start, columns.stop - columns.start), np.nan, np.float32)
        record = self._band_record(i)
        for j in range(first, stop):
            part = values[:, (j - first) * self.tile : (j - first + 1) * self.tile]
            reason = record.reasons[j] or self._other_values(record.digests[j], part, j < i)
            if reason:
                self._leave_out((i, j), reason)
                part[...] = np.nan
        return values

    def _other_values(self, digest: str, values: np.ndarray, mirrored: bool) -> str:
        """Say why distances are not those that were computed; empty where they are."""
        binds = digests.binds_mirror_image if mirrored else digests.binds_values
        bound = not self._recorded or binds(digest, values)
        return "" if bound else OTHER_VALUES

    def _leave_out(self, tile: tuple[int, int], reason: str) -> None:
        """Note that a tile doesn't count, if there is a reason."""
        if reason:
            self.left_out[f"{self.key}: {self.metric}, tile {tile[0]}, {tile[1]}: {reason}"] = None

    def _band_record(self, i: int) -> BandRecord:
        if i not in self._bands:
            self._bands[i] = self._read_band_record(i)
        return self._bands[i]

    def _read_band_record(self, i: int) -> BandRecord:
        count = len(self._labels)
        if self._place < 0:
            reason = NOT_RECORDED if self._recorded else ""
            return BandRecord([""] * count, [reason] * count)
        columns = (*TILE_RECORDS, schema.DIGEST)
        of_tiles = {name: self._mirrored(name, i) for name in columns}
        rows = slice(i * self.tile, (i + 1) * self.tile)
        failures = store.read(self._records[schema.FAILURE], (slice(self._place, self._place + 1), rows))[0]
        reasons = []
        for j in range(count):
            missing, unresolved, fingerprint, digest = (of_tiles[name][j] for name in columns)
            low, high = min(i, j), max(i, j)
            identity = tile_identity(
                self.key, self.metric, (low, high), self._labels[low], self._labels[high]
            )
            reasons_of_frames = failures.tolist() if i == j else ()
            texts = tile_texts(str(fingerprint), int(missing), int(unresolved), reasons_of_frames)
            if not fingerprint:
                reasons.append(NOT_COMPUTED)
            elif not self._described:
                reasons.append(OTHER_SPECIFICATION)
            else:
                reasons.append("" if digests.binds(str(digest), identity, texts) else OTHER_RECORD)
        return BandRecord([str(digest) for digest in of_tiles[schema.DIGEST]], reasons)

    def _mirrored(self, name: str, i: int) -> np.ndarray:
        """Read the records of tiles (i, j) for every j; below the diagonal, those of (j, i)."""
        array, place, band = self._records[name], slice(self._place, self._place + 1), slice(i, i + 1)
        if len(self._labels) <= TILES_AT_ONCE:
            if name not in self._of_tiles:
                self._of_tiles[name] = store.read(array, place)[0]
            row, column = self._of_tiles[name][i], self._of_tiles[name][:, i]
        else:
            row = store.read(array, (place, band, slice(None)))[0, 0]
            column = store.read(array, (place, slice(None), band))[0, :, 0]
        values: Any = np.where(np.arange(len(row)) < i, column, row)
        return np.asarray(values)


# ---------------------------------------------------------------- embeddings


def block_identity(key: str, metric: str, block: int, labels: bytes) -> bytes:
    """Identify a block of embeddings.

    Parameters
    ----------
    key : str
        ``<dataset>/<field>``.
    metric : str
    block : int
    labels : bytes
        :func:`pipeline.storage.digests.hash_labels` of its frames.
    """
    return digests.identify(key, metric, str(block), "") + labels


def block_texts(fingerprint: str, parts: Iterable[str], failures: Iterable[str]) -> dict[str, str]:
    """Write the record of a block of embeddings as texts, for its digest.

    Parameters
    ----------
    fingerprint : str
        Empty for a block that failed.
    parts : iterable of str
        Names of the arrays of the embeddings; the digest has a hash of each, ordered by name.
    failures : iterable of str
        Why each frame has no embedding.
    """
    reasons = "\x1f".join(f"{place}:{reason}" for place, reason in enumerate(failures) if reason)
    return {
        schema.FINGERPRINT: fingerprint,
        "parts": "\x1f".join(sorted(parts)),
        schema.FAILURE: reasons,
    }


class CheckedEmbeddings:
    """Embeddings of a field of ``embeddings.zarr``, each block compared with its digest when it is read.

    Embeddings of blocks that don't count are NaN, and ``left_out`` names these blocks.

    Parameters
    ----------
    root : Group
        Of the store.
    key : str
        ``<dataset>/<field>``.

    Attributes
    ----------
    parts : dict of str to Array
        Arrays of the embeddings, in the order of the hashes in digests.
    labels : dict of str to ndarray
        Labels of each frame, (frame,), see :data:`LABELS`.
    failures : ndarray of shape (frame,), object
        Why frames have no embedding.
    left_out : dict of str to None
    """

    def __init__(self, root: store.Group, key: str) -> None:
        self.key = key
        group = store.get_group(root, key)
        provenance = store.get_group(group, schema.PROVENANCE)
        names = sorted(set(group.array_keys()) - {*LABELS})
        self.parts = {name: store.get_array(group, name) for name in names}
        self.labels = {name: store.read(store.get_array(group, name)) for name in LABELS}
        failures = store.get_array(provenance, schema.FAILURE)
        self.failures = store.read(failures)
        self.left_out: dict[str, None] = {}
        self._length: int = failures.chunks[0]
        self._metric = str(group.attrs.get("metric", ""))
        self._fingerprints = store.read(store.get_array(provenance, schema.FINGERPRINT))
        self._digests = np.full(self._fingerprints.shape, "", dtype=object)
        if schema.DIGEST in provenance:
            self._digests = store.read(store.get_array(provenance, schema.DIGEST))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._fingerprints)

    def rows(self, block: int) -> slice:
        """Return the frames of a block."""
        return slice(block * self._length, min((block + 1) * self._length, len(self.failures)))

    def is_bound(self, block: int) -> bool:
        """Tell whether a block's digest belongs to its record."""
        rows = self.rows(block)
        labels = digests.hash_labels({name: column[rows] for name, column in self.labels.items()})
        identity = block_identity(self.key, self._metric, block, labels)
        texts = block_texts(str(self._fingerprints[block]), self.parts, self.failures[rows])
        return digests.binds(str(self._digests[block]), identity, texts)

    def is_damaged(self, block: int) -> bool:
        """Tell whether a block has a damaged record."""
        recorded = self._fingerprints[block] or digests.is_of_no_values(str(self._digests[block]))
        return bool(recorded) and not self.is_bound(block)

    def read(self, block: int) -> dict[str, np.ndarray]:
        """Read the embeddings of a block, (frame, …), by part."""
        digest, rows = str(self._digests[block]), self.rows(block)
        reason = "" if self._fingerprints[block] else NOT_EMBEDDED
        if not reason and not self.is_bound(block):
            reason = OTHER_EMBEDDING_RECORD
        values = {}
        for place, (name, array) in enumerate(self.parts.items(), start=1):
            try:
                values[name] = store.read(array, rows)
            except store.DamagedError as error:
                values[name] = np.full((rows.stop - rows.start, *array.shape[1:]), np.nan, array.dtype)
                reason = reason or f"damaged embeddings: {error.damage}"
                continue
            recorded = digest[place * digests.HALF : (place + 1) * digests.HALF]
            if not reason and digests.hash_values(values[name]) != recorded:
                missing = chunks.missing_chunks(array, rows)
                loss = f"damaged embeddings: chunk {', '.join(missing)} of {name} is missing"
                reason = loss if missing else OTHER_EMBEDDINGS
        if reason:
            self.left_out[f"{self.key}: block {block}, frames {rows.start} to {rows.stop - 1}: {reason}"] = (
                None
            )
            for part in values.values():
                part[...] = np.nan
        return values
