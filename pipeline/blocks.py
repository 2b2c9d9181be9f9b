"""Which blocks of distances.zarr are out of date: the store's template, its rows, its fingerprints.

A fingerprint hashes all that determines a sequence's distances under a metric: the sequence's content,
the metric's specification with the hash of its weights, the scope, and which pairs. It is written after
the distances, so a block is done when its fingerprint says so; resuming after a crash, adding a metric
and adding data are one mechanism.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsim.preprocess import Scope
from pipeline import schema, store
from pipeline.schema import Pairs

METRICS_PER_CHUNK = 64
"""Of the texts in provenance: one chunk holds those of all metrics for a block's sequences, which one task
writes at once, instead of a small file a metric. A block has one task at a time, whatever its metrics."""

ROW_TEXTS = (schema.FAILURE, schema.CONTENT, schema.FINGERPRINT)
"""Texts that provenance has for every metric and sequence, the fingerprint last: as they are written."""

SATISFIED_BY: dict[Pairs, tuple[Pairs, ...]] = {"all": ("all",), "reference": ("reference", "all")}
"""Which recorded pairs will do for those asked for: all pairs hold the reference's too."""


@dataclass(frozen=True)
class StaleBlock:
    """Sequences ``start:stop`` of a field; for each metric the rows to compute, with their fingerprints.

    ``contents`` has the content hash of each row, and ``places`` the index of each metric in provenance.
    """

    start: int
    stop: int
    rows: Mapping[str, Mapping[int, str]]
    contents: Mapping[int, str]
    places: Mapping[str, int]


def fingerprint(content: str, specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """What a block is recorded under: a hash of all that determines its values."""
    made_of = {"content": content, "specification": specification_hash, "scope": scope, "pairs": pairs}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def stale_blocks(
    group: store.Group,
    contents: Sequence[str],
    specifications: Mapping[str, str],
    scopes: Mapping[str, Scope],
    pairs: Pairs,
) -> tuple[list[StaleBlock], int]:
    """The blocks of a field whose recorded fingerprints differ, and how many matrices are up to date.

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
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    recorded = store.read(store.get_array(provenance, schema.FINGERPRINT))
    length = store.get_array(group, schema.SEQUENCE).chunks[0]
    stale: dict[int, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    fresh = 0
    for name, specification in specifications.items():
        found, scope = recorded[names.index(name)], scopes[name]
        for row, content in enumerate(contents):
            wanted = {p: fingerprint(content, specification, scope, p) for p in SATISFIED_BY[pairs]}
            if found[row] in wanted.values():
                fresh += 1
            else:
                stale[row // length][name][row] = wanted[pairs]
    blocks = []
    for index in sorted(stale):
        start, stop = index * length, min((index + 1) * length, len(contents))
        rows = dict(stale[index])
        places = {name: names.index(name) for name in rows}
        blocks.append(StaleBlock(start, stop, rows, dict(enumerate(contents[start:stop], start)), places))
    return blocks, fresh


def invalidate(group: store.Group, contents: Sequence[str], blocks: Sequence[StaleBlock]) -> None:
    """Take the fingerprint from all distances that are out of date, before anything else changes.

    Those are the rows of ``blocks``, and those of metrics that aren't computed now whose frames have
    changed since: without a fingerprint nobody takes them for distances of today's frames.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    array = store.get_array(provenance, schema.FINGERPRINT)
    found = store.read(array)
    computed_from = store.read(store.get_array(provenance, schema.CONTENT))
    valid = np.where(computed_from == np.array(contents, dtype=object)[None], found, "").astype(object)
    for block in blocks:
        for name, rows in block.rows.items():
            valid[names.index(name), list(rows)] = ""
    if (valid != found).any():
        store.write_rows(array, 0, valid)


def describe(
    group: store.Group, parameter: np.ndarray, specifications: Mapping[str, Mapping[str, Any]]
) -> None:
    """Record the parameter, and the specification of the metrics that are about to be computed."""
    store.write_rows(store.get_array(group, schema.PARAMETER), 0, parameter)
    provenance = store.get_group(group, schema.PROVENANCE)
    names = store.read(store.get_array(provenance, schema.METRIC))
    array = store.get_array(provenance, schema.SPECIFICATION)
    texts = store.read(array)
    for index, name in enumerate(names):
        if name in specifications:
            texts[index] = json.dumps(specifications[name], sort_keys=True)
    store.write_rows(array, 0, texts)


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
        Names of the metrics to have, and the units of each; those already in the store stay.
    block : int
        Sequences per block, for a group that is new; an existing group keeps its own.
    """
    n = store.get_array(frames, schema.FRAMES).shape[1]
    sequences = store.read(store.get_array(frames, schema.SEQUENCE))
    parameter = store.read(store.get_array(frames, schema.PARAMETER))
    if key in root and schema.PARAMETER in store.get_group(root, key):
        found = store.get_array(store.get_group(root, key), schema.PARAMETER).shape[1]
        if found != n:
            del root[key]
    group = root.require_group(key)
    if schema.SEQUENCE in group:
        block = store.get_array(group, schema.SEQUENCE).chunks[0]
    else:
        store.create_array(
            group, schema.SEQUENCE, shape=sequences.shape, chunks=(block,), dims=(schema.SEQUENCE,), dtype=str
        )
        store.write_rows(store.get_array(group, schema.SEQUENCE), 0, sequences)
    if schema.PARAMETER not in group:
        shape, chunks = parameter.shape, (block, n)
        store.create_array(
            group, schema.PARAMETER, shape=shape, chunks=chunks, dims=schema.PARAMETER_DIMS, dtype="float64"
        )
    _add_metrics(group, metrics, store.get_array(group, schema.SEQUENCE).shape[0], n, block)
    _align_rows(group, [str(name) for name in sequences])
    store.set_attributes(group, dict(frames.attrs))
    return group


def drop_vanished(root: store.Group, keys: Sequence[str]) -> None:
    """Delete the fields that the frames no longer have.

    Raises
    ------
    StoreError
        When that would be all of them: these are the distances of something else.
    """
    there = store.field_keys(root, schema.PARAMETER)
    if there and not set(there) & set(keys):
        raise store.StoreError(
            f"{root.store_path} holds distances of {', '.join(there)}, and none of {', '.join(keys)}: "
            "choose another path"
        )
    for key in there:
        if key not in keys:
            del root[key]


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
            ).update_attributes({"units": units})
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
    parameter = store.get_array(group, schema.PARAMETER)
    old = [str(name) for name in store.read(names)]
    lengths = {array.shape[0] for array in (names, parameter, *matrices)}
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
    store.write_rows(fingerprints, 0, np.where(moved, "", known[schema.FINGERPRINT]).astype(object))
    for array in matrices:
        values = _rearranged(store.read(array), origin, np.nan, axis=0)
        store.resize_rows(array, len(sequences))
        if (origin[moved] >= 0).any():
            store.write_rows(array, 0, values)
    store.resize_rows(parameter, len(sequences))
    store.resize_rows(names, len(sequences))
    store.write_rows(names, 0, np.array(sequences, dtype=object))
    for name, array in texts.items():
        # The fingerprints last: only now do names, values and they speak of the same rows again.
        store.resize_rows(array, len(sequences), axis=1)
        store.write_rows(array, 0, known[name])


def _rearranged(values: np.ndarray, origin: np.ndarray, missing: Any, axis: int) -> np.ndarray:
    """``values`` with row ``origin[k]`` along ``axis`` at k, ``missing`` where that is absent or −1."""
    there = (origin >= 0) & (origin < values.shape[axis])
    moved = np.moveaxis(values, axis, 0)
    out = np.full((len(origin), *moved.shape[1:]), missing, dtype=values.dtype)
    out[there] = moved[origin[there]]
    return np.moveaxis(out, 0, axis)
