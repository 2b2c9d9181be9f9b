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
from typing import Any, Literal, TypeAlias

import numpy as np

from lsim.preprocess import Scope
from pipeline import schema, store

Pairs: TypeAlias = Literal["all", "reference"]

SATISFIED_BY: dict[Pairs, tuple[Pairs, ...]] = {"all": ("all",), "reference": ("reference", "all")}
"""Which recorded pairs will do for those asked for: all pairs hold the reference's too."""


@dataclass(frozen=True)
class StaleBlock:
    """Sequences ``start:stop`` of a field; for each metric the rows to compute, with their fingerprints."""

    start: int
    stop: int
    rows: Mapping[str, Mapping[int, str]]


def hash_of(content: Any) -> str:
    """Short SHA-256 of a JSON document."""
    document = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def fingerprint(content: str, specification_hash: str, scope: Scope, pairs: Pairs) -> str:
    """What a block is recorded under: a hash of all that determines its values."""
    return hash_of({"content": content, "specification": specification_hash, "scope": scope, "pairs": pairs})


def stale_blocks(
    group: store.Group, contents: Sequence[str], specifications: Mapping[str, str], scope: Scope, pairs: Pairs
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
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    recorded = store.read(store.get_array(provenance, schema.FINGERPRINT))
    length = store.get_array(group, schema.SEQUENCE).chunks[0]
    stale: dict[int, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    fresh = 0
    for name, specification in specifications.items():
        found = recorded[names.index(name)]
        for row, content in enumerate(contents):
            wanted = {p: fingerprint(content, specification, scope, p) for p in SATISFIED_BY[pairs]}
            if found[row] in wanted.values():
                fresh += 1
            else:
                stale[row // length][name][row] = wanted[pairs]
    blocks = [
        StaleBlock(index * length, min((index + 1) * length, len(contents)), dict(stale[index]))
        for index in sorted(stale)
    ]
    return blocks, fresh


def lay_out(
    root: store.Group,
    frames: store.Group,
    key: str,
    specifications: Mapping[str, Mapping[str, Any]],
    block: int,
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
    specifications : mapping
        Each metric's specification, by name; those already in the store stay.
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
    _add_metrics(group, specifications, store.get_array(group, schema.SEQUENCE).shape[0], n, block)
    _align_rows(group, [str(name) for name in sequences])
    store.write_rows(store.get_array(group, schema.PARAMETER), 0, parameter)
    store.set_attributes(group, dict(frames.attrs))
    return group


def drop_vanished(root: store.Group, keys: Sequence[str]) -> None:
    """Delete the fields that the frames no longer have."""
    for key in store.field_keys(root, schema.PARAMETER):
        if key not in keys:
            del root[key]


def _add_metrics(
    group: store.Group, specifications: Mapping[str, Mapping[str, Any]], rows: int, n: int, block: int
) -> None:
    """Arrays for the metrics that the store doesn't have yet, and the specification of all."""
    provenance = group.require_group(schema.PROVENANCE)
    texts: dict[str, dict[str, Any]] = {
        schema.METRIC: {"shape": (0,), "chunks": (1,), "dims": (schema.METRIC,)},
        schema.SPECIFICATION: {"shape": (0,), "chunks": (1,), "dims": (schema.METRIC,)},
        schema.FINGERPRINT: {"shape": (0, rows), "chunks": (1, block), "dims": schema.PROVENANCE_DIMS},
        schema.FAILURE: {"shape": (0, rows), "chunks": (1, block), "dims": schema.PROVENANCE_DIMS},
    }
    for name, layout in texts.items():
        if name not in provenance:
            store.create_array(provenance, name, dtype=str, **layout)
    for name in specifications:
        if name not in group:
            shape, chunks = (rows, n, n), (block, n, n)
            store.create_array(
                group, name, shape=shape, chunks=chunks, dims=schema.DISTANCE_DIMS, dtype="float64"
            )
    names, recorded = (
        store.read(store.get_array(provenance, name)) for name in (schema.METRIC, schema.SPECIFICATION)
    )
    known = dict(zip(map(str, names), map(str, recorded), strict=False))
    # A resize that was interrupted leaves a nameless entry.
    known.pop("", None)
    known |= {name: json.dumps(specifications[name], sort_keys=True) for name in specifications}
    for name in texts:
        store.resize_rows(store.get_array(provenance, name), len(known))
    for name, column in ((schema.METRIC, known.keys()), (schema.SPECIFICATION, known.values())):
        store.write_rows(store.get_array(provenance, name), 0, np.array(list(column), dtype=object))


def _align_rows(group: store.Group, sequences: list[str]) -> None:
    """Bring rows into the order of ``sequences``, keeping what is known of those that stay.

    A row that moves loses its fingerprint before its values change and gets it back after, so that an
    interruption costs a computation and never a wrong distance.
    """
    names = store.get_array(group, schema.SEQUENCE)
    old = [str(name) for name in store.read(names)]
    if old == sequences:
        return
    provenance = store.get_group(group, schema.PROVENANCE)
    fingerprints, failures = (
        store.get_array(provenance, name) for name in (schema.FINGERPRINT, schema.FAILURE)
    )
    row_of = {name: row for row, name in enumerate(old) if name}
    origin = np.array([row_of.get(name, -1) for name in sequences], dtype=int)
    moved = origin != np.arange(len(sequences))

    # What an interrupted alignment cut off already is missing here, and counts as never computed.
    known = _rearranged(store.read(fingerprints), origin, "", axis=1)
    reasons = _rearranged(store.read(failures), origin, "", axis=1)
    store.resize_rows(fingerprints, len(sequences), axis=1)
    store.write_rows(fingerprints, 0, np.where(moved, "", known).astype(object))
    for name in schema.metric_names(group.array_keys()):
        array = store.get_array(group, name)
        values = _rearranged(store.read(array), origin, np.nan, axis=0)
        store.resize_rows(array, len(sequences))
        if (origin[moved] >= 0).any():
            store.write_rows(array, 0, values)
    store.resize_rows(failures, len(sequences), axis=1)
    store.write_rows(failures, 0, reasons)
    store.resize_rows(store.get_array(group, schema.PARAMETER), len(sequences))
    store.resize_rows(names, len(sequences))
    store.write_rows(names, 0, np.array(sequences, dtype=object))
    # Only now do names, values and fingerprints speak of the same rows again.
    store.write_rows(fingerprints, 0, known)


def _rearranged(values: np.ndarray, origin: np.ndarray, missing: Any, axis: int) -> np.ndarray:
    """``values`` with row ``origin[k]`` along ``axis`` at k, ``missing`` where that is absent or −1."""
    there = (origin >= 0) & (origin < values.shape[axis])
    moved = np.moveaxis(values, axis, 0)
    out = np.full((len(origin), *moved.shape[1:]), missing, dtype=values.dtype)
    out[there] = moved[origin[there]]
    return np.moveaxis(out, 0, axis)
