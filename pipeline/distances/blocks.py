"""Which blocks of distances.zarr are out of date: the store's template, its rows, its fingerprints.

A fingerprint hashes all that determines a sequence's distances under a metric: the sequence's content,
the metric's specification with the hash of its weights, the scope, and which pairs. It is written after
the distances, so a block is done when its fingerprint says so; resuming after a crash, adding a metric
and adding data are one mechanism.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lsim.preprocess import Scope, scope_identity
from pipeline.storage import digests, schema, store
from pipeline.storage.recorded import bound_rows
from pipeline.storage.schema import Pairs

Matrices: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""By metric and row."""

METRICS_PER_CHUNK = 64
"""Of the texts in provenance: one chunk holds those of all metrics for a block's sequences, which one task
writes at once, instead of a small file a metric. A block has one task at a time, whatever its metrics."""

ROW_TEXTS = (schema.FAILURE, schema.CONTENT, schema.RESOLUTION, schema.DIGEST, schema.FINGERPRINT)
"""Texts that provenance has for every metric and sequence, the fingerprint last: as they are written. The
digest is of all others, see :func:`digest_rows`."""

SATISFIED_BY: dict[Pairs, tuple[Pairs, ...]] = {"all": ("all",), "reference": ("reference", "all")}
"""Which recorded pairs will do for those asked for: all pairs hold the reference's too."""


ROWS_PER_CHUNK = 4096
"""Of names and parameters, which the driver alone writes: 10⁵ sequences are a few files."""

ROWS_AT_ONCE = 4096
"""Rows whose texts are in memory at once while fingerprints are compared."""


@dataclass(frozen=True)
class StaleBlock:
    """Sequences ``start:stop`` of a field; for each metric the rows to compute, with their fingerprints.

    ``contents`` has the content hash of each row, ``places`` the index of each metric in provenance, and
    ``identities`` what digests bind each row to besides group and metric.
    """

    start: int
    stop: int
    rows: Mapping[str, Mapping[int, str]]
    contents: Mapping[int, str]
    places: Mapping[str, int]
    identities: Mapping[int, bytes]


@dataclass(frozen=True)
class StaleRows:
    """What of a field is out of date: a flag a matrix, of which blocks are made when they are wanted.

    Attributes
    ----------
    stale : dict of str to ndarray of bool
        By metric, for every sequence.
    length : int
        Sequences per block.
    contents : sequence of str
    suffixes : dict of str to str
        By metric, what fingerprints are made of besides the content.
    places : dict of str to int
        Index of each metric in provenance.
    identities : sequence of bytes
        See :func:`pipeline.storage.digests.identify_rows`.
    damaged : dict of str to int
        By metric, how many rows of today's fingerprint are stale as their record is not the one that was
        written with it, or holds no digest.
    """

    stale: Mapping[str, np.ndarray]
    length: int
    contents: Sequence[str]
    suffixes: Mapping[str, str]
    places: Mapping[str, int]
    identities: Sequence[bytes]
    damaged: Mapping[str, int]

    @property
    def metrics(self) -> list[str]:
        """Those that anything is out of date of."""
        return [name for name, rows in self.stale.items() if rows.any()]

    @property
    def fresh(self) -> int:
        """How many matrices are up to date."""
        return sum(int((~rows).sum()) for rows in self.stale.values())

    @property
    def starts(self) -> np.ndarray:
        """First row of every block that is out of date."""
        rows = np.flatnonzero(np.any([*self.stale.values()], axis=0))
        return np.unique(rows // self.length) * self.length

    def blocks(self) -> Iterator[StaleBlock]:
        """The blocks, one after the other."""
        for start in self.starts.tolist():
            stop = min(start + self.length, len(self.contents))
            rows: dict[str, dict[int, str]] = {}
            for name, stale in self.stale.items():
                if len(found := np.flatnonzero(stale[start:stop])):
                    suffix = self.suffixes[name]
                    rows[name] = {
                        row: _hashed(self.contents[row], suffix) for row in (found + start).tolist()
                    }
            contents = dict(enumerate(self.contents[start:stop], start))
            identities = dict(enumerate(self.identities[start:stop], start))
            places = {name: self.places[name] for name in rows}
            yield StaleBlock(start, stop, rows, contents, places, identities)


def fingerprint(content: str, specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """What a block is recorded under: a hash of all that determines its values."""
    return _hashed(content, _suffix(specification_hash, scope, pairs))


def _suffix(specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """All that is hashed after the content: 10⁶ fingerprints of a metric differ in that alone."""
    rest = {"pairs": pairs, "scope": scope_identity(scope), "specification": specification_hash}
    return json.dumps(rest, sort_keys=True)[1:]


def _hashed(content: str, suffix: str) -> str:
    text = f'{{"content": {json.dumps(content)}, {suffix}'
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_rows(
    key: str, block: StaleBlock, texts: Mapping[str, Mapping[str, Mapping[int, str]]], values: Matrices
) -> dict[str, dict[int, str]]:
    """Make the digests of a block's rows, by metric and row.

    Parameters
    ----------
    key : str
        ``<dataset>/<field>``.
    block : StaleBlock
    texts : mapping
        By name of the text, metric and row, all other texts that are recorded of the rows.
    values : mapping
        By metric and row, the matrices, of the rows that have fingerprints; others' don't count.
    """
    found: dict[str, dict[int, str]] = {}
    for metric, rows in block.rows.items():
        about = digests.identify(key, metric)
        for row in rows:
            of_row = {name: by_metric.get(metric, {}).get(row, "") for name, by_metric in texts.items()}
            done = of_row.get(schema.FINGERPRINT, "") != ""
            hashed = digests.hash_values(values[metric][row]) if done else ""
            identity = about + block.identities[row]
            found.setdefault(metric, {})[row] = digests.bind(identity, of_row, hashed)
    return found


def find_stale(
    group: store.Group,
    contents: Sequence[str],
    specifications: Mapping[str, str],
    scopes: Mapping[str, Scope],
    pairs: Pairs,
    identities: Sequence[bytes],
) -> StaleRows:
    """What of a field is out of date, and its fingerprints taken from it before anything else changes.

    Those that lose their fingerprint are the ones to compute, and distances of metrics that aren't computed
    now whose frames have changed since: without one nobody takes them for distances of today's frames. So do
    those of before there were resolutions: nobody knows what rounding did to them.

    Parameters
    ----------
    group : Group
        Of ``distances.zarr``, brought up to date by :func:`lay_out`.
    contents : sequence of str
        Content hash of each sequence.
    specifications : mapping of str to str
        Hash of each metric's specification, by name.
    scopes : mapping of str to scope
        The scope of each metric, by name.
    pairs : {"all", "reference"}
    identities : sequence of bytes
        What each row's digest is bound to, see :func:`pipeline.storage.digests.identify_rows`. A row whose
        record is another than was written with its fingerprint is out of date.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    places = {name: names.index(name) for name in specifications}
    # All pairs will do where the reference's are asked for: the first suffix is the one to record.
    suffixes = {
        name: [_suffix(hashed, scopes[name], p) for p in SATISFIED_BY[pairs]]
        for name, hashed in specifications.items()
    }
    described = _described(group, names)
    arrays = {name: store.get_array(provenance, name) for name in ROW_TEXTS}
    fingerprints = arrays[schema.FINGERPRINT]
    stale = {name: np.ones(len(contents), bool) for name in specifications}
    damaged: Counter[str] = Counter()
    length = fingerprints.chunks[1]
    at_once = max(1, ROWS_AT_ONCE // length) * length
    for start in range(0, len(contents), at_once):
        rows = slice(start, min(start + at_once, len(contents)))
        here = contents[rows]
        found = store.read(fingerprints, (slice(None), rows))
        if not (found != "").any():
            continue
        texts = {name: store.read(array, (slice(None), rows)) for name, array in arrays.items()}
        of_today = texts[schema.CONTENT] == np.array(here, dtype=object)[None]
        resolved = texts[schema.RESOLUTION] != ""
        valid = np.where(of_today & resolved, found, "").astype(object)
        for name, place in places.items():
            wanted = suffixes[name]
            of_other = np.array(
                [
                    all(recorded != _hashed(content, suffix) for suffix in wanted)
                    for recorded, content in zip(np.where(resolved, found, "")[place], here, strict=True)
                ],
                dtype=bool,
            )
            bound = bound_rows(group.path, name, identities[rows], {k: v[place] for k, v in texts.items()})
            unbound = ~bound if described[name] else np.ones(len(here), bool)
            damaged[name] += int((unbound & ~of_other).sum())
            stale[name][rows] = of_other | unbound
            valid[place, stale[name][rows]] = ""
        _write_changed(fingerprints, start, found, valid)
    recorded_as = {name: wanted[0] for name, wanted in suffixes.items()}
    return StaleRows(stale, length, contents, recorded_as, places, identities, damaged)


def forget_metrics(group: store.Group, names: Collection[str]) -> None:
    """Take all fingerprints of metrics that aren't computed now, and whose weights of pixels have changed.

    Parameters
    ----------
    group : Group
        Of ``distances.zarr``.
    names : collection of str
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    known = store.read(store.get_array(provenance, schema.METRIC))
    places = [place for place, name in enumerate(known) if name in names]
    if places:
        array = store.get_array(provenance, schema.FINGERPRINT)
        before = store.read(array)
        after = before.copy()
        after[places] = ""
        _write_changed(array, 0, before, after)


def _described(group: store.Group, names: Sequence[str]) -> dict[str, bool]:
    """Tell of each metric whether its specification is the one that was recorded for it here."""
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.SPECIFICATION)
    texts = store.read(array)
    return {
        name: digests.is_sealed(json.loads(str(text) or "{}"), group.path, name)
        for name, text in zip(names, texts, strict=True)
    }


def _write_changed(array: store.Array, start: int, old: np.ndarray, new: np.ndarray) -> None:
    """Write those chunks along the second axis that have changed, neighbours at once."""
    length = array.chunks[1]
    changed = np.unique(np.flatnonzero((old != new).any(axis=0)) // length)
    for run in np.split(changed, np.flatnonzero(np.diff(changed) > 1) + 1):
        if len(run):
            first, stop = int(run[0]) * length, (int(run[-1]) + 1) * length
            store.write_block(array, (0, start + first), new[:, first:stop])


def _block_length(group: store.Group) -> int | None:
    """Sequences per block of a field that is there: a chunk of the texts that its tasks write."""
    for name in ROW_TEXTS:
        if f"{schema.PROVENANCE}/{name}" in group:
            return int(store.get_array(store.get_group(group, schema.PROVENANCE), name).chunks[1])
    return None


def describe(
    group: store.Group, parameter: np.ndarray, specifications: Mapping[str, Mapping[str, Any]]
) -> None:
    """Record the parameter, and the specification of the metrics that are about to be computed."""
    array = store.get_array(group, schema.PARAMETER)
    if not np.array_equal(store.read(array), parameter):
        store.write_rows(array, 0, parameter)
    provenance = store.get_group(group, schema.PROVENANCE)
    names = store.read(store.get_array(provenance, schema.METRIC))
    array = store.get_array(provenance, schema.SPECIFICATION)
    known = store.read(array)
    texts = known.copy()
    for index, name in enumerate(names):
        if name in specifications:
            texts[index] = json.dumps(
                digests.sealed(specifications[name], group.path, str(name)), sort_keys=True
            )
    if (texts != known).any():
        store.write_rows(array, 0, texts)


def lay_out(
    root: store.Group, frames: store.Group, key: str, metrics: Mapping[str, str], choose: Callable[[], int]
) -> store.Group:
    """Bring a field's group into the shape of its frames, with an array for every metric.

    Metadata first: after this, tasks write values and nothing else.

    Parameters
    ----------
    root : Group
        Of ``distances.zarr``.
    frames : Group
        The field in ``frames.zarr``.
    key : str
        ``<dataset>/<field>``.
    metrics : mapping of str to str
        Names of the metrics to have, and the units of each; arrays already in the store stay.
    choose : callable
        Asked for the sequences per block of a group that is new; an existing group keeps its own.
    """
    n = store.get_array(frames, schema.FRAMES).shape[1]
    sequences = store.read(store.get_array(frames, schema.SEQUENCE))
    parameter = store.read(store.get_array(frames, schema.PARAMETER))
    if key in root and schema.PARAMETER in store.get_group(root, key):
        found = store.get_array(store.get_group(root, key), schema.PARAMETER).shape[1]
        if found != n:
            del root[key]
    group = root.require_group(key)
    block = _block_length(group) or choose()
    if schema.SEQUENCE not in group:
        shape, rows = sequences.shape, (ROWS_PER_CHUNK,)
        store.create_array(
            group, schema.SEQUENCE, shape=shape, chunks=rows, dims=(schema.SEQUENCE,), dtype=str
        )
        store.write_rows(store.get_array(group, schema.SEQUENCE), 0, sequences)
    if schema.PARAMETER not in group:
        shape, chunks = parameter.shape, (ROWS_PER_CHUNK, n)
        store.create_array(
            group, schema.PARAMETER, shape=shape, chunks=chunks, dims=schema.PARAMETER_DIMS, dtype="float64"
        )
    _add_metrics(group, metrics, store.get_array(group, schema.SEQUENCE).shape[0], n, block)
    _align_rows(group, [str(name) for name in sequences])
    store.set_attributes(group, dict(frames.attrs))
    return group


def _add_metrics(group: store.Group, metrics: Mapping[str, str], rows: int, n: int, block: int) -> None:
    """Arrays for the metrics that the store doesn't have yet."""
    provenance = group.require_group(schema.PROVENANCE)
    by_metric: dict[str, Any] = {"shape": (0,), "chunks": (METRICS_PER_CHUNK,), "dims": (schema.METRIC,)}
    by_row: dict[str, Any] = {
        "shape": (0, rows),
        "chunks": (METRICS_PER_CHUNK, block),
        "dims": schema.PROVENANCE_DIMS,
    }
    texts = dict.fromkeys((schema.METRIC, schema.SPECIFICATION), by_metric) | dict.fromkeys(ROW_TEXTS, by_row)
    for name, layout in texts.items():
        if name not in provenance:
            store.create_array(provenance, name, dtype=str, **layout)
    for name, units in metrics.items():
        if name not in group:
            shape, chunks = (rows, n, n), (block, n, n)
            store.create_array(
                group, name, shape=shape, chunks=chunks, dims=schema.DISTANCE_DIMS, dtype="float64"
            )
        store.set_units(store.get_array(group, name), units)
    # A resize that was interrupted leaves a nameless entry.
    known = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC)) if name]
    known += [name for name in metrics if name not in known]
    for name in texts:
        store.resize_rows(store.get_array(provenance, name), len(known))
    store.write_rows(store.get_array(provenance, schema.METRIC), 0, np.array(known, dtype=object))


def _align_rows(group: store.Group, sequences: list[str]) -> None:
    """Bring rows into the order of ``sequences``, keeping what is known of those that stay.

    A row that moves loses its fingerprint before its values change and gets it back after, so that an
    interruption costs a computation and never a wrong distance.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    names = store.get_array(group, schema.SEQUENCE)
    texts = {name: store.get_array(provenance, name) for name in ROW_TEXTS}
    matrices = [store.get_array(group, name) for name in schema.metric_names(group.array_keys())]
    parameters = store.get_array(group, schema.PARAMETER)
    old = [str(name) for name in store.read(names)]
    lengths = {array.shape[0] for array in (names, parameters, *matrices)}
    lengths |= {array.shape[1] for array in texts.values()}
    if old == sequences and lengths == {len(sequences)}:
        return
    row_of = {name: row for row, name in enumerate(old) if name}
    origin = np.array([row_of.get(name, -1) for name in sequences], dtype=int)
    moved = origin != np.arange(len(sequences))

    # What an interrupted alignment cut off already is missing here, and counts as never computed.
    known = {name: _rearranged(store.read(array), origin, "", axis=1) for name, array in texts.items()}
    fingerprints = texts[schema.FINGERPRINT]
    store.resize_rows(fingerprints, len(sequences), axis=1)
    unmoved = np.where(moved, "", known[schema.FINGERPRINT]).astype(object)
    _write_changed(fingerprints, 0, store.read(fingerprints), unmoved)
    rearranged = (origin[moved] >= 0).any()
    for array in matrices:
        values = _rearranged(store.read(array), origin, np.nan, axis=0) if rearranged else None
        store.resize_rows(array, len(sequences))
        if values is not None:
            store.write_rows(array, 0, values)
    of_rows = _rearranged(store.read(parameters), origin, np.nan, axis=0)
    store.resize_rows(parameters, len(sequences))
    store.write_rows(parameters, 0, of_rows)
    store.resize_rows(names, len(sequences))
    store.write_rows(names, 0, np.array(sequences, dtype=object))
    for name, array in texts.items():
        # The fingerprints last: only now do names, values and they speak of the same rows again.
        store.resize_rows(array, len(sequences), axis=1)
        _write_changed(array, 0, store.read(array), known[name])


def _rearranged(values: np.ndarray, origin: np.ndarray, missing: Any, axis: int) -> np.ndarray:
    """``values`` with row ``origin[k]`` along ``axis`` at k, ``missing`` where that is absent or −1."""
    there = (origin >= 0) & (origin < values.shape[axis])
    moved = np.moveaxis(values, axis, 0)
    out = np.full((len(origin), *moved.shape[1:]), missing, dtype=values.dtype)
    out[there] = moved[origin[there]]
    return np.moveaxis(out, 0, axis)
