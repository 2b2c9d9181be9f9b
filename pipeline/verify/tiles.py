"""Whether the tiles of an ``matrix.zarr`` are whole: each against its fingerprint and its mirror image."""

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


@dataclass(frozen=True)
class _Recorded:
    """What provenance says of one metric's tiles and frames, and the hashes of the labels of each block."""

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
        """Frames that have distances."""
        return np.asarray(self.failures == "")

    def has_other_failure(self, i: int, j: int, tile: int) -> bool:
        """Tell whether what is recorded of a tile that isn't done is other than was written."""
        digest = "" if self.digests is None else str(self.digests[i, j])
        return is_of_no_values(digest) and not self.bound(i, j, tile)

    def bound(self, i: int, j: int, tile: int) -> bool:
        """Tell whether the digest of a tile, where there are digests, is that of its record."""
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
    """A check for each tile on or above the diagonal, with its mirror image; the records are read at once.

    Parameters
    ----------
    checks : Checks
    name : str
        Of the group.
    arrays : mapping of str to Array
        Of a group of an ``matrix.zarr``, those of provenance with that in front.
    faults : mapping of str to str
        Why others can't be opened, by name.
    report : VerifyReport
        Counts what is read, and takes what is damaged of the records.
    """
    prefix = f"{schema.PROVENANCE}/"
    records = {
        column.removeprefix(prefix): read_column(name, array, report, prefix)
        for column, array in arrays.items()
        if column.startswith(prefix)
    }
    # Of a store of before, which has none, nothing is known to be as it was written.
    shape = records[schema.FINGERPRINT].shape
    records.setdefault(schema.DIGEST, np.full(shape, "", dtype=object))
    records.setdefault(schema.UNRESOLVED, np.zeros(shape, np.int32))
    labels = {column: read_column(name, arrays[column], report) for column in LABELS}
    # Records can be compared with their digests again once the metadata is restored.
    lost = any(f"{prefix}{column}" in faults for column in (schema.DIGEST, schema.UNRESOLVED))
    names = [str(metric) for metric in records[schema.METRIC]]
    for place, metric in enumerate(names):
        done = (records[schema.FINGERPRINT][place] != "").any()
        if done and not metric:
            reason = "the name of a metric is lost"
            report.damages.append(Damage(name, f"{prefix}{schema.METRIC}", "", "all metrics", reason))
        elif done and metric not in arrays:
            reason = faults.get(metric, "missing")
            report.damages.append(Damage(name, metric, metadata.DOCUMENT, "all tiles", reason, (), metric))
    for metric, array in arrays.items():
        if metric.startswith(prefix):
            continue
        if metric in schema.CARRIED_BY_MATRIX:
            continue
        if metric not in names:
            add_chunks(checks, name, array, report)
            continue
        place, tile = names.index(metric), array.chunks[0]
        starts = range(0, array.shape[0], tile)
        recorded = _Recorded(
            name,
            metric,
            str(records[schema.SPECIFICATION][place]),
            records[schema.CONTENT],
            records[schema.FINGERPRINT][place],
            None if lost else records[schema.DIGEST][place],
            records[schema.MISSING][place],
            records[schema.UNRESOLVED][place],
            records[schema.FAILURE][place],
            [hash_labels({c: values[k : k + tile] for c, values in labels.items()}) for k in starts],
        )
        report.chunks += chunks.chunk_count(array)
        count = -(-array.shape[0] // tile)
        if recorded.fingerprints.shape != (count, count):
            expected = f"of shape {array.shape}, its fingerprints are of {recorded.fingerprints.shape} tiles"
            report.damages.append(Damage(name, metric, "", "all tiles", expected, (), metric))
            continue
        of_tiles = count * (count + 1) // 2
        done = int(np.triu(recorded.fingerprints != "").sum())
        report.compared += done
        report.unfinished += of_tiles - done
        checks.add(of_tiles, _tiles(name, array, count, recorded))


def _tiles(group: str, array: store.Array, count: int, recorded: _Recorded) -> Iterator[Check]:
    tile = array.chunks[0]
    for i in range(count):
        for j in range(i, count):
            yield partial(_tile, group, array, (i * tile, j * tile), recorded)


def _tile(group: str, array: store.Array, start: tuple[int, int], recorded: _Recorded) -> list[Damage]:
    """A tile and its mirror image."""
    tile = array.chunks[0]
    i, j = start[0] // tile, start[1] // tile
    places = [start] if i == j else [start, start[::-1]]
    what = f"tile {i}, {j}"
    damages, found = [], []
    for place in places:
        try:
            rows, columns = (slice(first, first + tile) for first in place)
            found.append(store.read(array, (rows, columns)))
        except store.DamagedError:
            region = tuple(slice(first, first + 1) for first in place)
            damages += [
                Damage(
                    group, recorded.metric, c.key, what, c.reason, (i, j), recorded.metric, unreadable=True
                )
                for c in chunks.damaged_chunks(array, region)
            ]
    if damages:
        return damages
    if not recorded.fingerprints[i, j]:
        if recorded.has_other_failure(i, j, tile):
            reason = "why its frames failed is not what was written with it"
            damages.append(Damage(group, recorded.metric, "", what, reason, (i, j), recorded.metric))
        return damages
    comparable = all(recorded.comparable[k * tile : (k + 1) * tile].any() for k in (i, j))
    for place, values in zip(places, found, strict=True) if comparable else ():
        region = tuple(slice(first, first + 1) for first in place)
        if np.isnan(values).all() and chunks.missing_chunks(array, region):
            key = chunks.chunk_key(array, place)
            damages.append(Damage(group, recorded.metric, key, what, "missing", (i, j), recorded.metric))
    if not damages and (reason := _fault(found, (i, j), tile, recorded)):
        key = chunks.chunk_key(array, start)
        damages.append(Damage(group, recorded.metric, key, what, reason, (i, j), recorded.metric))
    return damages


def _fault(found: list[np.ndarray], place: tuple[int, int], tile: int, recorded: _Recorded) -> str:
    """What is wrong with a tile that has a fingerprint; empty when nothing is."""
    i, j = place
    if not recorded.specification:
        return "its metric has no specification recorded"
    if not is_sealed(json.loads(recorded.specification), recorded.group, recorded.metric):
        return "the specification of its metric is not the one that was recorded"
    hashed, scope = recorded_specification(recorded.specification)
    made_of = tile_fingerprint(str(recorded.contents[i]), str(recorded.contents[j]), hashed, scope)
    if made_of != recorded.fingerprints[i, j]:
        return "its fingerprint is not that of the content and specification that are recorded"
    if not recorded.bound(i, j, tile):
        return "what is recorded of it, with the names of its frames, is not what was written with it"
    directed = bool(json.loads(recorded.specification).get(schema.DIRECTED))
    if not directed and not np.array_equal(found[0], found[-1].T, equal_nan=True):
        return "not symmetric: it differs from its mirror image"
    rows, columns = (recorded.comparable[k * tile : (k + 1) * tile] for k in (i, j))
    both = rows[:, None] & columns
    missing = int((np.isnan(found[0]) & both).sum())
    if directed and i != j:
        missing += int((np.isnan(found[-1]) & both.T).sum())
    if missing != recorded.missing[i, j]:
        return (
            f"NaN for {missing} distances of frames that can be compared, {recorded.missing[i, j]} recorded"
        )
    if i == j and not directed and np.diagonal(found[0])[rows].any():
        return "values other than zero on the diagonal"
    digest = "" if recorded.digests is None else str(recorded.digests[i, j])
    same = recorded.digests is None or (
        binds_values(digest, found[0]) and (i == j or binds_mirror_image(digest, found[-1]))
    )
    return "" if same else "its distances are not those that were computed"
