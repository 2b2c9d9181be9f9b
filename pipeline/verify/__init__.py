"""Verify a store: compare each chunk with its checksum, and its values with their record.

Each chunk of each array is read, which finds any chunk whose checksum doesn't match; without checksums it
must at least decode. Then sequences of ``frames.zarr`` are hashed and compared with the hash of the
conversion. In ``distances.zarr`` each fingerprint must match the record, and its distances must be present:
symmetric, with a zero diagonal, and NaN only if a failure is recorded. Consolidated metadata of a finished
run lists the groups and arrays to expect.

Several threads read chunks, one sequence or one chunk each: memory doesn't depend on the store's size.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from pipeline.distances.blocks import fingerprint
from pipeline.storage import chunks, metadata, schema, store
from pipeline.storage.checked_frames import (
    content_hash,
    hash_weights,
    is_bound,
    weights_fault,
    weights_of_record,
)
from pipeline.storage.digests import binds_values, identify_rows, is_of_no_values, is_sealed
from pipeline.storage.recorded import LABELS, bound_rows, count_fingerprints
from pipeline.storage.schema import Pairs
from pipeline.verify.damage import (
    Check,
    Checks,
    Damage,
    VerifyReport,
    add_chunks,
    document_damage,
    lost_chunks,
    read_column,
    recorded_specification,
)
from pipeline.verify.embeddings import add_embeddings
from pipeline.verify.rollouts import check_rollouts
from pipeline.verify.tiles import add_tiles

THREADS = 8
"""Default number of threads: decoding releases Python's lock, and reading waits for disks."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (finished checks, total)."""


def verify(
    path: str | os.PathLike[str], *, threads: int = THREADS, progress: Progress | None = None
) -> VerifyReport:
    """Read a whole store, and compare it with its records.

    Parameters
    ----------
    path : str or path
        A store of frames, distances, a matrix, embeddings or rollouts. For other Zarr stores
        only chunks are checked.
    threads : int
        Number of threads; each holds one sequence of frames, or one chunk, at a time.
    progress : callable, optional

    Returns
    -------
    VerifyReport
        With all damage.

    Raises
    ------
    StoreError
        When there is no store, or an array claims to be larger than can be read.
    """
    try:
        root = store.open_store(path)
    except store.StoreError as error:
        kind = _kind_of_fields(path)
        if kind is None:
            raise
        reason = ""
        if isinstance(error, store.DamagedError):
            reason = error.damage.removeprefix(f"{metadata.DOCUMENT}: ")
        # The rest can be checked once the document of the root has been restored.
        return VerifyReport(kind, damages=[document_damage("", "", reason or "missing")])
    report = VerifyReport(str(root.attrs.get("kind") or _kind_of_fields(path) or schema.DISTANCES_STORE))
    if fault := metadata.root_fault(root):
        report.kind = _kind_of_fields(path) or report.kind
        report.damages.append(document_damage("", "", fault))
        return report
    checks = Checks()
    for group in _groups(root, metadata.listed_members(root)):
        _add_group(checks, group, report)
        if report.kind == schema.ROLLOUTS_STORE and schema.MODEL in group.arrays:
            checks.add(1, [partial(check_rollouts, root, group.name, report)])
        report.damages += _lost_fingerprints(root, group)
    for count, damages in enumerate(_in_threads(checks, threads), start=1):
        report.damages += damages
        if progress is not None:
            progress(count, checks.count)
    return report


def _kind_of_fields(path: str | os.PathLike[str]) -> str | None:
    """Infer the kind of a store from the names in its fields; None for an unknown kind."""
    kinds = {
        f"{schema.PROVENANCE}/{schema.MISSING}": schema.MATRIX_STORE,
        schema.NUMBER: schema.EMBEDDINGS_STORE,
        schema.MEMBER: schema.ROLLOUTS_STORE,
        f"{schema.PROVENANCE}/{schema.FINGERPRINT}": schema.DISTANCES_STORE,
        schema.FRAMES: schema.FRAMES_STORE,
    }
    names = {name.split("/", 2)[2] for name in metadata.paths_of_documents(path) if name.count("/") > 1}
    return next((kind for name, kind in kinds.items() if name in names), None)


@dataclass(frozen=True)
class _Group:
    """A group of a store, with its arrays and those of its provenance.

    ``faults`` has the reasons, by name, why an array or group cannot be opened. ``is_listed`` says whether
    there is consolidated metadata. ``recorded`` has the number of fingerprints by metric when
    the last run ended.
    """

    name: str
    arrays: dict[str, store.Array]
    faults: dict[str, str]
    is_listed: bool
    attributes: Mapping[str, Any]
    recorded: Mapping[str, int] = field(default_factory=dict)


def _groups(group: store.Group, documents: Mapping[str, Any] | None) -> Iterator[_Group]:
    """Yield each group of a store; a group of provenance belongs to its parent."""
    arrays, children, faults = metadata.members(group, documents)
    recorded: Any = {}
    if arrays and schema.PROVENANCE in children:
        provenance = children.pop(schema.PROVENANCE)
        records, _, record_faults = metadata.members(provenance, documents)
        recorded = provenance.attrs.get(schema.RECORDED, {}) if documents is not None else {}
        arrays |= {f"{_PREFIX}{name}": array for name, array in records.items()}
        faults |= {f"{_PREFIX}{name}": reason for name, reason in record_faults.items()}
    yield _Group(group.path, arrays, faults, documents is not None, dict(group.attrs), recorded)
    for child in children.values():
        yield from _groups(child, documents)


_PREFIX = f"{schema.PROVENANCE}/"
RECORDS = (schema.METRIC, schema.SPECIFICATION, schema.FAILURE, schema.CONTENT, schema.FINGERPRINT)
"""Arrays of provenance that distances and matrices have."""
NEEDED = {
    schema.FRAMES_STORE: (schema.FRAMES, schema.SEQUENCE, schema.PARAMETER, schema.CONTENT),
    schema.DISTANCES_STORE: (
        schema.SEQUENCE,
        schema.PARAMETER,
        *(f"{schema.PROVENANCE}/{name}" for name in RECORDS),
    ),
    schema.MATRIX_STORE: (
        *LABELS,
        *(f"{schema.PROVENANCE}/{name}" for name in (*RECORDS, schema.MISSING)),
    ),
    schema.EMBEDDINGS_STORE: (
        *LABELS,
        *(f"{schema.PROVENANCE}/{name}" for name in (schema.FAILURE, schema.FINGERPRINT)),
    ),
}
"""Arrays that a field needs to be compared with its record, by kind of store."""


def _add_group(checks: Checks, group: _Group, report: VerifyReport) -> None:
    """Add the checks of a group: against its record if that is complete, otherwise only of its chunks."""
    complete = report.kind != schema.EMBEDDINGS_STORE or not group.faults
    if complete and all(name in group.arrays for name in NEEDED.get(report.kind, ("",))):
        if report.kind == schema.FRAMES_STORE:
            _add_frames(checks, group, report)
        elif report.kind == schema.DISTANCES_STORE:
            _add_distances(checks, group, report)
        elif report.kind == schema.MATRIX_STORE:
            add_tiles(checks, group.name, group.arrays, group.faults, report)
        else:
            add_embeddings(checks, group.name, group.attributes, group.arrays, report)
    else:
        for name, array in group.arrays.items():
            add_chunks(checks, group.name, array, report, _PREFIX if name.startswith(_PREFIX) else "")
    reported = {(damage.group, damage.array) for damage in report.damages}
    for name, reason in group.faults.items():
        if (group.name, name) not in reported:
            report.damages.append(document_damage(group.name, name, reason))


def _lost_fingerprints(root: store.Group, group: _Group) -> list[Damage]:
    """Compare the number of fingerprints with their number at the end of the last run."""
    name = f"{_PREFIX}{schema.FINGERPRINT}"
    if not group.recorded or name not in group.arrays or group.faults:
        return []
    try:
        counts = count_fingerprints(store.get_group(root, group.name))
    except store.StoreError:
        return []  # the checks of the record report it
    missing = ", ".join(chunks.missing_chunks(group.arrays[name]))
    return [
        Damage(
            group.name,
            name,
            missing,
            f"fingerprints of {metric}" if metric else "fingerprints",
            f"{counts.get(metric, 0)} are present, {count} were at the end of the last run",
            metric=metric,
        )
        for metric, count in group.recorded.items()
        if counts.get(metric, 0) < count
    ]


def _in_threads(checks: Iterable[Check], threads: int) -> Iterator[list[Damage]]:
    """Run checks in threads, a few at a time, and yield their results in order."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[list[Damage]]] = deque()
        for check in checks:
            running.append(pool.submit(check))
            if len(running) >= 4 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# ---------------------------------------------------------------- frames


def _add_frames(checks: Checks, group: _Group, report: VerifyReport) -> None:
    """Add a check for each sequence of a field; its small arrays are read at once."""
    name = group.name
    columns = {
        column: read_column(name, array, report)
        for column, array in group.arrays.items()
        if column not in (schema.FRAMES, schema.WEIGHTS)
    }
    frames = group.arrays[schema.FRAMES]
    chunks.check_fits(frames, 0)
    report.chunks += chunks.chunk_count(frames)
    contents, sequences = columns[schema.CONTENT], columns[schema.SEQUENCE]
    converted = [row for row, content in enumerate(contents) if content]
    report.unfinished += len(contents) - len(converted)
    report.compared += len(converted)
    if nameless := tuple(row for row in converted if not sequences[row]):
        report.damages.append(Damage(name, schema.SEQUENCE, "", "names of sequences", "missing", nameless))
    if group.is_listed:  # an unfinished run has written names of sequences that are not converted yet
        report.damages += lost_chunks(name, group.arrays[schema.CONTENT], sequences != "")
    for row in converted if schema.SOURCE in columns else ():
        record = (str(sequences[row]), str(contents[row]), str(columns[schema.SOURCE][row]))
        if sequences[row] and not is_bound(name, *record):
            reason = "its name, content and source are not those that were converted together"
            report.damages.append(Damage(name, schema.SOURCE, "", f"sequence {record[0]}", reason, (row,)))
    sources = columns.get(schema.SOURCE)
    recorded = {weights_of_record(str(sources[row])) for row in converted} if sources is not None else None
    report.damages += _check_weights(group, recorded, tuple(converted), report)
    parameter = columns[schema.PARAMETER]
    checks.add(
        len(converted),
        (
            partial(
                _check_sequence, name, frames, row, str(sequences[row]), parameter[row], str(contents[row])
            )
            for row in converted
        ),
    )


def _check_weights(
    group: _Group, recorded: set[str] | None, rows: tuple[int, ...], report: VerifyReport
) -> list[Damage]:
    """Compare a field's pixel weights with their hash, which the record of each sequence contains."""
    array, content = group.arrays.get(schema.WEIGHTS), "weights of all sequences"
    if array is None:
        if schema.WEIGHTS in group.faults or not (recorded or set()) - {""}:
            return []  # lost metadata is reported by itself
        return [Damage(group.name, schema.WEIGHTS, "", content, weights_fault(""), rows)]
    chunks.check_fits(array)
    report.chunks += chunks.chunk_count(array)
    try:
        digest = hash_weights(store.read(array))
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array)
        return [
            Damage(group.name, schema.WEIGHTS, c.key, content, c.reason, rows, unreadable=True)
            for c in damaged
        ]
    if not recorded or recorded == {digest}:
        return []
    missing = ", ".join(chunks.missing_chunks(array))
    return [
        Damage(
            group.name,
            schema.WEIGHTS,
            missing,
            content,
            "missing" if missing else weights_fault(digest),
            rows,
        )
    ]


def _check_sequence(
    group: str, frames: store.Array, row: int, name: str, parameter: np.ndarray, content: str
) -> list[Damage]:
    """Read a sequence's frames, and compare them with the hash of the conversion."""
    try:
        digest = content_hash(store.read(frames, row), parameter)
    except store.DamagedError:
        damaged = chunks.damaged_chunks(frames, row)
        if len(damaged) == frames.shape[1]:  # the shard is cut off, not single frames
            whole = f"sequence {name}, all frames"
            return [Damage(group, schema.FRAMES, damaged[0].key, whole, damaged[0].reason, (row,))]
        return [
            Damage(group, schema.FRAMES, c.key, f"sequence {name}, frame {c.start[1]}", c.reason, (row,))
            for c in damaged
        ]
    if digest == content:
        return []
    missing = chunks.missing_chunks(frames, row)
    losses = [Damage(group, schema.FRAMES, key, f"sequence {name}", "missing", (row,)) for key in missing]
    reason = f"not as converted: expected {content} as the hash of frames and parameter, found {digest}"
    return losses or [Damage(group, schema.FRAMES, "", f"sequence {name}", reason, (row,))]


# ---------------------------------------------------------------- distances


@dataclass(frozen=True)
class _Recorded:
    """Record of one metric's matrices, by row.

    ``bound`` tells for each row whether its digest matches its record. ``digests`` is None if their metadata
    is lost, which is reported by itself.
    """

    group: str
    metric: str
    specification: str
    sequences: Sequence[str]
    fingerprints: Sequence[str]
    contents: Sequence[str]
    failures: Sequence[str]
    digests: Sequence[str] | None
    bound: Sequence[bool]

    def has_other_failure(self, row: int) -> bool:
        """Tell whether the recorded failure of an unfinished row was not written with it."""
        digest = "" if self.digests is None else self.digests[row]
        return not self.fingerprints[row] and is_of_no_values(digest) and not self.bound[row]

    def pairs(self, row: int) -> Pairs | None:
        """Infer which pairs were computed from the fingerprint; None if it doesn't match the record."""
        hashed, scope = recorded_specification(self.specification)
        kinds: tuple[Pairs, ...] = ("all", "reference")
        for pairs in kinds:
            if fingerprint(self.contents[row], hashed, scope, pairs) == self.fingerprints[row]:
                return pairs
        return None


@dataclass(frozen=True)
class _Records:
    """Provenance of a field's distances, with the names of its sequences.

    ``texts`` has the columns of provenance, ``identities`` the hash of each row's name and parameter.
    ``has_digests`` is false if digests cannot be read before their metadata is restored; ``unlabelled`` are
    the rows whose name or parameter is lost.
    """

    group: str
    texts: Mapping[str, np.ndarray]
    sequences: np.ndarray
    identities: Sequence[bytes]
    has_digests: bool
    unlabelled: set[int]

    def of_metric(self, metric: str, rows: int) -> _Recorded:
        """Select the record of one metric, for a number of rows."""
        place = [str(name) for name in self.texts[schema.METRIC]].index(metric)
        rows = min(rows, self.texts[schema.FINGERPRINT].shape[1])
        texts = {
            column: _padded(values[place], rows)
            for column, values in self.texts.items()
            if values.ndim == len(schema.PROVENANCE_DIMS)
        }
        identities = [*self.identities[:rows], *[b""] * (rows - len(self.identities))]
        columns = {column: np.array(values, dtype=object) for column, values in texts.items()}
        return _Recorded(
            self.group,
            metric,
            str(self.texts[schema.SPECIFICATION][place]),
            _padded(self.sequences, rows),
            texts[schema.FINGERPRINT],
            texts[schema.CONTENT],
            texts[schema.FAILURE],
            texts[schema.DIGEST] if self.has_digests else None,
            [
                bound or not self.has_digests or row in self.unlabelled
                for row, bound in enumerate(bound_rows(self.group, metric, identities, columns))
            ],
        )


def _add_distances(checks: Checks, group: _Group, report: VerifyReport) -> None:
    """Add a check for each chunk of each metric; the records are read at once."""
    records = _read_records(group, report)
    names = [str(metric) for metric in records.texts[schema.METRIC]]
    for metric in schema.metric_names(key for key in group.arrays if "/" not in key):
        array = group.arrays[metric]
        if metric not in names:  # a run was stopped before it recorded the name
            report.unfinished += array.shape[0]
            add_chunks(checks, group.name, array, report)
            continue
        recorded = records.of_metric(metric, array.shape[0])
        finished = sum(bool(text) for text in recorded.fingerprints)
        report.compared += finished
        report.unfinished += array.shape[0] - finished
        count = chunks.chunk_count(array)
        report.chunks += count
        checks.add(count, _chunks_of(group.name, array, recorded))


def _read_records(group: _Group, report: VerifyReport) -> _Records:
    """Read provenance and labels, and report what is lost of them."""
    name, arrays = group.name, group.arrays
    texts = {
        column.removeprefix(_PREFIX): read_column(name, array, report, _PREFIX)
        for column, array in arrays.items()
        if column.startswith(_PREFIX)
    }
    fingerprints = texts[schema.FINGERPRINT]
    # Stores of older versions have no digests, so nothing in them can be confirmed.
    texts.setdefault(schema.DIGEST, np.full(fingerprints.shape, "", dtype=object))
    labels = (schema.SEQUENCE, schema.PARAMETER)
    sequences, parameter = (read_column(name, arrays[column], report) for column in labels)
    for column in labels:
        report.damages += lost_chunks(name, arrays[column], (fingerprints != "").any(axis=0))
    report.damages += _lost_metrics(group, texts)
    # Lost labels cost no distances: the next run writes them again.
    unlabelled = {
        row
        for damage in report.damages
        if damage.group == name and damage.array in labels
        for row in damage.rows
    }
    # Records can be compared with their digests again once the metadata is restored.
    has_digests = not any(f"{_PREFIX}{text}" in group.faults for text in (schema.DIGEST, schema.RESOLUTION))
    identities = identify_rows(sequences, parameter)
    return _Records(name, texts, sequences, identities, has_digests, unlabelled)


def _lost_metrics(group: _Group, texts: Mapping[str, np.ndarray]) -> Iterator[Damage]:
    """Find metrics with finished matrices whose name or array is lost."""
    for place, metric in enumerate(map(str, texts[schema.METRIC])):
        finished = tuple(np.flatnonzero(texts[schema.FINGERPRINT][place] != "").tolist())
        if finished and not metric:
            reason = "the name of a metric is lost"
            yield Damage(group.name, f"{_PREFIX}{schema.METRIC}", "", "all metrics", reason)
        elif finished and metric not in group.arrays:
            reason, content = group.faults.get(metric, "missing"), f"all {len(finished)} matrices"
            yield Damage(group.name, metric, metadata.DOCUMENT, content, reason, finished, metric)


def _chunks_of(group: str, array: store.Array, recorded: _Recorded) -> Iterator[Check]:
    for start in chunks.chunk_starts(array):
        yield partial(_check_matrices, group, array, start, recorded)


def _padded(texts: Any, length: int) -> list[str]:
    """Pad texts to ``length`` rows: a run that was stopped while it moved rows has left arrays shorter."""
    return [*map(str, texts[:length]), *[""] * (length - len(texts))]


def _check_matrices(
    group: str, array: store.Array, start: tuple[int, ...], recorded: _Recorded
) -> list[Damage]:
    """Read a chunk of a metric, and compare its matrices with their records."""
    rows = range(start[0], min(start[0] + array.chunks[0], array.shape[0]))
    recorded_rows = range(rows.start, min(rows.stop, len(recorded.fingerprints)))
    finished = tuple(row for row in recorded_rows if recorded.fingerprints[row])
    key, metric = chunks.chunk_key(array, start), recorded.metric

    def damage(rows: Sequence[int], chunk: str, reason: str, *, unreadable: bool = False) -> Damage:
        names = ", ".join(recorded.sequences[row] for row in rows)
        content = f"sequence {names}" if names else "no finished sequence"
        return Damage(group, metric, chunk, content, reason, tuple(rows), metric, unreadable)

    try:
        values = store.read(array, slice(rows.start, rows.stop))
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array, rows.start)
        return [damage(finished, c.key, c.reason, unreadable=True) for c in damaged]
    other_failures = [row for row in recorded_rows if recorded.has_other_failure(row)]
    if other_failures:
        return [damage(other_failures, "", "why it failed is not what was written with it")]
    if not finished:
        return []
    # If all rows failed, for recorded reasons, a chunk that is all NaN may never have been written.
    all_failed = all(recorded.failures[row] for row in finished)
    if not all_failed and np.isnan(values).all() and chunks.missing_chunks(array, rows.start):
        return [damage(finished, key, "missing")]
    reasons = {row: _fault(values[row - rows.start], row, recorded) for row in finished}
    return [damage([row], key, reason) for row, reason in reasons.items() if reason]


def _fault(matrix: np.ndarray, row: int, recorded: _Recorded) -> str:
    """Describe the fault of a finished matrix; empty if there is none."""
    if not recorded.specification:
        return "its metric has no specification recorded"
    if not is_sealed(json.loads(recorded.specification), recorded.group, recorded.metric):
        return "the specification of its metric is not the one that was recorded"
    pairs = recorded.pairs(row)
    if pairs is None:
        return "its fingerprint is not that of the content and specification that are recorded"
    if not recorded.bound[row]:
        return "its record, with its sequence and parameter, is not the one that was written with it"
    directed = bool(json.loads(recorded.specification).get(schema.DIRECTED))
    if not directed and not np.array_equal(matrix, matrix.T, equal_nan=True):
        return "not symmetric"
    if not recorded.failures[row]:
        if np.isnan(matrix if pairs == "all" else matrix[0]).any():
            return "NaN, and no failure is recorded"
        if not directed and np.diagonal(matrix).any():
            return "values other than zero on the diagonal"
    is_bound = recorded.digests is None or binds_values(recorded.digests[row], matrix)
    return "" if is_bound else "its distances are not those that were computed"
