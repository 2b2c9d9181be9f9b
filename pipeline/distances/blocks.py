"""Find the blocks of distances.zarr that are out of date: the store's template, its rows, its fingerprints.

A fingerprint hashes all that determines a sequence's distances under a metric: the sequence's content,
the metric's specification with the hash of its weights, the scope, and which pairs. It is written after
the distances, so a block is done when its fingerprint says so; resuming after a crash, adding a metric
and adding data are one mechanism.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lsim.preprocess import Scope, scope_identity
from pipeline.metrics.pixel_weights import FieldWeights
from pipeline.stage.provenance import METRICS_PER_CHUNK, add_metrics, has_specification, metric_places
from pipeline.stage.row_records import ROWS_PER_CHUNK, Records
from pipeline.storage import digests, schema, store
from pipeline.storage.recorded import bound_rows
from pipeline.storage.schema import Pairs
from pipeline.workers.worker_metrics import MetricRequest

Matrices: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""Matrices by metric and row."""

ROW_TEXTS = (schema.FAILURE, schema.CONTENT, schema.RESOLUTION, schema.DIGEST, schema.FINGERPRINT)
"""Texts that provenance has for every metric and sequence, in the order in which they are written: the
fingerprint last. The digest covers all others, see :func:`add_digests`."""

SATISFIED_BY: dict[Pairs, tuple[Pairs, ...]] = {"all": ("all",), "reference": ("reference", "all")}
"""Recorded pairs that will do for those asked for: all pairs hold the reference's too."""

LABELS_PER_CHUNK = 4096
"""Rows of a chunk of names and parameters."""

ROWS_AT_ONCE = 4096
"""Rows whose texts are in memory at once while fingerprints are compared."""


@dataclass(frozen=True)
class FieldMetric:
    """A metric as all blocks of a field are computed with it.

    Attributes
    ----------
    request : MetricRequest
    specification_hash : str
        That of the metric with the field's weights of pixels.
    scope : scope
    """

    request: MetricRequest
    specification_hash: str
    scope: Scope


@dataclass(frozen=True)
class FieldBlocks:
    """Description that all blocks of a field share.

    Attributes
    ----------
    frames, out, key : str
        Stores that are read and written, and the field's group in both.
    metrics : dict of str to FieldMetric
    pairs : {"all", "reference"}
    masking : bool
        Whether the run leaves out missing pixels.
    run : str
        Name of the run, in which each worker tries each metric once; without one nothing is tried.
    weights : FieldWeights, optional
        Weights of the field's pixels, where metrics are weighted by them.
    """

    frames: str
    out: str
    key: str
    metrics: Mapping[str, FieldMetric]
    pairs: Pairs
    masking: bool = False
    run: str = ""
    weights: FieldWeights | None = None

    def suffix(self, metric: str) -> str:
        """Serialise what fingerprints of a metric hash after the content of a sequence."""
        settings = self.metrics[metric]
        return _suffix(settings.specification_hash, settings.scope, self.pairs)


@dataclass(frozen=True)
class Block:
    """Some sequences of a field, with all that a worker needs to compute what is stale of them.

    Attributes
    ----------
    field : FieldBlocks
    start : int
        Row of the first sequence.
    contents : tuple of str
        Content hash of each sequence.
    identities : tuple of bytes
        What digests bind each row to besides group and metric, see
        :func:`pipeline.storage.digests.identify_rows`.
    rows : dict of str to tuple of int
        Stale rows by metric.
    """

    field: FieldBlocks
    start: int
    contents: tuple[str, ...]
    identities: tuple[bytes, ...]
    rows: Mapping[str, tuple[int, ...]]

    @property
    def stop(self) -> int:
        """Row after the last sequence."""
        return self.start + len(self.contents)

    @property
    def matrices(self) -> int:
        """Number of matrices that are out of date."""
        return sum(map(len, self.rows.values()))

    @property
    def label(self) -> str:
        """Description of the block in messages."""
        return f"{self.field.key}, sequences {self.start} to {self.stop - 1}"

    def fingerprints(self, metric: str) -> dict[int, str]:
        """Make the fingerprint of each stale row of a metric."""
        suffix = self.field.suffix(metric)
        return {row: _hashed(self.contents[row - self.start], suffix) for row in self.rows[metric]}


@dataclass(frozen=True)
class StaleRows:
    """Rows of a field that are out of date: a flag for each matrix; blocks are made of them one by one.

    Attributes
    ----------
    field : FieldBlocks
    stale : dict of str to ndarray of bool
        By metric, for every sequence.
    length : int
        Sequences in a block.
    contents : sequence of str
    identities : sequence of bytes
    damaged : int
        Rows with today's fingerprint that are stale as their record is not the one that was written with it,
        or holds no digest.
    """

    field: FieldBlocks
    stale: Mapping[str, np.ndarray]
    length: int
    contents: Sequence[str]
    identities: Sequence[bytes]
    damaged: int

    @property
    def metrics(self) -> list[str]:
        """Metrics with stale rows."""
        return [name for name, rows in self.stale.items() if rows.any()]

    @property
    def fresh(self) -> int:
        """Number of matrices that are up to date."""
        return sum(int((~rows).sum()) for rows in self.stale.values())

    @property
    def starts(self) -> np.ndarray:
        """First row of every block that is out of date."""
        rows = np.flatnonzero(np.any([*self.stale.values()], axis=0))
        return np.unique(rows // self.length) * self.length

    def blocks(self) -> Iterator[Block]:
        """Make the stale blocks, one after the other."""
        for start in self.starts.tolist():
            rows = slice(start, start + self.length)
            stale = {
                name: tuple((np.flatnonzero(flags[rows]) + start).tolist())
                for name, flags in self.stale.items()
                if flags[rows].any()
            }
            yield Block(self.field, start, tuple(self.contents[rows]), tuple(self.identities[rows]), stale)


def fingerprint(content: str, specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """Hash all that determines the distances of a sequence under a metric."""
    return _hashed(content, _suffix(specification_hash, scope, pairs))


def _suffix(specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """Serialise all that is hashed after the content: 10⁶ fingerprints of a metric differ in that alone."""
    rest = {"pairs": pairs, "scope": scope_identity(scope), "specification": specification_hash}
    return json.dumps(rest, sort_keys=True)[1:]


def _hashed(content: str, suffix: str) -> str:
    text = f'{{"content": {json.dumps(content)}, {suffix}'
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---------------------------------------------------------------- records of a block


def add_digests(
    block: Block, records: Mapping[str, Mapping[int, dict[str, str]]], matrices: Matrices
) -> Records:
    """Add to the records of a block's rows their digests, and return them.

    Parameters
    ----------
    block : Block
    records : mapping
    matrices : mapping
        Those of rows that have a fingerprint are hashed; others' values don't count.
    """
    for metric, by_row in records.items():
        prefix = digests.identify(block.field.key, metric)
        for row, record in by_row.items():
            finished = record.get(schema.FINGERPRINT, "") != ""
            values = digests.hash_values(matrices[metric][row]) if finished else ""
            identity = prefix + block.identities[row - block.start]
            record[schema.DIGEST] = digests.bind(identity, record, values)
    return records


def failure_of(block: Block, reason: str) -> Records:
    """Make the records of a block that was given up; without fingerprints the next run computes it again."""
    records = {
        metric: {row: {schema.FAILURE: reason, schema.CONTENT: ""} for row in rows}
        for metric, rows in block.rows.items()
    }
    return add_digests(block, records, {})


# ---------------------------------------------------------------- stale rows


def find_stale(
    group: store.Group,
    field: FieldBlocks,
    contents: Sequence[str],
    identities: Sequence[bytes],
    block: int,
) -> StaleRows:
    """Find the rows of a field that are out of date, and delete their fingerprints before anything changes.

    Rows to compute lose their fingerprint. So do distances of metrics that aren't computed now whose frames
    have changed since, as nobody may take them for distances of today's frames, and distances of stores that
    didn't record resolutions yet.

    Parameters
    ----------
    group : Group
        Of ``distances.zarr``, brought up to date by :func:`lay_out`.
    field : FieldBlocks
    contents : sequence of str
        Content hash of each sequence.
    identities : sequence of bytes
        What each row's digest is bound to, see :func:`pipeline.storage.digests.identify_rows`. A row whose
        record is another than was written with its fingerprint is out of date.
    block : int
        Sequences in a block.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    suffixes = {
        name: [_suffix(metric.specification_hash, metric.scope, pairs) for pairs in SATISFIED_BY[field.pairs]]
        for name, metric in field.metrics.items()
    }
    described = has_specification(group)
    arrays = {name: store.get_array(provenance, name) for name in ROW_TEXTS}
    places = metric_places(group)
    stale = {name: np.ones(len(contents), bool) for name in field.metrics}
    damaged = 0
    for start in range(0, len(contents), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(contents)))
        recorded = store.read(arrays[schema.FINGERPRINT], (slice(None), rows))
        if not (recorded != "").any():
            continue
        texts = {name: store.read(array, (slice(None), rows)) for name, array in arrays.items()}
        resolved = np.where(texts[schema.RESOLUTION] != "", recorded, "")
        current = texts[schema.CONTENT] == np.array(contents[rows], dtype=object)[None]
        valid = np.where(current, resolved, "").astype(object)
        for name in field.metrics:
            metric_texts = {text: column[places[name]] for text, column in texts.items()}
            outdated = _differ(resolved[places[name]], contents[rows], suffixes[name])
            unbound = ~bound_rows(group.path, name, identities[rows], metric_texts) | (not described[name])
            damaged += int((unbound & ~outdated).sum())
            stale[name][rows] = outdated | unbound
            valid[places[name], stale[name][rows]] = ""
        _write_changed(arrays[schema.FINGERPRINT], start, recorded, valid)
    return StaleRows(field, stale, block, contents, identities, damaged)


def _differ(recorded: Iterable[str], contents: Sequence[str], suffixes: Sequence[str]) -> np.ndarray:
    """Compare recorded fingerprints of a metric with those of today: (sequence,) bool."""
    differ = [
        all(fingerprint != _hashed(content, suffix) for suffix in suffixes)
        for fingerprint, content in zip(recorded, contents, strict=True)
    ]
    return np.array(differ, dtype=bool)


def forget_metrics(group: store.Group, names: Collection[str]) -> None:
    """Delete all fingerprints of metrics that aren't computed now, and whose weights of pixels have changed.

    Parameters
    ----------
    group : Group
        Of ``distances.zarr``.
    names : collection of str
    """
    places = [place for name, place in metric_places(group).items() if name in names]
    if places:
        array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FINGERPRINT)
        stored = store.read(array)
        values = stored.copy()
        values[places] = ""
        _write_changed(array, 0, stored, values)


def _write_changed(array: store.Array, start: int, old: np.ndarray, new: np.ndarray) -> None:
    """Write those chunks along the second axis that have changed, neighbours at once."""
    length = array.chunks[1]
    blocks = np.unique(np.flatnonzero((old != new).any(axis=0)) // length)
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1):
        if len(run):
            first, stop = int(run[0]) * length, (int(run[-1]) + 1) * length
            store.write_block(array, (0, start + first), new[:, first:stop])


# ---------------------------------------------------------------- layout


def drop_other_frames(root: store.Group, key: str, frames: int) -> None:
    """Delete a field's results where its sequences had another number of frames."""
    name = f"{key}/{schema.PARAMETER}"
    if name in root and store.get_array(root, name).shape[1] != frames:
        store.delete(root, key)


def block_length(root: store.Group, key: str) -> int | None:
    """Look up the sequences in a block of a field that exists: a chunk of its distances."""
    names = schema.metric_names(store.get_group(root, key).array_keys()) if key in root else []
    return int(store.get_array(root, f"{key}/{names[0]}").chunks[0]) if names else None


def lay_out(
    root: store.Group, frames: store.Group, key: str, metrics: Mapping[str, str], block: int
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
    block : int
        Sequences in a block.
    """
    n = store.get_array(frames, schema.FRAMES).shape[1]
    sequences = store.read(store.get_array(frames, schema.SEQUENCE))
    parameter = store.read(store.get_array(frames, schema.PARAMETER))
    group = root.require_group(key)
    if schema.SEQUENCE not in group:
        store.create_array(
            group,
            schema.SEQUENCE,
            shape=sequences.shape,
            chunks=(LABELS_PER_CHUNK,),
            dims=(schema.SEQUENCE,),
            dtype=str,
        )
        store.write_rows(store.get_array(group, schema.SEQUENCE), 0, sequences)
    if schema.PARAMETER not in group:
        store.create_array(
            group,
            schema.PARAMETER,
            shape=parameter.shape,
            chunks=(LABELS_PER_CHUNK, n),
            dims=schema.PARAMETER_DIMS,
            dtype="float64",
        )
    _lay_out_metrics(group, metrics, store.get_array(group, schema.SEQUENCE).shape[0], n, block)
    _align_rows(group, [str(name) for name in sequences])
    store.set_attributes(group, dict(frames.attrs))
    return group


def _lay_out_metrics(group: store.Group, metrics: Mapping[str, str], rows: int, n: int, block: int) -> None:
    """Create the arrays of metrics that the store doesn't have yet."""
    provenance = group.require_group(schema.PROVENANCE)
    by_metric: dict[str, Any] = {"shape": (0,), "chunks": (METRICS_PER_CHUNK,), "dims": (schema.METRIC,)}
    by_row: dict[str, Any] = {
        "shape": (0, rows),
        "chunks": (METRICS_PER_CHUNK, ROWS_PER_CHUNK),
        "dims": schema.PROVENANCE_DIMS,
    }
    layouts = {schema.METRIC: by_metric, schema.SPECIFICATION: by_metric}
    layouts |= dict.fromkeys(ROW_TEXTS, by_row)
    for name, layout in layouts.items():
        if name not in provenance:
            store.create_array(provenance, name, dtype=str, **layout)
    for name, units in metrics.items():
        if name not in group:
            store.create_array(
                group,
                name,
                shape=(rows, n, n),
                chunks=(block, n, n),
                dims=schema.DISTANCE_DIMS,
                dtype="float64",
            )
        store.set_units(store.get_array(group, name), units)
    add_metrics(provenance, metrics, layouts)


def write_parameter(group: store.Group, parameter: np.ndarray) -> None:
    """Write the parameter of each frame; only once rows of other parameters are known to be out of date."""
    array = store.get_array(group, schema.PARAMETER)
    if not np.array_equal(store.read(array), parameter):
        store.write_rows(array, 0, parameter)


def _align_rows(group: store.Group, sequences: list[str]) -> None:
    """Bring rows into the order of ``sequences``, and keep the results of those that stay.

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
    is_new_place = origin != np.arange(len(sequences))

    # What an interrupted alignment cut off already is missing here, and counts as never computed.
    aligned = {name: _rearranged(store.read(array), origin, "", axis=1) for name, array in texts.items()}
    fingerprints = texts[schema.FINGERPRINT]
    store.resize_rows(fingerprints, len(sequences), axis=1)
    unmoved = np.where(is_new_place, "", aligned[schema.FINGERPRINT]).astype(object)
    _write_changed(fingerprints, 0, store.read(fingerprints), unmoved)
    rearranged = (origin[is_new_place] >= 0).any()
    for array in matrices:
        values = _rearranged(store.read(array), origin, np.nan, axis=0) if rearranged else None
        store.resize_rows(array, len(sequences))
        if values is not None:
            store.write_rows(array, 0, values)
    parameter = _rearranged(store.read(parameters), origin, np.nan, axis=0)
    store.resize_rows(parameters, len(sequences))
    store.write_rows(parameters, 0, parameter)
    store.resize_rows(names, len(sequences))
    store.write_rows(names, 0, np.array(sequences, dtype=object))
    for name, array in texts.items():
        # The fingerprints last: only now do names, values and they speak of the same rows again.
        store.resize_rows(array, len(sequences), axis=1)
        _write_changed(array, 0, store.read(array), aligned[name])


def _rearranged(values: np.ndarray, origin: np.ndarray, missing: Any, axis: int) -> np.ndarray:
    """Put row ``origin[k]`` along ``axis`` at k, ``missing`` where that is absent or −1."""
    present = (origin >= 0) & (origin < values.shape[axis])
    rows_first = np.moveaxis(values, axis, 0)
    out = np.full((len(origin), *rows_first.shape[1:]), missing, dtype=values.dtype)
    out[present] = rows_first[origin[present]]
    return np.moveaxis(out, 0, axis)
