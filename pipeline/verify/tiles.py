"""Compare each tile of a ``matrix.zarr`` with its fingerprint, its digest and its mirror image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.matrix.layout import tile_fingerprint
from pipeline.storage import chunks, metadata, schema, store
from pipeline.storage.digests import (
    binds,
    binds_mirror_image,
    binds_values,
    hash_labels,
    is_of_no_values,
    is_sealed,
)
from pipeline.storage.recorded import LABELS, tile_identity, tile_texts
from pipeline.verify.damage import (
    Check,
    Checks,
    Damage,
    VerifyReport,
    add_chunks,
    read_column,
    recorded_specification,
)

_PREFIX = f"{schema.PROVENANCE}/"


@dataclass(frozen=True)
class _Recorded:
    """Record of a metric's tiles and frames, and the hash of the labels of each block of frames.

    ``digests`` is None if they cannot be read before the metadata is restored.
    """

    group: str
    metric: str
    specification: str
    contents: np.ndarray
    fingerprints: np.ndarray
    digests: np.ndarray | None
    missing: np.ndarray
    unresolved: np.ndarray
    failures: np.ndarray
    labels: list[bytes]

    @property
    def comparable(self) -> np.ndarray:
        """Mask of the frames that have distances."""
        return np.asarray(self.failures == "")

    def has_other_failure(self, i: int, j: int, tile: int) -> bool:
        """Tell whether the recorded failure of an unfinished tile was not written with it."""
        digest = "" if self.digests is None else str(self.digests[i, j])
        return is_of_no_values(digest) and not self.bound(i, j, tile)

    def bound(self, i: int, j: int, tile: int) -> bool:
        """Tell whether a tile's digest matches its record; true without digests."""
        if self.digests is None:
            return True
        reasons = self.failures[i * tile : (i + 1) * tile].tolist() if i == j else ()
        counts = int(self.missing[i, j]), int(self.unresolved[i, j])
        texts = tile_texts(str(self.fingerprints[i, j]), *counts, reasons)
        identity = tile_identity(self.group, self.metric, (i, j), self.labels[i], self.labels[j])
        return binds(str(self.digests[i, j]), identity, texts)


def add_tiles(
    checks: Checks,
    name: str,
    arrays: Mapping[str, store.Array],
    faults: Mapping[str, str],
    report: VerifyReport,
) -> None:
    """Add a check for each tile on or above the diagonal and its mirror image; the records are read at once.

    Parameters
    ----------
    checks : Checks
    name : str
        Path of the group.
    arrays : mapping of str to Array
        Arrays of a group of a ``matrix.zarr``, with those of ``provenance/``.
    faults : mapping of str to str
        Reasons, by name, why other arrays can't be opened.
    report : VerifyReport
        Receives the number of chunks, and damage of the records.
    """
    records = _read_records(name, arrays, report)
    labels = {column: read_column(name, arrays[column], report) for column in LABELS}
    report.damages += _lost_metrics(name, arrays, faults, records)
    if any(f"{_PREFIX}{column}" in faults for column in (schema.DIGEST, schema.UNRESOLVED)):
        # Records can be compared with their digests again once the metadata is restored.
        del records[schema.DIGEST]
    for metric, array in arrays.items():
        if metric.startswith(_PREFIX) or metric in schema.CARRIED_BY_MATRIX:
            continue
        if metric in records[schema.METRIC].tolist():
            _add_metric(checks, array, _record_of(name, metric, array, records, labels), report)
        else:
            add_chunks(checks, name, array, report)


def _read_records(
    group: str, arrays: Mapping[str, store.Array], report: VerifyReport
) -> dict[str, np.ndarray]:
    """Read all columns of provenance, by name."""
    records = {
        column.removeprefix(_PREFIX): read_column(group, array, report, _PREFIX)
        for column, array in arrays.items()
        if column.startswith(_PREFIX)
    }
    # Stores of older versions have no digests, so nothing in them can be confirmed.
    shape = records[schema.FINGERPRINT].shape
    records.setdefault(schema.DIGEST, np.full(shape, "", dtype=object))
    records.setdefault(schema.UNRESOLVED, np.zeros(shape, np.int32))
    return records


def _lost_metrics(
    group: str,
    arrays: Mapping[str, store.Array],
    faults: Mapping[str, str],
    records: Mapping[str, np.ndarray],
) -> Iterator[Damage]:
    """Find metrics with finished tiles whose name or array is lost."""
    for place, metric in enumerate(map(str, records[schema.METRIC])):
        if not (records[schema.FINGERPRINT][place] != "").any():
            continue
        if not metric:
            reason = "the name of a metric is lost"
            yield Damage(group, f"{_PREFIX}{schema.METRIC}", "", "all metrics", reason)
        elif metric not in arrays:
            reason = faults.get(metric, "missing")
            yield Damage(group, metric, metadata.DOCUMENT, "all tiles", reason, (), metric)


def _record_of(
    group: str,
    metric: str,
    array: store.Array,
    records: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
) -> _Recorded:
    """Select the record of one metric."""
    place, tile = records[schema.METRIC].tolist().index(metric), array.chunks[0]
    starts = range(0, array.shape[0], tile)
    return _Recorded(
        group,
        metric,
        str(records[schema.SPECIFICATION][place]),
        records[schema.CONTENT],
        records[schema.FINGERPRINT][place],
        records[schema.DIGEST][place] if schema.DIGEST in records else None,
        records[schema.MISSING][place],
        records[schema.UNRESOLVED][place],
        records[schema.FAILURE][place],
        [hash_labels({c: values[k : k + tile] for c, values in labels.items()}) for k in starts],
    )


def _add_metric(checks: Checks, array: store.Array, recorded: _Recorded, report: VerifyReport) -> None:
    """Add the checks of one metric's tiles, and count them."""
    report.chunks += chunks.chunk_count(array)
    count = -(-array.shape[0] // array.chunks[0])
    if recorded.fingerprints.shape != (count, count):
        reason = f"of shape {array.shape}, its fingerprints are of {recorded.fingerprints.shape} tiles"
        report.damages.append(
            Damage(recorded.group, recorded.metric, "", "all tiles", reason, (), recorded.metric)
        )
        return
    total = count * (count + 1) // 2
    finished = int(np.triu(recorded.fingerprints != "").sum())
    report.compared += finished
    report.unfinished += total - finished
    checks.add(total, _tiles(array, count, recorded))


def _tiles(array: store.Array, count: int, recorded: _Recorded) -> Iterator[Check]:
    for i in range(count):
        for j in range(i, count):
            yield partial(_check_tile, array, (i, j), recorded)


def _check_tile(array: store.Array, place: tuple[int, int], recorded: _Recorded) -> list[Damage]:
    """Read a tile and its mirror image, and compare them with the record."""
    tile = array.chunks[0]
    i, j = place

    def damage(chunk: str, reason: str, *, unreadable: bool = False) -> Damage:
        metric = recorded.metric
        return Damage(recorded.group, metric, chunk, f"tile {i}, {j}", reason, place, metric, unreadable)

    start = (i * tile, j * tile)
    starts = [start] if i == j else [start, start[::-1]]
    damages, images = [], []
    for first in starts:
        try:
            rows, columns = (slice(k, k + tile) for k in first)
            images.append(store.read(array, (rows, columns)))
        except store.DamagedError:
            damaged = chunks.damaged_chunks(array, _first_value(first))
            damages += [damage(entry.key, entry.reason, unreadable=True) for entry in damaged]
    if damages:
        return damages
    if not recorded.fingerprints[i, j]:
        if recorded.has_other_failure(i, j, tile):
            return [damage("", "why its frames failed is not what was written with it")]
        return []
    comparable = all(recorded.comparable[k * tile : (k + 1) * tile].any() for k in (i, j))
    for first, values in zip(starts, images, strict=True) if comparable else ():
        if np.isnan(values).all() and chunks.missing_chunks(array, _first_value(first)):
            damages.append(damage(chunks.chunk_key(array, first), "missing"))
    if not damages and (reason := _fault(images, place, tile, recorded)):
        damages.append(damage(chunks.chunk_key(array, start), reason))
    return damages


def _first_value(start: tuple[int, int]) -> tuple[slice, ...]:
    """Select the first value of a tile, to look at its chunk."""
    return tuple(slice(k, k + 1) for k in start)


def _fault(images: list[np.ndarray], place: tuple[int, int], tile: int, recorded: _Recorded) -> str:
    """Describe the fault of a finished tile and its mirror image; empty if there is none."""
    i, j = place
    if not recorded.specification:
        return "its metric has no specification recorded"
    if not is_sealed(json.loads(recorded.specification), recorded.group, recorded.metric):
        return "the specification of its metric is not the one that was recorded"
    hashed, scope = recorded_specification(recorded.specification)
    fingerprint = tile_fingerprint(str(recorded.contents[i]), str(recorded.contents[j]), hashed, scope)
    if fingerprint != recorded.fingerprints[i, j]:
        return "its fingerprint is not that of the content and specification that are recorded"
    if not recorded.bound(i, j, tile):
        return "its record, with the names of its frames, is not the one that was written with it"
    directed = bool(json.loads(recorded.specification).get(schema.DIRECTED))
    if not directed and not np.array_equal(images[0], images[-1].T, equal_nan=True):
        return "not symmetric: it differs from its mirror image"
    rows, columns = (recorded.comparable[k * tile : (k + 1) * tile] for k in (i, j))
    mask = rows[:, None] & columns
    missing = int((np.isnan(images[0]) & mask).sum())
    if directed and i != j:
        missing += int((np.isnan(images[-1]) & mask.T).sum())
    if missing != recorded.missing[i, j]:
        return f"NaN for {missing} distances of comparable frames, {recorded.missing[i, j]} are recorded"
    if i == j and not directed and np.diagonal(images[0])[rows].any():
        return "values other than zero on the diagonal"
    digest = "" if recorded.digests is None else str(recorded.digests[i, j])
    is_bound = recorded.digests is None or (
        binds_values(digest, images[0]) and (i == j or binds_mirror_image(digest, images[-1]))
    )
    return "" if is_bound else "its distances are not those that were computed"
