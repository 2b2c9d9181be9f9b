"""Lay out the store of an archive's matrix, label its frames, and find the tiles that are out of date.

A tile is done when its fingerprint says so: a hash of the frames of both of its blocks, the metric's
specification with the hash of its weights, and the scope.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lsim.preprocess import Scope, scope_identity
from pipeline.matrix.frame_blocks import FrameBlock, MatrixFrames
from pipeline.stage.provenance import METRICS_PER_CHUNK, add_metrics, has_specification, metric_places
from pipeline.storage import digests, schema, store
from pipeline.storage.recorded import labels_of_blocks, tile_identity, tile_texts

OF_TILES: dict[str, str | int] = {
    schema.FINGERPRINT: "",
    schema.DIGEST: "",
    schema.MISSING: 0,
    schema.UNRESOLVED: 0,
}
"""Records of tiles with their empty values, the fingerprint first: in this order they are deleted."""

LABELS_TOGETHER = 16384
"""Frames in a chunk of labels."""


def tile_fingerprint(rows: str, columns: str, specification_hash: str, scope: Scope) -> str:
    """Hash all that determines the values of a tile.

    Parameters
    ----------
    rows, columns : str
        Hashes of the blocks' frames, see :attr:`pipeline.matrix.frame_blocks.FrameBlock.content`.
    specification_hash : str
    scope : (lo, hi)
    """
    inputs = {"rows": rows, "columns": columns, "specification": specification_hash}
    inputs["scope"] = scope_identity(scope)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def lay_out(
    root: store.Group, key: str, frames: MatrixFrames, metrics: Mapping[str, str], tile: int, side: int
) -> store.Group:
    """Bring a group into the shape of its frames, with an array for every metric.

    Metadata first: after this and :func:`label`, tasks write values and nothing else.

    Parameters
    ----------
    root : Group
        Of ``matrix.zarr``.
    key : str
        ``<dataset>/<field>`` or ``together/<name>``.
    frames : MatrixFrames
    metrics : mapping of str to str
        Names of the metrics to have, and the units of each; arrays already in the store stay.
    tile : int
        Frames on a side of a tile.
    side : int
        Tiles on a side of a task: one chunk of fingerprints, which has one writer.
    """
    n, count = len(frames), -(-len(frames) // tile)
    group = root.require_group(key)
    _forget_tiles_beyond(group, count)
    _forget_unresolved_tiles(group)
    dtypes = {
        schema.FIELD: str,
        schema.SEQUENCE: str,
        schema.NUMBER: "int32",
        schema.PARAMETER: "float64",
    }
    for name, dtype in dtypes.items():
        if name not in group:
            store.create_array(
                group, name, shape=(n,), chunks=(LABELS_TOGETHER,), dims=(schema.FRAME,), dtype=dtype
            )
        store.resize_rows(store.get_array(group, name), n)
    for name, units in metrics.items():
        if name not in group:
            store.create_array(
                group, name, shape=(n, n), chunks=(tile, tile), dims=schema.MATRIX_DIMS, dtype="float32"
            )
        store.set_units(store.get_array(group, name), units)
    for name in schema.matrix_metric_names(group.array_keys()):
        for axis in (0, 1):
            store.resize_rows(store.get_array(group, name), n, axis=axis)
    _lay_out_provenance(group, list(metrics), n, count, tile, side)
    return group


def _forget_tiles_beyond(group: store.Group, count: int) -> None:
    """Delete the fingerprints of tiles that a resize is about to cut off.

    A resize deletes distances in whole chunks, and leaves fingerprints in chunks that reach beyond the end:
    an archive that grew again would find them, and take NaN for distances that are up to date.
    """
    if f"{schema.PROVENANCE}/{schema.METRIC}" not in group:
        return
    provenance = store.get_group(group, schema.PROVENANCE)
    places = metric_places(group).values()
    for name, empty in OF_TILES.items():
        if name in provenance and (array := store.get_array(provenance, name)).shape[1] > count:
            surplus = np.ones(array.shape[1:], bool)
            surplus[:count, :count] = False
            for place in places:
                _clear(array, place, surplus, empty)


def _forget_unresolved_tiles(group: store.Group) -> None:
    """Delete all fingerprints of an older matrix that doesn't record which distances are resolved."""
    if f"{schema.PROVENANCE}/{schema.FINGERPRINT}" not in group or _records_resolution(group):
        return
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FINGERPRINT)
    for place in metric_places(group).values():
        _clear(array, place, np.ones(array.shape[1:], bool), "")


def _records_resolution(group: store.Group) -> bool:
    return f"{schema.PROVENANCE}/{schema.UNRESOLVED}" in group


def _lay_out_provenance(
    group: store.Group, metrics: Sequence[str], n: int, count: int, tile: int, side: int
) -> None:
    provenance = group.require_group(schema.PROVENANCE)
    by_metric: dict[str, Any] = {"chunks": (METRICS_PER_CHUNK,), "dims": (schema.METRIC,), "dtype": str}
    squares: dict[str, Any] = {"chunks": (1, side, side), "dims": schema.FINGERPRINT_DIMS}
    layouts: dict[str, dict[str, Any]] = {
        schema.METRIC: {"shape": (0,), **by_metric},
        schema.SPECIFICATION: {"shape": (0,), **by_metric},
        schema.CONTENT: {"shape": (count,), "chunks": (4096,), "dims": (schema.TILE,), "dtype": str},
        schema.FAILURE: {
            "shape": (0, n),
            "chunks": (1, tile),
            "dims": (schema.METRIC, schema.FRAME),
            "dtype": str,
        },
        schema.MISSING: {"shape": (0, count, count), "dtype": "int32", **squares},
        schema.UNRESOLVED: {"shape": (0, count, count), "dtype": "int32", **squares},
        schema.DIGEST: {"shape": (0, count, count), "dtype": str, **squares},
        schema.FINGERPRINT: {"shape": (0, count, count), "dtype": str, **squares},
    }
    for name, layout in layouts.items():
        if name not in provenance:
            store.create_array(provenance, name, **layout)
    arrays = {name: store.get_array(provenance, name) for name in layouts}
    store.resize_rows(arrays[schema.CONTENT], count)
    store.resize_rows(arrays[schema.FAILURE], n, axis=1)
    for name in OF_TILES:
        for axis in (1, 2):
            store.resize_rows(arrays[name], count, axis=axis)
    add_metrics(provenance, metrics, layouts.keys() - {schema.CONTENT})


def label(group: store.Group, frames: MatrixFrames) -> None:
    """Write the labels of all frames; only once the tiles of other frames are known to be out of date."""
    labels = {
        schema.FIELD: frames.field,
        schema.SEQUENCE: frames.sequence,
        schema.NUMBER: frames.number,
        schema.PARAMETER: frames.parameter,
    }
    for name, values in labels.items():
        store.write_rows(store.get_array(group, name), 0, values)


def sides(group: store.Group) -> tuple[int, int]:
    """Look up the frames on a side of a tile and the tiles on a side of a task, as :func:`lay_out` chose."""
    provenance = store.get_group(group, schema.PROVENANCE)
    return (
        store.get_array(provenance, schema.FAILURE).chunks[1],
        store.get_array(provenance, schema.FINGERPRINT).chunks[1],
    )


def stale_tiles(
    group: store.Group, name: str, specification_hash: str, scope: Scope, blocks: Sequence[FrameBlock]
) -> np.ndarray:
    """Find the tiles (i, j), i <= j, of a metric that are out of date: (tile, tile_other) bool.

    Tiles whose record, or the labels of whose frames, are others than were written with them are, too.
    """
    count = len(blocks)
    stale = np.triu(np.ones((count, count), bool))
    places = metric_places(group) if schema.PROVENANCE in group else {}
    if name not in places or not _records_resolution(group):
        return stale
    provenance, place = store.get_group(group, schema.PROVENANCE), places[name]
    recorded = store.read(store.get_array(provenance, schema.FINGERPRINT), place)
    if not has_specification(group)[name] or schema.DIGEST not in provenance:
        return stale
    of_tiles, missing, unresolved, failures = (
        store.read(store.get_array(provenance, column), place)
        for column in (schema.DIGEST, schema.MISSING, schema.UNRESOLVED, schema.FAILURE)
    )
    for i, j in np.argwhere(stale[: len(recorded), : len(recorded)]):
        rows, columns = blocks[i], blocks[j]
        fingerprint = tile_fingerprint(rows.content, columns.content, specification_hash, scope)
        if recorded[i, j] == fingerprint:
            reasons = failures[rows.start : rows.stop].tolist() if i == j else ()
            identity = tile_identity(group.path, name, (int(i), int(j)), rows.labels, columns.labels)
            texts = tile_texts(fingerprint, int(missing[i, j]), int(unresolved[i, j]), reasons)
            stale[i, j] = not digests.binds(str(of_tiles[i, j]), identity, texts)
    return stale


def invalidate(
    group: store.Group,
    blocks: Sequence[FrameBlock],
    stale: Mapping[str, np.ndarray],
    outdated: Collection[str] = (),
) -> None:
    """Delete the fingerprints of all tiles that are out of date, before anything else changes.

    These are the ``stale`` ones; tiles of metrics that aren't computed now whose frames have changed; and all
    tiles of the ``outdated`` metrics. Reasons of failures are deleted, too.
    """
    provenance = store.get_group(group, schema.PROVENANCE)
    array = store.get_array(provenance, schema.CONTENT)
    contents = np.array([block.content for block in blocks], object)
    labels = labels_of_blocks(group, len(blocks[0])) if blocks else []
    relabelled = np.array([block.labels != label for block, label in zip(blocks, labels, strict=True)], bool)
    has_new_content = (store.read(array) != contents) | relabelled
    for name, place in metric_places(group).items():
        is_obsolete = (
            stale[name] if name in stale else has_new_content[:, None] | has_new_content | (name in outdated)
        )
        for record, empty in OF_TILES.items():
            _clear(store.get_array(provenance, record), place, is_obsolete, empty)
        # Reasons come with the tile of a block with itself.
        of_frames = np.repeat(np.diagonal(is_obsolete), [len(block) for block in blocks])
        _clear(store.get_array(provenance, schema.FAILURE), place, of_frames, "")
    if (store.read(array) != contents).any():
        store.write_rows(array, 0, contents)


def _clear(array: store.Array, place: int, mask: np.ndarray, empty: str | int) -> None:
    """Empty a metric's records at some places, where any isn't empty."""
    values = store.read(array, place)
    if (values[mask] != empty).any():
        values[mask] = empty
        store.write_block(array, (place, *(0 for _ in values.shape)), values[None])
