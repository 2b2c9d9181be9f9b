"""Repair a damaged store: remove the records of damaged values, so that the next run computes them again.

Nothing is computed here. A chunk that cannot be decoded is deleted, so that it reads as fill values. Damaged
sequences lose their ``content``, and damaged distances their fingerprints: the next ``lsim convert`` or
``lsim distances`` takes them for missing. A metadata document is restored from the consolidated metadata,
which is then removed, because the store is unfinished. The root's document is not in there: it is written
again with the kind of store only, and the store has to be verified again.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pipeline.storage import chunks, metadata, schema, store
from pipeline.storage.recorded import LABELS
from pipeline.verify.damage import Damage, VerifyReport, is_of_root


def repair(path: str | os.PathLike[str], report: VerifyReport) -> int:
    """Remove the records of damaged values, and the chunks that cannot be decoded.

    Parameters
    ----------
    path : str or path
        A store of frames, distances, a matrix, embeddings or rollouts.
    report : VerifyReport
        Report of :func:`pipeline.verify.verify` on the store in its present state.

    Returns
    -------
    count : int
        Number of sequences, matrices, tiles or blocks that the next run computes again.

    Raises
    ------
    StoreError
        For a store of another kind, while another run writes to it, and for a lost document that is not in
        the consolidated metadata.
    """
    if report.kind not in _FORGET:
        raise store.StoreError(
            f"{path}: expected a store of {', '.join(_FORGET)}, found one of {report.kind}: delete it, and "
            "run the command that made it again"
        )
    forget = _FORGET[report.kind]
    count = 0
    if any(is_of_root(damage) for damage in report.damages):
        # The next run of its stage records all other attributes again.
        metadata.restore_root(
            path, _attributes(path) | {"kind": report.kind, "schema_version": schema.SCHEMA_VERSION}
        )
        return 0
    with store.locked(path):
        root = store.open_store(path, "r+")
        for damage in report.damages:
            if damage.chunk == metadata.DOCUMENT:
                metadata.restore_document(root, f"{damage.group}/{damage.array}".lstrip("/"))
        store.drop_consolidated(path)
        damaged_values = [d for d in report.damages if d.chunk != metadata.DOCUMENT or d.metric]
        for name in dict.fromkeys(damage.group for damage in damaged_values):
            group = store.get_group(root, name)
            damages = [damage for damage in damaged_values if damage.group == name]
            for damage in damages:
                if damage.unreadable:
                    chunks.delete_chunk(store.get_array(group, damage.array), damage.chunk)
            count += forget(group, damages)
    return count


def _attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the root's attributes without their digest; empty if the document cannot be read."""
    try:
        attributes = dict(store.open_store(path).attrs)
    except store.StoreError:
        return {}
    attributes.pop("digest", None)
    return attributes


def _forget_frames(group: store.Group, damages: list[Damage]) -> int:
    """Remove the content of damaged sequences, so that they count as not converted.

    Frames stay if they share a shard with undamaged sequences. Other shards are deleted: a shard with a
    damaged index could not be written again.
    """
    rows = sorted({row for damage in damages for row in damage.rows})
    array = store.get_array(group, schema.CONTENT)
    contents = store.read(array)
    contents[rows] = ""
    store.write_rows(array, 0, contents)
    frames = store.get_array(group, schema.FRAMES)
    unit = (frames.shards or frames.chunks)[0]
    for damage in damages:
        if damage.array == schema.FRAMES and damage.chunk:
            first = damage.rows[0] - damage.rows[0] % unit
            if not any(contents[first : first + unit]):
                chunks.delete_chunk(frames, damage.chunk)
    return len(rows)


def _forget_distances(group: store.Group, damages: list[Damage]) -> int:
    """Remove the fingerprints of damaged distances; of all metrics if their common record is damaged."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    array = store.get_array(provenance, schema.FINGERPRINT)
    stored = store.read(array)
    values = stored.copy()
    for damage in damages:
        if damage.array == _FINGERPRINT and not damage.rows:
            continue  # it is gone already
        if damage.metric in names:
            values[names.index(damage.metric), list(damage.rows)] = ""
        elif damage.array in (schema.PARAMETER, f"{schema.PROVENANCE}/{schema.FAILURE}", *_RANGES):
            continue  # every run writes the parameter; a digest reveals a lost failure
        elif damage.array.startswith(schema.PROVENANCE) and not damage.rows:
            values[...] = ""
        elif damage.rows:
            values[:, list(damage.rows)] = ""
    store.write_rows(array, 0, values)
    return int(np.sum(stored != values))


def _forget_tiles(group: store.Group, damages: list[Damage]) -> int:
    """Remove the fingerprints of damaged tiles; of all tiles if their common record is damaged."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    array = store.get_array(provenance, schema.FINGERPRINT)
    stored = store.read(array)
    values = stored.copy()
    for damage in damages:
        if damage.array == _FINGERPRINT and not damage.unreadable:
            continue  # it is gone already
        if damage.metric in names:
            values[(names.index(damage.metric), *damage.rows)] = ""
        elif damage.array.startswith(schema.PROVENANCE) and damage.array not in _RANGES:
            values[...] = ""
    store.write_block(array, (0, 0, 0), values)
    return int(np.sum(stored != values))


def _forget_blocks(group: store.Group, damages: list[Damage]) -> int:
    """Remove the fingerprints of damaged blocks of embeddings."""
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FINGERPRINT)
    stored = store.read(array)
    values = stored.copy()
    for damage in damages:
        if damage.array not in LABELS:  # every run writes labels
            values[list(damage.rows)] = ""
    store.write_rows(array, 0, values)
    return int(np.sum(stored != values))


_FINGERPRINT = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"
_RANGES = tuple(f"{schema.PROVENANCE}/{name}" for name in (schema.RANGES, schema.MASKED_RANGES))
"""Arrays of ranges; lost ones are computed from the frames again, and no distance depends on the record."""

_FORGET = {
    schema.FRAMES_STORE: _forget_frames,
    schema.DISTANCES_STORE: _forget_distances,
    schema.MATRIX_STORE: _forget_tiles,
    schema.EMBEDDINGS_STORE: _forget_blocks,
    # A rollout whose distances are not bound to their record is computed again anyway.
    schema.ROLLOUTS_STORE: lambda group, damages: len(damages),
}
