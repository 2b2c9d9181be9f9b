"""Whether a store is whole: every chunk against its checksum, and what chunks hold against what is recorded.

Every chunk of every array is read, so a chunk whose checksum doesn't match is found whatever it holds; one
of a store that was made without checksums must at least decode. Then sequences of ``frames.zarr`` are hashed
as conversion hashed them, and in ``distances.zarr`` each fingerprint must be that of what is recorded, and
have its distances: symmetric, with a zero diagonal, and NaN only where a failure says why. Groups and arrays
are those that the consolidated metadata lists, where a run has come to its end and written it.

Chunks are read by several threads, one sequence or one chunk a thread, whatever the size of the store.
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
from pipeline.verify.tiles import add_tiles

THREADS = 8
"""Decoding is done without Python's lock, and reading waits for disks: more than there are cores."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (checks done, checks in all)."""


def verify(
    path: str | os.PathLike[str], *, threads: int = THREADS, progress: Progress | None = None
) -> VerifyReport:
    """Read a whole store, and compare it with what is recorded of it.

    Parameters
    ----------
    path : str or path
        A ``frames.zarr``, ``distances.zarr``, ``matrix.zarr`` or ``embeddings.zarr``; of other Zarr stores
        the chunks alone are checked.
    threads : int
        Each holds one sequence of frames, or one chunk, at a time.
    progress : callable, optional

    Raises
    ------
    StoreError
        When there is no store, or an array claims more than can be looked at.
    """
    try:
        root = store.open_store(path)
    except store.StoreError as error:
        if (kind := _kind_of_fields(path)) is None:
            raise
        reason = (
            error.damage.removeprefix(f"{metadata.DOCUMENT}: ")
            if isinstance(error, store.DamagedError)
            else ""
        )
        # All else is looked at once it is there again.
        return VerifyReport(kind, damages=[document_damage("", "", reason or "missing")])
    report = VerifyReport(str(root.attrs.get("kind") or _kind_of_fields(path) or schema.DISTANCES_STORE))
    if fault := metadata.root_fault(root):
        report.kind = _kind_of_fields(path) or report.kind
        report.damages.append(document_damage("", "", fault))
        return report
    checks = Checks()
    for found_group in _groups(root, metadata.listed_members(root)):
        _add_group(checks, found_group, report)
        report.damages += _lost_fingerprints(root, found_group)
    for done, found in enumerate(_in_threads(checks, threads), start=1):
        report.damages += found
        if progress is not None:
            progress(done, checks.count)
    return report


def _kind_of_fields(path: str | os.PathLike[str]) -> str | None:
    """The kind of a store whose root doesn't say it, by what is in its fields; None where none is known."""
    of_kinds = {
        f"{schema.PROVENANCE}/{schema.MISSING}": schema.MATRIX_STORE,
        schema.NUMBER: schema.EMBEDDINGS_STORE,
        f"{schema.PROVENANCE}/{schema.FINGERPRINT}": schema.DISTANCES_STORE,
        schema.FRAMES: schema.FRAMES_STORE,
    }
    there = {found.split("/", 2)[2] for found in metadata.paths_of_documents(path) if found.count("/") > 1}
    return next((kind for name, kind in of_kinds.items() if name in there), None)


@dataclass(frozen=True)
class _Found:
    """A group of a store, and what of it is there; ``faults`` say why metadata is not, by array or group.

    ``attributes`` are the group's; ``recorded`` has the number of fingerprints of each metric when a run came
    to its end.
    """

    name: str
    arrays: dict[str, store.Array]
    faults: dict[str, str]
    listed: bool
    attributes: Mapping[str, Any]
    recorded: Mapping[str, int] = field(default_factory=dict)


def _groups(group: store.Group, listed: Mapping[str, Any] | None) -> Iterator[_Found]:
    """Every group of a store; those of provenance go with the group above."""
    arrays, children, faults = metadata.members(group, listed)
    recorded: Any = {}
    if arrays and schema.PROVENANCE in children:
        provenance = children.pop(schema.PROVENANCE)
        of_records = metadata.members(provenance, listed)
        recorded = provenance.attrs.get(schema.RECORDED, {}) if listed is not None else {}
        arrays |= {f"{schema.PROVENANCE}/{name}": array for name, array in of_records[0].items()}
        faults |= {f"{schema.PROVENANCE}/{name}": reason for name, reason in of_records[2].items()}
    yield _Found(group.path, arrays, faults, listed is not None, dict(group.attrs), recorded)
    for child in children.values():
        yield from _groups(child, listed)


RECORDS = (schema.METRIC, schema.SPECIFICATION, schema.FAILURE, schema.CONTENT, schema.FINGERPRINT)
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
"""Arrays without which a field can't be compared with what is recorded of it, by kind of store."""


def _add_group(checks: Checks, found: _Found, report: VerifyReport) -> None:
    """Checks of one group: against the record where all that it needs is there, else of its chunks alone."""
    whole = report.kind != schema.EMBEDDINGS_STORE or not found.faults
    if whole and all(name in found.arrays for name in NEEDED.get(report.kind, ("",))):
        if report.kind == schema.FRAMES_STORE:
            _add_frames(checks, found, report)
        elif report.kind == schema.DISTANCES_STORE:
            _add_distances(checks, found, report)
        elif report.kind == schema.MATRIX_STORE:
            add_tiles(checks, found.name, found.arrays, found.faults, report)
        else:
            add_embeddings(checks, found.name, found.attributes, found.arrays, report)
    else:
        for name, array in found.arrays.items():
            prefix = f"{schema.PROVENANCE}/" if name.startswith(f"{schema.PROVENANCE}/") else ""
            add_chunks(checks, found.name, array, report, prefix)
    told = {(damage.group, damage.array) for damage in report.damages}
    for name, reason in found.faults.items():
        if (found.name, name) not in told:
            report.damages.append(document_damage(found.name, name, reason))


def _lost_fingerprints(root: store.Group, found: _Found) -> list[Damage]:
    """Compare the number of fingerprints with that when the last run came to its end."""
    name = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"
    if not found.recorded or name not in found.arrays or found.faults:
        return []
    try:
        counts = count_fingerprints(store.get_group(root, found.name))
    except store.StoreError:
        return []  # named by whoever reads all that is recorded
    missing = ", ".join(chunks.missing_chunks(found.arrays[name]))
    return [
        Damage(
            found.name,
            name,
            missing,
            f"fingerprints of {metric}" if metric else "fingerprints",
            f"{counts.get(metric, 0)} are there, {count} were when the last run ended",
            metric=metric,
        )
        for metric, count in found.recorded.items()
        if counts.get(metric, 0) < count
    ]


def _in_threads(checks: Iterable[Check], threads: int) -> Iterator[list[Damage]]:
    """What each check finds, in order; only a few are under way at a time."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[list[Damage]]] = deque()
        for check in checks:
            running.append(pool.submit(check))
            if len(running) >= 4 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


# ---------------------------------------------------------------- frames


def _add_frames(checks: Checks, found: _Found, report: VerifyReport) -> None:
    """A check for each sequence of a field; its small arrays are read at once."""
    name = found.name
    columns = {
        column: read_column(name, array, report)
        for column, array in found.arrays.items()
        if column not in (schema.FRAMES, schema.WEIGHTS)
    }
    frames = found.arrays[schema.FRAMES]
    chunks.check_fits(frames, 0)
    report.chunks += chunks.chunk_count(frames)
    contents, sequences = columns[schema.CONTENT], columns[schema.SEQUENCE]
    there = [row for row, content in enumerate(contents) if content]
    report.unfinished += len(contents) - len(there)
    report.compared += len(there)
    if nameless := tuple(row for row in there if not sequences[row]):
        report.damages.append(Damage(name, schema.SEQUENCE, "", "names of sequences", "missing", nameless))
    if found.listed:  # a run that is under way, or was stopped, names sequences before it has them
        report.damages += lost_chunks(name, found.arrays[schema.CONTENT], sequences != "")
    for row in there if schema.SOURCE in columns else ():
        record = (str(sequences[row]), str(contents[row]), str(columns[schema.SOURCE][row]))
        if sequences[row] and not is_bound(name, *record):
            reason = "its name, content and source are not those that were converted together"
            report.damages.append(Damage(name, schema.SOURCE, "", f"sequence {record[0]}", reason, (row,)))
    sources = columns.get(schema.SOURCE)
    recorded = {weights_of_record(str(sources[row])) for row in there} if sources is not None else None
    report.damages += _weights(found, recorded, tuple(there), report)
    parameter = columns[schema.PARAMETER]
    checks.add(
        len(there),
        (
            partial(_sequence, name, frames, row, str(sequences[row]), parameter[row], str(contents[row]))
            for row in there
        ),
    )


def _weights(
    found: _Found, recorded: set[str] | None, rows: tuple[int, ...], report: VerifyReport
) -> list[Damage]:
    """A field's weights of pixels against their hash, which conversion recorded of each of its sequences."""
    array, what = found.arrays.get(schema.WEIGHTS), "weights of all sequences"
    if array is None:
        if schema.WEIGHTS in found.faults or not (recorded or set()) - {""}:
            return []  # the first is damage by itself
        return [Damage(found.name, schema.WEIGHTS, "", what, weights_fault(""), rows)]
    chunks.check_fits(array)
    report.chunks += chunks.chunk_count(array)
    try:
        digest = hash_weights(store.read(array))
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array)
        return [
            Damage(found.name, schema.WEIGHTS, c.key, what, c.reason, rows, unreadable=True) for c in damaged
        ]
    if not recorded or recorded == {digest}:
        return []
    missing = ", ".join(chunks.missing_chunks(array))
    return [
        Damage(
            found.name, schema.WEIGHTS, missing, what, "missing" if missing else weights_fault(digest), rows
        )
    ]


def _sequence(
    group: str, frames: store.Array, row: int, name: str, parameter: np.ndarray, content: str
) -> list[Damage]:
    """One sequence's frames against the hash of them that conversion recorded."""
    try:
        found = content_hash(store.read(frames, row), parameter)
    except store.DamagedError:
        damaged = chunks.damaged_chunks(frames, row)
        if len(damaged) == frames.shape[1]:  # a shard that is cut off, rather than single frames
            whole = f"sequence {name}, all frames"
            return [Damage(group, schema.FRAMES, damaged[0].key, whole, damaged[0].reason, (row,))]
        return [
            Damage(group, schema.FRAMES, c.key, f"sequence {name}, frame {c.start[1]}", c.reason, (row,))
            for c in damaged
        ]
    if found == content:
        return []
    missing = chunks.missing_chunks(frames, row)
    lost = [Damage(group, schema.FRAMES, key, f"sequence {name}", "missing", (row,)) for key in missing]
    reason = f"not as converted: the hash of frames and parameter is {found}, expected {content}"
    return lost or [Damage(group, schema.FRAMES, "", f"sequence {name}", reason, (row,))]


# ---------------------------------------------------------------- distances


@dataclass(frozen=True)
class _Recorded:
    """What provenance says of one metric's matrices; all by row.

    ``bound`` says of each row whether its digest is that of its record. There are no digests where the
    metadata of all is lost: that is damage by itself.
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
        """Tell whether what is recorded of a row that isn't done is other than was written."""
        digest = "" if self.digests is None else self.digests[row]
        return not self.fingerprints[row] and is_of_no_values(digest) and not self.bound[row]

    def pairs(self, row: int) -> Pairs | None:
        """Which pairs a fingerprint says are there; None where it is of nothing that is recorded."""
        hashed, scope = recorded_specification(self.specification)
        kinds: tuple[Pairs, ...] = ("all", "reference")
        for pairs in kinds:
            if fingerprint(self.contents[row], hashed, scope, pairs) == self.fingerprints[row]:
                return pairs
        return None


def _add_distances(checks: Checks, found: _Found, report: VerifyReport) -> None:
    """A check for each chunk of each metric; the records are read at once."""
    name, arrays = found.name, found.arrays
    prefix = f"{schema.PROVENANCE}/"
    texts = {
        column.removeprefix(prefix): read_column(name, array, report, prefix)
        for column, array in arrays.items()
        if column.startswith(prefix)
    }
    # Of a store of before, which has none, nothing is known to be as it was written.
    texts.setdefault(schema.DIGEST, np.full(texts[schema.FINGERPRINT].shape, "", dtype=object))
    sequences, parameter = (
        read_column(name, arrays[column], report) for column in (schema.SEQUENCE, schema.PARAMETER)
    )
    fingerprints = texts[schema.FINGERPRINT]
    for carried in (schema.SEQUENCE, schema.PARAMETER):
        report.damages += lost_chunks(name, arrays[carried], (fingerprints != "").any(axis=0))
    names = [str(metric) for metric in texts[schema.METRIC]]
    for place, metric in enumerate(names):
        done = tuple(np.flatnonzero(fingerprints[place] != "").tolist())
        if done and not metric:
            reason = "the name of a metric is lost"
            report.damages.append(Damage(name, f"{prefix}{schema.METRIC}", "", "all metrics", reason))
        elif done and metric not in arrays:
            reason, what = found.faults.get(metric, "missing"), f"all {len(done)} matrices"
            report.damages.append(Damage(name, metric, metadata.DOCUMENT, what, reason, done, metric))
    # What is lost of these is named, costs no distances, and is written by the next run.
    carried_lost = {
        row
        for damage in report.damages
        if damage.group == name and damage.array in (schema.SEQUENCE, schema.PARAMETER)
        for row in damage.rows
    }
    # Records can be compared with their digests again once the metadata is restored.
    lost = any(f"{prefix}{text}" in found.faults for text in (schema.DIGEST, schema.RESOLUTION))
    identities = identify_rows(sequences, parameter)
    by_row = [column for column, values in texts.items() if values.ndim == len(schema.PROVENANCE_DIMS)]
    for metric in schema.metric_names(key for key in arrays if "/" not in key):
        array = arrays[metric]
        if metric not in names:  # a run was stopped before it could say so
            report.unfinished += array.shape[0]
            add_chunks(checks, name, array, report)
            continue
        place = names.index(metric)
        length = min(array.shape[0], fingerprints.shape[1])
        padded = {column: _padded(texts[column][place], length) for column in by_row}
        of_metric = {column: np.array(values, dtype=object) for column, values in padded.items()}
        of_rows = [*identities[:length], *[b""] * (length - len(identities))]
        recorded = _Recorded(
            name,
            metric,
            str(texts[schema.SPECIFICATION][place]),
            _padded(sequences, length),
            padded[schema.FINGERPRINT],
            padded[schema.CONTENT],
            padded[schema.FAILURE],
            None if lost else padded[schema.DIGEST],
            [
                bound or lost or row in carried_lost
                for row, bound in enumerate(bound_rows(name, metric, of_rows, of_metric))
            ],
        )
        there = sum(bool(text) for text in recorded.fingerprints)
        report.compared += there
        report.unfinished += array.shape[0] - there
        count = chunks.chunk_count(array)
        report.chunks += count
        checks.add(count, _chunks_of(name, array, recorded))


def _chunks_of(group: str, array: store.Array, recorded: _Recorded) -> Iterator[Check]:
    for start in chunks.chunk_starts(array):
        yield partial(_matrices, group, array, start, recorded)


def _padded(texts: Any, length: int) -> list[str]:
    """Texts of ``length`` rows; a run that was stopped while rows moved has left some arrays shorter."""
    return [*map(str, texts[:length]), *[""] * (length - len(texts))]


def _matrices(group: str, array: store.Array, start: tuple[int, ...], recorded: _Recorded) -> list[Damage]:
    """One chunk of a metric, and the matrices in it against their fingerprints."""
    rows = range(start[0], min(start[0] + array.chunks[0], array.shape[0]))
    recorded_rows = range(rows.start, min(rows.stop, len(recorded.fingerprints)))
    done = tuple(row for row in recorded_rows if recorded.fingerprints[row])
    key, metric = chunks.chunk_key(array, start), recorded.metric

    def damage(rows: Sequence[int], chunk: str, reason: str, *, unreadable: bool = False) -> Damage:
        which = ", ".join(recorded.sequences[row] for row in rows) or "no sequence that is done"
        return Damage(group, metric, chunk, f"sequence {which}", reason, tuple(rows), metric, unreadable)

    try:
        values = store.read(array, slice(rows.start, rows.stop))
    except store.DamagedError:
        damaged = chunks.damaged_chunks(array, rows.start)
        return [damage(done, c.key, c.reason, unreadable=True) for c in damaged]
    failed_otherwise = [row for row in recorded_rows if recorded.has_other_failure(row)]
    if failed_otherwise:
        return [damage(failed_otherwise, "", "why it failed is not what was written with it")]
    if not done:
        return []
    # Where every row failed, for a recorded reason, a chunk of NaN alone may never have been written.
    failed = all(recorded.failures[row] for row in done)
    if not failed and np.isnan(values).all() and chunks.missing_chunks(array, rows.start):
        return [damage(done, key, "missing")]
    found = []
    for row in done:
        if reason := _fault(values[row - rows.start], row, recorded):
            found.append(damage([row], key, reason))
    return found


def _fault(matrix: np.ndarray, row: int, recorded: _Recorded) -> str:
    """What is wrong with a matrix that has a fingerprint; empty when nothing is."""
    if not recorded.specification:
        return "its metric has no specification recorded"
    if not is_sealed(json.loads(recorded.specification), recorded.group, recorded.metric):
        return "the specification of its metric is not the one that was recorded"
    pairs = recorded.pairs(row)
    if pairs is None:
        return "its fingerprint is not that of the content and specification that are recorded"
    if not recorded.bound[row]:
        return "what is recorded of it, with its sequence and parameter, is not what was written with it"
    directed = bool(json.loads(recorded.specification).get(schema.DIRECTED))
    if not directed and not np.array_equal(matrix, matrix.T, equal_nan=True):
        return "not symmetric"
    if not recorded.failures[row]:
        if np.isnan(matrix if pairs == "all" else matrix[0]).any():
            return "NaN, and no failure that says why"
        if not directed and np.diagonal(matrix).any():
            return "values other than zero on the diagonal"
    same = recorded.digests is None or binds_values(recorded.digests[row], matrix)
    return "" if same else "its distances are not those that were computed"
