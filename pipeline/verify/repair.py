"""Make the stages do again what :mod:`pipeline.verify` found damaged: their record of it is taken away.

Nothing is computed here. A chunk of small values or of distances that cannot be decoded is deleted, so that
it reads as fill values; then damaged sequences lose their ``content``, and damaged distances their
fingerprints. The next ``lsim convert``, or ``lsim distances``, sees what isn't there and makes it. A metadata
document is written again as it is in the consolidated metadata, which goes then: the store is unfinished.
That of the root is listed nowhere: it is written again with the kind of store alone, and verified anew.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pipeline.storage import chunks, metadata, schema, store
from pipeline.storage.recorded import LABELS
from pipeline.verify.damage import Damage, VerifyReport, is_of_root


def repair(path: str | os.PathLike[str], report: VerifyReport) -> int:
    """Take away the record of what is damaged, and the chunks that cannot be decoded.

    Parameters
    ----------
    path : str or path
        A ``frames.zarr``, ``distances.zarr``, ``matrix.zarr`` or ``embeddings.zarr``.
    report : VerifyReport
        Of that store as it is now.

    Returns
    -------
    count : int
        Sequences, matrices, tiles or blocks that the next run makes again.

    Raises
    ------
    StoreError
        For a store of another kind, while another run writes to it, and when a document is lost that no
        consolidated metadata lists.
    """
    if report.kind not in _FORGET:
        raise store.StoreError(
            f"{path}: expected a store of {', '.join(_FORGET)}, found one of {report.kind}: delete it, and "
            "run again what made it"
        )
    forget = _FORGET[report.kind]
    count = 0
    if any(is_of_root(damage) for damage in report.damages):
        # What else belongs there, the next run of its stage records again.
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
        of_values = [d for d in report.damages if d.chunk != metadata.DOCUMENT or d.metric]
        for name in dict.fromkeys(damage.group for damage in of_values):
            group = store.get_group(root, name)
            damages = [damage for damage in of_values if damage.group == name]
            for damage in damages:
                if damage.unreadable:
                    chunks.delete_chunk(store.get_array(group, damage.array), damage.chunk)
            count += forget(group, damages)
    return count


def _attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Attributes of a root whose document can be read, without its digest."""
    try:
        attributes = dict(store.open_store(path).attrs)
    except store.StoreError:
        return {}
    attributes.pop("digest", None)
    return attributes


def _forget_frames(group: store.Group, damages: list[Damage]) -> int:
    """Take the content of damaged sequences: without it they are not converted.

    Frames stay where they share a shard with sound ones. A shard that holds nothing else is deleted: one
    whose index is damaged could not be written again.
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
    """Take the fingerprints of damaged distances, or of all metrics where it is their common record."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    array = store.get_array(provenance, schema.FINGERPRINT)
    before = store.read(array)
    after = before.copy()
    for damage in damages:
        if damage.array == _FINGERPRINT and not damage.rows:
            continue  # what is gone need not be taken
        if damage.metric in names:
            after[names.index(damage.metric), list(damage.rows)] = ""
        elif damage.array in (schema.PARAMETER, f"{schema.PROVENANCE}/{schema.FAILURE}", *_RANGES):
            continue  # the first is written by every run; a lost failure is seen in its digest
        elif damage.array.startswith(schema.PROVENANCE) and not damage.rows:
            after[...] = ""
        elif damage.rows:
            after[:, list(damage.rows)] = ""
    store.write_rows(array, 0, after)
    return int(np.sum(before != after))


def _forget_tiles(group: store.Group, damages: list[Damage]) -> int:
    """Take the fingerprints of damaged tiles, or of all where it is their common record."""
    provenance = store.get_group(group, schema.PROVENANCE)
    names = [str(name) for name in store.read(store.get_array(provenance, schema.METRIC))]
    array = store.get_array(provenance, schema.FINGERPRINT)
    before = store.read(array)
    after = before.copy()
    for damage in damages:
        if damage.array == _FINGERPRINT and not damage.unreadable:
            continue  # what is gone need not be taken
        if damage.metric in names:
            after[(names.index(damage.metric), *damage.rows)] = ""
        elif damage.array.startswith(schema.PROVENANCE) and damage.array not in _RANGES:
            after[...] = ""
    store.write_block(array, (0, 0, 0), after)
    return int(np.sum(before != after))


def _forget_blocks(group: store.Group, damages: list[Damage]) -> int:
    """Take the fingerprints of damaged blocks of embeddings."""
    array = store.get_array(store.get_group(group, schema.PROVENANCE), schema.FINGERPRINT)
    before = store.read(array)
    after = before.copy()
    for damage in damages:
        if damage.array not in LABELS:  # which every run writes
            after[list(damage.rows)] = ""
    store.write_rows(array, 0, after)
    return int(np.sum(before != after))


_FINGERPRINT = f"{schema.PROVENANCE}/{schema.FINGERPRINT}"
_RANGES = tuple(f"{schema.PROVENANCE}/{name}" for name in (schema.RANGES, schema.MASKED_RANGES))
"""Found again in the frames where they are lost: distances don't depend on their record."""

_FORGET = {
    schema.FRAMES_STORE: _forget_frames,
    schema.DISTANCES_STORE: _forget_distances,
    schema.MATRIX_STORE: _forget_tiles,
    schema.EMBEDDINGS_STORE: _forget_blocks,
}
